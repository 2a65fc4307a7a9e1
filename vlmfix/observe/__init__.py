"""Lets a model answer and records what happens inside; changes nothing."""
