"""Pinned packages and pretrained weights from outside, as local folders that are not trusted."""
