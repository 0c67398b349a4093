"""Guided contrastive fine-tuning of text-embedding models at any batch size, on a Ray cluster."""

__version__ = "0.1.0"
