"""The mathematics of what has no kernel: arrays in, arrays out."""
