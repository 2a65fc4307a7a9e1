"""Asks a model whether objects are in its images: every question behind one reading of the image, and once without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import FORWARD_KWARG, Anatomy, analyse
from vlmfix.observe.ask import answer, next_logits
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.words import need_yes_no_tokens
from vlmfix.patching import find_patch
from vlmfix.prefix import Prefix, shared_prefix
from vlmfix.verification import lexicon

QUESTION = "Is there {article} {name} in the image?"
"""POPE's question."""

ROWS_TO_SCORE = 16
"""Answers whose tokens are scored in one forward, which gives logits of the whole vocabulary for each token."""


class Asked(NamedTuple):
    """What a model says when it is asked for an object.

    Attributes:
        with_image: ``ln P(yes) - ln P(no)``.
        without_image: The same for the question without its image; NaN where that is not asked.
    """

    with_image: float
    without_image: float


@dataclass
class Cost:
    """What asking has cost so far.

    Attributes:
        questions: Questions about an image.
        question_tokens: Tokens read for them: those behind the image.
        prefix_tokens: Tokens that images and what stands before them took, each read once.
        text_tokens: Tokens of the questions without an image; each is asked once per word.
        answer_tokens: Tokens of the answers read again for how likely they were.
    """

    questions: int = 0
    question_tokens: int = 0
    prefix_tokens: int = 0
    text_tokens: int = 0
    answer_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All tokens read."""
        return self.question_tokens + self.prefix_tokens + self.text_tokens + self.answer_tokens


class Looked(Protocol):
    """Images that a model can be asked about."""

    def ask(self, names: Sequence[Sequence[str]]) -> list[dict[str, Asked]]:
        """Ask for objects: those of each image."""

    def said(self, answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log probability of every token of the answers to the prompts that showed the images."""


