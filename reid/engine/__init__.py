"""The training loop and the parts it uses while it runs."""
