"""Self-verification: the model is asked for the objects that a text names, and what it denies is left out.

- ``phrases``, ``lexicon``: the noun phrases of English text, by closed word lists.
- ``ask``: questions behind one reading of an image.
- ``judge``: the evidence for each word, and the rule.
- ``leave_out``, ``clauses``: sentences without some of their phrases.
- ``call``: ``vlmfix.verify``, for any text.
- ``verify``: the method ``Verify``; ``generate``: what it puts in the place of a model's ``generate``.
"""
