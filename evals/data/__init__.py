"""Loaders of images, annotations and questions."""
