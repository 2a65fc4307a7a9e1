"""CHAIR: invented objects in captions."""
