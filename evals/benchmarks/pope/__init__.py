"""POPE: questions whether an object is there."""
