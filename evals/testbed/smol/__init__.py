"""``smol``: a vision-language model with a pretrained language model inside (SmolLM2-135M-Instruct)."""
