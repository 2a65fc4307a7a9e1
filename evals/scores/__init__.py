"""From answers to figures: differences, controls, verdicts."""
