"""The embedded tiny vision-language model and its scenes."""
