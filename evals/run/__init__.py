"""Answers on disk: plans a run, generates what is missing, resumes."""
