"""Robustness: what is measured of a network besides its accuracy on clean images."""
