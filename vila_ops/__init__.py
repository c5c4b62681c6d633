"""VILA as a platform: image-text data in, a served and fresh visual language model out."""

__version__ = "0.1.0"
