"""Finds persons in a gallery of crops that is kept on disk."""
