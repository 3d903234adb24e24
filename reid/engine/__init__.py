"""Assembly and the training loop: the one floor that reads the config."""
