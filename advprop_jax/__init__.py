"""AdvProp in JAX: adversarial examples as training data, each domain with its own batch norms."""

__version__ = "0.1.0"
