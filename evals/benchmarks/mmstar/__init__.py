"""MMStar: what a model can do beside not hallucinating."""
