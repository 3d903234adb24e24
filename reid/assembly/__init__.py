"""Builds objects from the config; no other code reads the config."""
