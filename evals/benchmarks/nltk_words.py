"""nltk's tokenizers and tagger as the official scripts had them, in every version from 3.8.1, several times as fast.

:class:`FastTokenizer` and :class:`FastTagger` give the same tokens and tags to the last one. They read nltk's own
tables (Punkt's abbreviations, the perceptron's weights), and turn to nltk wherever a text is not plain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmfix.errors import DataError, UnsupportedFeatureError, how_to_install

Words = Callable[[str], list[str]]
"""From a text to its words."""

_WORD = r"[a-z0-9]+(?:-[a-z0-9]+)*"

_PLAIN_SENTENCE = re.compile(rf"[ \n]*{_WORD}(?:,?[ \n]+{_WORD})*[.!?]?[ \n]*")

_PLAIN_TOKEN = re.compile(rf"{_WORD}|[,.!?]")

_CONTRACTED = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b")

_END = re.compile(r"(?<![^ \n])([a-z]{2,}(?:-[a-z]{2,})*)[.!?](?:[ \n]+(?=[a-z0-9])|[ \n]*\Z)")

_START = ("-START-", "-START2-")

_STOP = ("-END-", "-END2-")


class FastTokenizer:
    """nltk's ``word_tokenize`` for lower-cased text.

    Args:
        sentences: nltk's ``PunktTokenizer``; its abbreviations and collocations are read.
        words: nltk's ``NLTKWordTokenizer``.
    """

    def __init__(self, sentences: Any, words: Any):
        self._sentences = sentences.tokenize
        self._words = words.tokenize
        parameters = sentences._params
        self._undecided = frozenset(parameters.abbrev_types) | {first for first, _ in parameters.collocations}

    def __call__(self, text: str) -> list[str]:
        """The tokens of lower-cased text."""
        tokens: list[str] = []
        for sentence in self._split(text):
            if _PLAIN_SENTENCE.fullmatch(sentence) and not _CONTRACTED.search(sentence):
                tokens += _PLAIN_TOKEN.findall(sentence)
            else:
                tokens += self._words(sentence)
        return tokens

    def _split(self, text: str) -> Sequence[str]:
        ends = list(_END.finditer(text))
        if len(ends) != text.count(".") + text.count("!") + text.count("?"):
            return self._sentences(text)  # type: ignore[no-any-return]
        for end in ends:
            word = end[1]
            if word in self._undecided or word.rpartition("-")[2] in self._undecided:
                return self._sentences(text)  # type: ignore[no-any-return]
        starts = [0, *(end.end() for end in ends)]
        sentences = [text[a:b].rstrip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        return sentences if sentences[-1] else sentences[:-1]


class FastTagger:
    """nltk's ``PerceptronTagger`` for lower-cased tokens.

    Args:
        weights: Feature -> tag -> weight.
        fixed: Words that always have the same tag.
        tags: All tags.
    """

    def __init__(self, weights: Mapping[str, Mapping[str, float]], fixed: Mapping[str, str], tags: Collection[str]):
        self._weights = weights
        self._fixed = fixed
        # Of equal scores nltk takes the last tag in alphabetical order, and argmax the first: reversed.
        self._tags = sorted(tags, reverse=True)
        self._column = {tag: i for i, tag in enumerate(self._tags)}
        self._rows: NDArray[np.float64] = np.zeros((1024, len(self._tags)))
        self._used = 1  # Row 0 stands for features without weights.
        self._index: dict[str, int] = {}
        self._bias = self._row("bias")
        self._words: dict[str, tuple[str, int, int, int]] = {}
        self._neighbours: dict[str, tuple[int, int, int, int, int, int]] = {}
        self._histories: dict[tuple[str, str], tuple[int, int, int]] = {}
        self._pairs: dict[tuple[str, str], int] = {}

    def _row(self, feature: str) -> int:
        """The row of a feature's weights, filled in when first asked for."""
        row = self._index.get(feature)
        if row is None:
            weights = self._weights.get(feature)
            row = self._used if weights else 0
            if weights:
                if row == len(self._rows):
                    self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
                for tag, weight in weights.items():
                    self._rows[row, self._column[tag]] = weight
                self._used += 1
            self._index[feature] = row
        return row

    def _word(self, word: str) -> tuple[str, int, int, int]:
        """The normal form of a word and the rows of its suffix, its first letter and itself."""
        found = self._words.get(word)
        if found is None:
            normal = _normal(word)
            rows = (self._row(f"i suffix {word[-3:]}"), self._row(f"i pref1 {word[:1]}"), self._row(f"i word {normal}"))
            found = self._words[word] = (normal, *rows)
        return found

    def _neighbour(self, normal: str) -> tuple[int, int, int, int, int, int]:
        """Rows of a normal form one place before (word, suffix), two before, one behind (word, suffix), two behind."""
        found = self._neighbours.get(normal)
        if found is None:
            suffix, row = normal[-3:], self._row
            found = self._neighbours[normal] = (
                *(row(f"i-1 word {normal}"), row(f"i-1 suffix {suffix}"), row(f"i-2 word {normal}")),
                *(row(f"i+1 word {normal}"), row(f"i+1 suffix {suffix}"), row(f"i+2 word {normal}")),
            )
        return found

    def _history(self, before: str, earlier: str) -> tuple[int, int, int]:
        """Rows of the two tags before."""
        found = self._histories.get((before, earlier))
        if found is None:
            found = self._histories[before, earlier] = (
                self._row(f"i-1 tag {before}"),
                self._row(f"i-2 tag {earlier}"),
                self._row(f"i tag+i-2 tag {before} {earlier}"),
            )
        return found

    def tag(self, tokens: Sequence[str], wanted: Callable[[str], bool] = lambda token: True) -> list[str | None]:
        """The tags of tokens.

        Args:
            tokens: A caption's tokens.
            wanted: Which tokens need a tag.

        Returns:
            One tag per token; None where nothing wanted depends on it.
        """
        needed = self._needed(tokens, wanted)
        found: list[str | None] = []
        before: str | None
        earlier: str | None
        before, earlier = _START
        for i, token in enumerate(tokens):
            tag: str | None = None
            if needed[i]:
                tag = self._fixed.get(token)
                if not tag:
                    assert before is not None and earlier is not None
                    tag = self._predict(tokens, i, before, earlier)
            found.append(tag)
            before, earlier = tag, before
        return found

    def _needed(self, tokens: Sequence[str], wanted: Callable[[str], bool]) -> list[bool]:
        """Whether each token's tag is wanted, or decides about one that is: that of the next two free tokens."""
        needed = [False, False, *map(wanted, tokens)]
        for i in range(len(tokens) - 1, -1, -1):
            if needed[i + 2] and not self._fixed.get(tokens[i]):
                needed[i + 1] = needed[i] = True
        return needed[2:]

    def _around(self, tokens: Sequence[str], place: int) -> tuple[int, int, int, int, int, int]:
        """:meth:`_neighbour` of the token at a place, which may lie up to two before the first or behind the last."""
        if place < 0:
            return self._neighbour(_START[place])
        after = place - len(tokens)
        return self._neighbour(self._word(tokens[place])[0] if after < 0 else _STOP[after])

    def _predict(self, tokens: Sequence[str], place: int, before: str, earlier: str) -> str:
        normal, suffix, first, own = self._word(tokens[place])
        pair = self._pairs.get((before, normal))
        if pair is None:
            pair = self._pairs[before, normal] = self._row(f"i-1 tag+i word {before} {normal}")
        left, right = self._around(tokens, place - 1), self._around(tokens, place + 1)
        further = (self._around(tokens, place - 2)[2], self._around(tokens, place + 2)[5])
        rows = [
            *(self._bias, suffix, first, *self._history(before, earlier), own, pair),
            *(left[0], left[1], further[0], right[3], right[4], further[1]),
        ]
        # Over axis 0 numpy adds row by row, as nltk does: the same sums to the last bit.
        return self._tags[int(self._rows[rows].sum(axis=0).argmax())]


