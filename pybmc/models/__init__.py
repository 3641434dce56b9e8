"""Architectures: what a file's metadata and tensors mean."""
