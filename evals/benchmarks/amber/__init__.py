"""AMBER: descriptions and questions."""
