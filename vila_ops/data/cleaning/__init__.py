"""What is taken out: rules on one record, and decisions over all of them."""
