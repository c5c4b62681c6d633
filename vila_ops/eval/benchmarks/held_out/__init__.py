"""Measures of our own on held-out objects of a prepared mixture."""
