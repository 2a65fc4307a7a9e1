"""MaskCD: against the branch without the outputs of image heads."""

from __future__ import annotations

from naive.allpath import NaiveAllPath
from naive.edited import NaiveEdited

HEADS = ((0, 1), (1, 0), (1, 3), (3, 2))
DECODING_CASES = [
    ({"heads": HEADS}, NaiveEdited(NaiveAllPath((), HEADS), 1.0, 0.1)),
    ({"heads": HEADS[1:], "alpha": 0.5, "beta": 0.0}, NaiveEdited(NaiveAllPath((), HEADS[1:]), 0.5, 0.0)),
]
