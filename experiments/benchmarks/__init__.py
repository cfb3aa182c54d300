"""Measurements: ratios taken in one run, with the device and the commit."""
