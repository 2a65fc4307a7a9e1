"""Free answers against right ones, without a judge.

Both are lower-cased, and punctuation and the articles a, an and the are left out.

    exact = answers equal to a right one / questions,  contained = answers with a right one as whole words / questions

Neither knows synonyms: "contained" also counts "no cup" as "cup", and "exact" loses "a red cup" for "cup".
"""

import re
from collections.abc import Sequence

_PUNCTUATION = re.compile(r"[^\w\s]|_")
_ARTICLES = frozenset({"a", "an", "the"})


def words(text: str) -> list[str]:
    """The words that are compared."""
    return [word for word in _PUNCTUATION.sub(" ", text.lower()).split() if word not in _ARTICLES]


def is_exact(answer: str, right: Sequence[str]) -> bool:
    """Whether the answer is one of the right ones."""
    given = words(answer)
    return any(given == words(each) for each in right)


def contains(answer: str, right: Sequence[str]) -> bool:
    """Whether the words of a right answer stand in the answer, one behind the other."""
    given = words(answer)
    wanted = [found for each in right if (found := words(each))]
    return any(
        given[start : start + len(each)] == each for each in wanted for start in range(len(given) - len(each) + 1)
    )
