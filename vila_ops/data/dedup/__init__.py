"""Deduplication: signatures of records, and near duplicates among them. Builds on filtering."""
