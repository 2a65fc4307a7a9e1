"""MMHal-Bench: open questions, judged."""