def _normal(word: str) -> str:
    if "-" in word and word[0] != "-":
        return "!HYPHEN"
    if word.isdigit() and len(word) == 4:
        return "!YEAR"
    return "!DIGITS" if word[:1].isdigit() else word.lower()


# Where nltk's tables come from

_NLTK_DATA_HINT = (
    "type `python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`, or set NLTK_DATA to a folder that "
    "holds tokenizers/punkt_tab and taggers/averaged_perceptron_tagger_eng"
)


def _nltk(what: str) -> Any:
    try:
        import nltk
    except ImportError as error:
        raise UnsupportedFeatureError(
            f"{what} needs the nltk package, which is not installed: type {how_to_install('nltk')}"
        ) from error
    return nltk


def punkt_tokens(what: str = "CHAIR's punkt tokenizer") -> Words:
    """The official tokeniser: Punkt sentences, then Treebank words (nltk ``word_tokenize``).

    Args:
        what: Whose tokenizer it is, for messages.

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the Punkt tables are not found; the message says how to get them.
    """
    nltk = _nltk(what)
    try:
        sentences = _punkt(nltk)
    except LookupError as error:
        raise DataError(f"nltk does not find the data punkt_tab: {_NLTK_DATA_HINT}") from error
    sentences._lang_vars = _official_punctuation(nltk.tokenize.punkt.PunktLanguageVars)
    return FastTokenizer(sentences, _official_words(nltk.tokenize.NLTKWordTokenizer))


