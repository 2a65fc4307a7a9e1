"""Metrics as pure functions: text and ground truth in, counts and scores out."""
