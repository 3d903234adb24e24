"""Sections that compare the device's results with the CPU's."""
