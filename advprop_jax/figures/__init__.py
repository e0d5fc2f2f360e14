"""Figures: what is drawn of runs."""
