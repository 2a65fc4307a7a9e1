"""Decoding methods: the next token is chosen from two branches of the same answer, or by a search over beams.

One file per method; ``vlmfix.list_methods()`` lists them with the others. Each is a ``weight`` of the contrast, and
says what the other branch reads: another image (``vcd``, ``ifg``), other tokens (``guidance``, ``m3id``, ``icd``,
``lqcd``), the same under an attention method (``edited``, ``sid``,
``ibd``, ``maskcd``, ``causalmm``), or nothing (``flb``). What they share:

- ``base``: the contract, the contrast and the cut.
- ``two_branches``: what happens before and after a forward of the model, in its hooks.
- ``other_prompt``, ``other_image``: the arguments of the forward that reads the other prompt.
- ``words``: the tokenizer, for prompts that are put into words.
- ``branch``: what is kept of the other branch, its part of a step, an attention method in it. ``caches``: both caches
  in one.

``opera`` takes the place of ``generate``: ``beam_search`` is plain, ``opera_search`` looks ahead and goes back.
"""
