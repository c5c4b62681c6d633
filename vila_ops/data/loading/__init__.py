"""What an epoch is, which samples share a row, and the rows of a step."""
