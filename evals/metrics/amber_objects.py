"""The objects in one description of AMBER's: which nouns are in the image, and which are invented."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..data.amber import AmberData, AmberItem
from .amber_words import Nouns, Similarity, tagged_nouns


def description_counter(
    data: AmberData, *, nouns: Nouns | None = None, similarity: Similarity | None = None, threshold: float = 0.8
) -> Callable[[int, str], tuple[int, int, int]]:
    """The function from an item and a description to its covered objects, nouns and hallucinated nouns.

    Args:
        data: The annotations.
        nouns: As of :func:`vlmfix.evals.metrics.amber.score_responses`, and so the others.
        similarity: See there.
        threshold: See there.
    """
    found = nouns or tagged_nouns()
    same = None if similarity is None else compared(similarity, threshold)

    def count(item: int, text: str) -> tuple[int, int, int]:
        said, hallucinated, covered, *_ = caption_counts(found(text), data.items[item], data, same)
        return covered, said, hallucinated

    return count


def compared(similarity: Similarity, threshold: float) -> Callable[[str, str], bool]:
    """Whether two words are one, by their similarity."""
    known: dict[tuple[str, str], bool] = {}  # Word vectors are slow, and the same words come again and again.

    def same(first: str, second: str) -> bool:
        if (first, second) not in known:
            known[first, second] = similarity(first, second) > threshold
        return known[first, second]

    return same


def caption_counts(
    nouns: Sequence[str], item: AmberItem, data: AmberData, same: Callable[[str, str], bool] | None
) -> tuple[int, int, int, int, int, int]:
    """Nouns, hallucinated, covered, |T|, named of H, |H| of one response."""
    found = [noun for noun in nouns if noun in data.vocabulary]
    truth, invented = _owners(item.truth, data), _owners(item.hallucination, data)
    covered: set[int] = set()
    cognitive: set[int] = set()
    hallucinated = 0
    for noun in found:
        if noun in data.safe_words:
            continue
        if noun in truth:
            covered.add(truth[noun])
            continue
        if noun in invented:
            cognitive.add(invented[noun])
        alike = [_alike(noun, words, same) for words in (invented, truth)]
        cognitive.update(alike[0])
        covered.update(alike[1])
        hallucinated += not alike[1]
    return (len(found), hallucinated, len(covered), len(item.truth), len(cognitive), len(item.hallucination))


def _owners(objects: Sequence[str], data: AmberData) -> dict[str, int]:
    """Word -> the object it stands for. Associated words come first, and the first object that has a word owns it."""
    owners: dict[str, int] = {}
    for index, name in enumerate(objects):
        for word in data.association[name]:
            owners.setdefault(word, index)
    for index, name in enumerate(objects):
        owners.setdefault(name, index)
    return owners


def _alike(noun: str, words: Mapping[str, int], same: Callable[[str, str], bool] | None) -> list[int]:
    """The object of the first word similar to the noun, in a list of at most one."""
    return [] if same is None else [index for word, index in words.items() if same(noun, word)][:1]
