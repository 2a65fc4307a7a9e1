"""``vlmfix inspect``: one answer, word by word."""
