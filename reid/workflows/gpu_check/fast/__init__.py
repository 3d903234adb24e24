"""Sections that measure speed and memory."""
