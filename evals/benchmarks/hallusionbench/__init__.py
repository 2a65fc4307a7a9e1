"""HallusionBench: sets of figures and questions."""
