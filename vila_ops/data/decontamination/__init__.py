"""Decontamination: training records that overlap with evaluation sets. Builds on dedup."""
