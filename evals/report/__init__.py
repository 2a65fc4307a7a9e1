"""A run's figures as text, as a page and as plots."""
