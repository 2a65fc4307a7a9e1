"""Sycophancy: questions with hints and doubts."""