class Questioner:
    """Asks the stock model, whatever patch is on it, for objects.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor, with a tokenizer and a chat template.
        question: What is asked, with ``{name}`` and, if wanted, ``{article}``.
        batch_size: Questions per forward.
        blind: Whether every question is also asked without its image.

    Attributes:
        cost: What asking has cost so far.

    Raises:
        UnsupportedFeatureError: The tokenizer has no single tokens for yes and no.
        VlmfixError: The processor has no chat template.
    """

    def __init__(
        self, model: object, processor: Any, question: str = QUESTION, batch_size: int = 32, *, blind: bool = True
    ) -> None:
        self.anatomy: Anatomy = analyse(model)
        self.processor = processor
        self.cost = Cost()
        self.batch_size = batch_size
        self.blind = blind
        self._question = question
        self.prompt = PromptBuilder(processor)
        self._words = need_yes_no_tokens(processor.tokenizer)
        self._without_image: dict[str, float] = {}
        self._tails: dict[str, list[int]] = {}

    @property
    def stock(self) -> dict[str, None]:
        """The argument that makes a call one of the stock model."""
        return {} if find_patch(self.anatomy.model) is None else {FORWARD_KWARG: None}

    def look(self, inputs: Mapping[str, Any], prefix: Prefix | None = None) -> Looked:
        """Read the images of a batch of prompts, each once.

        Args:
            inputs: The processor's output: left-padded prompts with an image each.
            prefix: The stock model's reading of them, if it has read them before.

        Raises:
            UnsupportedFeatureError: Questions cannot go on from one reading of an image in this model.
        """
        if prefix is None:
            prefix = shared_prefix(self.anatomy.model, inputs, stock=True)
            self.cost.prefix_tokens += int(prefix.attention_mask.sum())
        return _Shared(self, prefix, inputs)

    def look_at(self, images: Sequence[Any], prompt: str) -> Looked:
        """Read images, as the pictures of a prompt; one by one for each question where that cannot be shared.

        Args:
            images: Pictures that the processor takes.
            prompt: What the texts are answers to.
        """
        inputs = encode(self.processor, [self.prompt(prompt)] * len(images), images, self.anatomy.model)
        try:
            return self.look(inputs)
        except UnsupportedFeatureError:
            return _Whole(self, images, inputs)

    def without_image(self, names: Sequence[str]) -> dict[str, float]:
        """Ask for words in a prompt of text alone, each once: the answer depends on the word only."""
        new = [name for name in dict.fromkeys(names) if name not in self._without_image]
        for start in range(0, len(new), self.batch_size):
            some = new[start : start + self.batch_size]
            prompts = [self.prompt(self.asked(name), image=False) for name in some]
            inputs = encode(self.processor, prompts, [None] * len(prompts), self.anatomy.model)
            inputs = _padded([_tokens(inputs, row) for row in range(len(some))], inputs["input_ids"].device)
            self.cost.text_tokens += int(inputs["attention_mask"].sum())
            self._without_image.update(zip(some, self.odds(inputs), strict=True))
        return {name: self._without_image[name] for name in names}

    def odds(self, inputs: Mapping[str, Any]) -> list[float]:
        """Return ``ln P(yes) - ln P(no)`` of the first answer token of every prompt."""
        return self.odds_in(answer(self.anatomy.model, {**inputs, **self.stock}, logits=True).logits[0])

    def odds_in(self, logits: torch.Tensor) -> list[float]:
        """Return ``ln P(yes) - ln P(no)`` in logits ``[rows, vocab]``."""
        return [float(value) for value in self._words.log_odds(logits)]

    def asked(self, name: str) -> str:
        """Return the question for an object."""
        if name.split()[-1] in lexicon.ONLY_PLURAL and "{article} {name}" in self._question:
            return self._question.replace("{article} {name}", f"a pair of {name}")
        return self._question.format(article=lexicon.article(name), name=name)

    def tail(self, name: str) -> list[int]:
        """Return the tokens of a question's prompt behind its image.

        Raises:
            UnsupportedFeatureError: The processor writes its image otherwise than by the tokens that stand for it.
        """
        if name not in self._tails:
            ids = self.processor.tokenizer(self.prompt(self.asked(name)), add_special_tokens=False)["input_ids"]
            is_image = self.anatomy.is_image(torch.tensor(ids)).tolist()
            if not any(is_image):
                raise UnsupportedFeatureError(
                    f"{type(self.processor).__name__} writes its image into prompts in a way of its own, so that "
                    "questions cannot be put behind an image that was read before."
                )
            self._tails[name] = ids[len(ids) - is_image[::-1].index(True) :]
        return self._tails[name]

    def ask_pairs(self, names: Sequence[Sequence[str]], odds_of: Any) -> list[dict[str, Asked]]:
        """Ask for (image, name) pairs in batches.

        Args:
            names: Per image, the objects.
            odds_of: Returns the log odds of a list of pairs.
        """
        pairs = [(row, name) for row, each in enumerate(names) for name in dict.fromkeys(each)]
        blind = self.without_image([name for _, name in pairs]) if self.blind else {}
        found: list[dict[str, Asked]] = [{} for _ in names]
        for start in range(0, len(pairs), self.batch_size):
            some = pairs[start : start + self.batch_size]
            self.cost.questions += len(some)
            for (row, name), value in zip(some, odds_of(some), strict=True):
                found[row][name] = Asked(value, blind.get(name, math.nan))
        return found


