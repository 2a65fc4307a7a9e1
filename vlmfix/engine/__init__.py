"""Applies methods to one forward of a model."""
