"""Person re-identification: images become embeddings, pseudo-labels, a loss."""

__version__ = "0.1.0"
