"""Test sets, features of images, rankings, numbers and tables."""
