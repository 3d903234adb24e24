"""Config to objects: the one floor that reads the config."""
