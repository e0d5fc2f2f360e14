"""Robustness: what is measured of a network, beside its accuracy on clean images."""
