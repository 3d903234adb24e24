"""Backbones, heads, losses, and weights on disk."""
