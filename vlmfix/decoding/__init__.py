"""Decoding methods: the next token is chosen from two branches of the same answer, or by a search over beams.

One file per method; ``vlmfix.list_methods()`` lists them with the others. Each is a formula in ``combine``, and says
what the other branch reads: another image (``vcd``, ``ifg``), other tokens (``guidance``, ``m3id``, ``icd``, ``lqcd``),
the same under an attention method (``edited``, ``sid``), or nothing (``flb``). What they share:

- ``base``: the contract, the contrast and the cut.
- ``two_branches``: what happens before and after a forward of the model, in its hooks.
- ``other_prompt``, ``other_image``: the arguments of the forward that reads the other prompt.
- ``words``: the tokenizer, for prompts that are put into words.
- ``branch``: what is kept of the other branch, and its part of a step. ``caches``: both caches in one.
- ``outputs``: what a forward returns.
- ``branch_edits``: an attention method in the other branch.

``opera`` takes the place of ``generate``: ``beam_search`` is plain, ``opera_search`` looks ahead and goes back.
"""
