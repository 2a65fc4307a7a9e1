"""ScienceQA: what a model can do beside not hallucinating."""
