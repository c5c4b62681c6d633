"""Ablations: a grid of recipes, trained and measured with several seeds, and what that shows."""
