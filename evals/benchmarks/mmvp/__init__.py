"""MMVP: pairs of images that CLIP takes for alike."""
