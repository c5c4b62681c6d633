"""Filtering: rules on one record, and the best share of a raw file."""
