"""Hallucination evaluation before and after a patch."""
