"""NaturalBench: two questions about two images, each with either answer."""
