"""Sealed artifacts: their kinds, and the store that finds, seals and verifies them."""
