"""vlmfix: make vision-language models hallucinate less at inference time, without training."""

__version__ = "0.1.0"
