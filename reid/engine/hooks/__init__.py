"""Hooks of the training loop, one per file."""
