"""MME: the hallucination subset."""
