"""Weights for self-verification: how much each kind of evidence says about a word, by captions of known images."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from vlmfix.calibration.session import Found, Session
from vlmfix.errors import DataError
from vlmfix.observe.samples import CalibrationSample
from vlmfix.observe.words import decode
from vlmfix.verification.ask import Questioner
from vlmfix.verification.judge import first_places, odds_of, probabilities
from vlmfix.verification.verify import Verify

logger = logging.getLogger("vlmfix")

LEARNED = ("asked_weight", "said_weight", "bias")

LEAST = 8
"""True and false words that a fit needs."""

Row = tuple[float, float]
"""Evidence for a word: log odds when asked, log odds of having said it."""


def search(session: Session, samples: Sequence[CalibrationSample], method: Verify, *, labels: bool = True) -> Found:
    """Fit the log odds that a word of the model's own captions is true.

    With labels, by logistic regression on both kinds of evidence. Without, from the model's own answers alone: words
    that it used for other images, asked for in this one, stand for false ones, and its own words are a mixture of these
    with true ones. The share of false words is taken from how often it denies the one and the other; where a word is as
    likely false as true is read off a logistic fit of the one against the other. Words for other images are easier to
    deny than invented ones, so that this is a rougher guide than labels.

    Costs a caption, a reading of the image and a question per word, per sample; without labels, twice the questions.

    Args:
        session: The stock model.
        samples: Images to caption, with labels all their objects.
        method: Its question is asked.
        labels: Whether the samples' objects are used.

    Raises:
        DataError: Too few words of a kind, or nothing can be told from the answers.
        MethodError: Objects cannot be found in captions.
    """
    if labels:
        session.need_objects(samples, "verify")
    questioner = Questioner(session.model, session.processor, method.question, method.batch_size)
    counts: Counter[str] = Counter()
    true: list[Row] = []
    false: list[Row] = []
    own: list[float] = []
    other: list[float] = []
    vocabulary: list[str] = []
    rng = random.Random(0)
    for batch, inputs in session.batches(samples):
        ids = session.captions(inputs)
        names = [first_places(decode(session.tokenizer, each)) for each in ids]
        vocabulary += [name for each in names for name in each]
        drawn = [[] if labels else _others(vocabulary, each, rng) for each in names]
        looked = questioner.look(inputs)
        asked = looked.ask([[*each, *more] for each, more in zip(names, drawn, strict=True)])
        said = looked.said(ids)
        for sample, tokens, each, more, answers, logs in zip(batch, ids, names, drawn, asked, said, strict=True):
            counts["captions"] += 1
            other += [answers[name].with_image for name in more]
            evidence = probabilities(session.tokenizer, tokens, each, logs)
            for name in each:
                own.append(answers[name].with_image)
                shown = _shown(session, sample, name) if labels else None
                if shown is not None:
                    (true if shown else false).append((answers[name].with_image, odds_of(evidence[name])))
        logger.info("verify: %d of %d captions", counts["captions"], len(samples))
    counts.update(true=len(true), false=len(false), other=len(other), words=len(own))
    weights = _from_labels(true, false) if labels else _from_answers(own, other)
    found: dict[str, Any] = dict(zip(LEARNED, (round(weight, 4) for weight in weights), strict=True))
    scores = {"true": torch.tensor(true), "false": torch.tensor(false)} if labels else {}
    options = {"labels": labels, "cost_tokens": questioner.cost.tokens}
    return Found(dataclasses.replace(method, **found), dict(counts), scores, (), options)


def _others(vocabulary: Sequence[str], own: dict[str, int], rng: random.Random) -> list[str]:
    """Draw as many words of other captions as a caption has, the commoner the more often."""
    rest = [name for name in vocabulary if name not in own]
    return list(dict.fromkeys(rng.choices(rest, k=len(own)))) if rest else []


def _shown(session: Session, sample: CalibrationSample, name: str) -> bool | None:
    """Whether the image shows what a word names; ``None`` for a word that the labels do not speak of."""
    assert session.mentions is not None
    named = {each for _, each in session.mentions(name)}
    shown = {sample.shows(each) for each in named}
    return None if not named or None in shown else True in shown


def _from_labels(true: Sequence[Row], false: Sequence[Row]) -> tuple[float, float, float]:
    if min(len(true), len(false)) < LEAST:
        raise DataError(
            f"verify learns from true and false words, at least {LEAST} of each, and the captions have {len(true)} and "
            f"{len(false)}. Give more images (--limit), or let the model's own answers do: --set labels=false."
        )
    asked, said, bias = fit(true, false)
    if said < 0 or asked < 0:  # evidence that speaks against itself is noise
        asked, bias = fit([row[:1] for row in true], [row[:1] for row in false])
        said = 0.0
    if asked <= 0:
        raise DataError("Words that the model denies are no more often false than others: it cannot be asked.")
    return asked, said, bias


def _from_answers(own: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    if min(len(own), len(other)) < LEAST:
        raise DataError(f"verify needs at least {LEAST} words of captions, and there are {len(own)}. Give more images.")
    slope, intercept = fit([(each,) for each in own], [(each,) for each in other])
    share = false_share(own, other)
    if slope <= 0 or share <= 0:
        raise DataError(
            "The model says yes to words for other images as readily as to its own, so that its answers tell nothing. "
            "Calibrate with images whose objects are known."
        )
    # P(false | asked) = share f_other / f_own = 1 / 2
    even = (math.log(2 * share) - intercept + math.log(len(own) / len(other))) / slope
    return 1.0, 0.0, -even


def false_share(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the share of own words that are false, if the model denies these as often as words for other images.

    It denies some that are true, so that this is rather more than there are.
    """
    denied = [sum(each < 0 for each in words) / len(words) for words in (own, other)]
    return min(1.0, denied[0] / denied[1]) if denied[1] else 0.0


def fit(true: Sequence[Sequence[float]], false: Sequence[Sequence[float]], ridge: float = 1e-3) -> list[float]:
    """Fit log odds by logistic regression, in Newton's steps.

    Args:
        true: Rows of features.
        false: The same of the other class.
        ridge: A little of the squared weights is added, so that classes that can be told apart fully give finite ones.

    Returns:
        A weight per feature, and the intercept.
    """
    rows = torch.tensor([[*row, 1.0] for row in (*true, *false)], dtype=torch.float64)
    labels = torch.tensor([1.0] * len(true) + [0.0] * len(false), dtype=torch.float64)
    weights = torch.zeros(rows.shape[1], dtype=torch.float64)
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    for _ in range(50):
        odds = (rows @ weights).sigmoid()
        gradient = rows.T @ (odds - labels) + ridge * weights
        curvature = (rows * (odds * (1 - odds))[:, None]).T @ rows + ridge * eye
        weights = weights - torch.linalg.solve(curvature, gradient)
    return [float(each) for each in weights]
