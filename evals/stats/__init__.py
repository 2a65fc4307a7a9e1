"""Resampling, intervals and tests; knows no benchmark."""
