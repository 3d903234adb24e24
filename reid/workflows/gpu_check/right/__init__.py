"""Sections that check results: the device's against the CPU's."""
