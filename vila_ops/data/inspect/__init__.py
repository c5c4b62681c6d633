"""Tools to inspect data: lint of raw files, and a page of prepared samples."""
