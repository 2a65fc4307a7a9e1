"""Learns what some methods need offline (heads, statistics, dimensions) from a few samples: ``vlmfix.calibrate``."""
