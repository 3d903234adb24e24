"""The training loop, and what it needs while it runs."""
