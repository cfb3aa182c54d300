"""Weights from and to published names: declarative tables, one file per system."""