@dataclass(frozen=True)
class _Shared:
    """Images that were read once."""

    questioner: Questioner
    prefix: Prefix
    inputs: Mapping[str, Any]

    def ask(self, names: Sequence[Sequence[str]]) -> list[dict[str, Asked]]:
        """Ask for objects: those of each image."""
        return self.questioner.ask_pairs(names, self._odds)

    def _odds(self, pairs: Sequence[tuple[int, str]]) -> list[float]:
        tails = [self.questioner.tail(name) for _, name in pairs]
        self.questioner.cost.question_tokens += sum(map(len, tails))
        return self.questioner.odds_in(self._behind([row for row, _ in pairs], tails, 1)[:, 0])

    def _behind(self, rows: Sequence[int], tails: Sequence[Sequence[int]], steps: int) -> torch.Tensor:
        """Read what comes behind the images, in one forward, and return the logits of the last columns.

        Args:
            rows: Which image each tail is about.
            tails: Tokens.
            steps: How many columns.

        Returns:
            fp32 ``[tails, steps, vocab]``.
        """
        prefix = self.prefix
        begun = [prefix.input_ids[row][prefix.attention_mask[row].bool()].tolist() for row in rows]
        whole = [[*ids, *tail] for ids, tail in zip(begun, tails, strict=True)]
        arguments = prefix.continued(_padded(whole, prefix.input_ids.device), rows)
        length = prefix.input_ids.shape[1]
        mask = arguments["attention_mask"]
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, length:]
        arguments["input_ids"] = arguments["input_ids"][:, length:]
        with torch.no_grad():
            return next_logits(self.questioner.anatomy.model, arguments, steps, use_cache=True)

    def said(self, answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log probability of every token of the answers to the prompts that showed the images."""
        found: list[list[float]] = []
        for start in range(0, len(answers), ROWS_TO_SCORE):
            rows = range(start, min(start + ROWS_TO_SCORE, len(answers)))
            found += self._said(rows, [answers[row] for row in rows])
        return found

    def _said(self, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        if not any(map(len, answers)):
            return [[] for _ in answers]
        before = [len(_tokens(self.prefix_inputs, row)) for row in rows]
        prompts = [_tokens(self.inputs, row)[length:] for row, length in zip(rows, before, strict=True)]
        # The last token of an answer predicts nothing that is asked for.
        tails = [[*prompt, *ids[:-1]] for prompt, ids in zip(prompts, answers, strict=True)]
        steps = max(map(len, answers))
        self.questioner.cost.answer_tokens += sum(map(len, tails))
        logits = self._behind(rows, tails, steps).log_softmax(-1)
        # Answers end in one column, so that shorter ones begin later.
        return [
            logits[at, steps - len(ids) :].gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0].tolist()
            for at, ids in enumerate(answers)
        ]

    @property
    def prefix_inputs(self) -> dict[str, torch.Tensor]:
        """The tokens of the prefix."""
        return {"input_ids": self.prefix.input_ids, "attention_mask": self.prefix.attention_mask}


@dataclass(frozen=True)
class _Whole:
    """Images that are read again for every question."""

    questioner: Questioner
    images: Sequence[Any]
    inputs: Mapping[str, Any]

    def ask(self, names: Sequence[Sequence[str]]) -> list[dict[str, Asked]]:
        """Ask for objects: those of each image."""
        return self.questioner.ask_pairs(names, self._odds)

    def _odds(self, pairs: Sequence[tuple[int, str]]) -> list[float]:
        asker = self.questioner
        prompts = [asker.prompt(asker.asked(name)) for _, name in pairs]
        inputs = encode(asker.processor, prompts, [self.images[row] for row, _ in pairs], asker.anatomy.model)
        asker.cost.question_tokens += int(inputs["attention_mask"].sum())
        return asker.odds(inputs)

    def said(self, answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log probability of every token of the answers to the prompts that showed the images."""
        asker = self.questioner
        given = [list(ids) or [0] for ids in answers]
        inputs = {**self.inputs, **asker.stock}
        asker.cost.answer_tokens += int(self.inputs["attention_mask"].sum()) + sum(map(len, answers))
        found = answer(asker.anatomy.model, inputs, answers=given, logits=True)
        probabilities = found.log_probs()
        return [row[: len(ids)].tolist() for row, ids in zip(probabilities, answers, strict=True)]


def _tokens(inputs: Mapping[str, Any], row: int) -> list[int]:
    """Return the tokens of one prompt, without padding."""
    ids, mask = inputs["input_ids"][row], inputs.get("attention_mask")
    kept: list[int] = (ids if mask is None else ids[mask[row].bool()]).tolist()
    return kept


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return token ids of different lengths as a left-padded batch."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
