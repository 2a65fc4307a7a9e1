"""MMVP: pairs of images that look alike to CLIP."""
