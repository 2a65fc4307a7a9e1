"""What a vision-language model is made of: knows transformers, edits nothing."""
