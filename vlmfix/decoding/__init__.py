"""Decoding methods: the next token is chosen from two branches of the same answer, or by a search over beams.

One file per method; ``vlmfix.list_methods()`` lists them with the others.
"""