def _official_punctuation(base: Any) -> Any:
    """The punctuation that Punkt knew when the official counts were made (nltk 3.8.1): no curly quotes.

    Args:
        base: nltk's ``PunktLanguageVars``.
    """

    class Punctuation(base):  # type: ignore[misc]
        re_boundary_realignment = re.compile(r"""["')\]}]+?(?:\s+|(?=--)|$)""", re.MULTILINE)

        @property
        def _re_non_word_chars(self) -> str:
            ends = re.escape("".join(set(self.sent_end_chars) - {"."}))
            return rf"""(?:[)";}}\]\*:@'({{\[{ends}])"""

    return Punctuation()


def _official_words(base: Any) -> Any:
    """The word tokenizer of nltk 3.8.1, with which the official counts were made, of any later version.

    Later versions part words at en and em dashes ("people—two" is one word in the official counts), and read
    apostrophes at a word's beginning and runs of blanks otherwise.

    Args:
        base: nltk's ``NLTKWordTokenizer``.
    """
    tokenizer = base()
    apostrophe = (re.compile(r"(?i)(\')(?!re|ve|ll|m|t|s|d|n)(\w)\b"), r"\1 \2")
    tokenizer.STARTING_QUOTES = [*base.STARTING_QUOTES[:-1], apostrophe]
    tokenizer.PUNCTUATION = [rule for rule in base.PUNCTUATION if not rule[0].search("—")]
    tokenizer.ENDING_QUOTES = [rule for rule in base.ENDING_QUOTES if not rule[0].search("  ")]
    return tokenizer


_WEIGHTS = "taggers/averaged_perceptron_tagger_eng/averaged_perceptron_tagger_eng.{}.json"

_TAGGER_PARTS = ("weights", "tagdict", "classes")

_PUNKT_FILES = ("abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab")


def _punkt(nltk: Any) -> Any:
    """Punkt for English, with the tables of the data package punkt_tab."""
    if hasattr(nltk.tokenize, "PunktTokenizer"):
        return nltk.tokenize.PunktTokenizer("english")
    parameters = nltk.tokenize.punkt.PunktParameters()  # Before 3.9 the tables were pickles.
    lines = {name: _data_lines(nltk, f"tokenizers/punkt_tab/english/{name}") for name in _PUNKT_FILES}
    parameters.abbrev_types.update(lines["abbrev_types.txt"])
    parameters.sent_starters.update(lines["sent_starters.txt"])
    parameters.collocations.update(tuple(line.split("\t")) for line in lines["collocations.tab"])
    for word, context in (line.split("\t") for line in lines["ortho_context.tab"]):
        parameters.ortho_context[word] = int(context)
    return nltk.tokenize.punkt.PunktSentenceTokenizer(parameters)


def _data_lines(nltk: Any, name: str) -> list[str]:
    """The lines of a data file, which versions before 3.9 look for under names of their own."""
    for folder in nltk.data.path:
        if (path := Path(folder) / name).is_file():
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    raise LookupError(name)


def perceptron_tagger(what: str = "CHAIR's nltk mode") -> Any:
    """Nltk's ``PerceptronTagger`` with its weights.

    Args:
        what: Whose tagger it is, for messages.

    Raises:
        UnsupportedFeatureError: nltk is not installed.
        DataError: the tagger's weights are not found; the message says how to get them.
    """
    nltk = _nltk(what)
    try:
        if hasattr(nltk.tokenize, "PunktTokenizer"):
            return nltk.tag.PerceptronTagger()
        tagger = nltk.tag.PerceptronTagger(load=False)  # Before 3.9 the weights were a pickle.
        read = {part: json.loads("\n".join(_data_lines(nltk, _WEIGHTS.format(part)))) for part in _TAGGER_PARTS}
        tagger.model.weights, tagger.tagdict, tagger.classes = read["weights"], read["tagdict"], set(read["classes"])
        tagger.model.classes = tagger.classes
        return tagger
    except LookupError as error:
        raise DataError(f"nltk does not find the data averaged_perceptron_tagger_eng: {_NLTK_DATA_HINT}") from error
