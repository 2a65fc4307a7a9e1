"""Heads for AllPath (arXiv 2511.17254): a text score by logit lens, an image score by attention."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from vlmfix.calibration.logit_lens import LogitLens, StreamLog
from vlmfix.calibration.session import Contrast, Found, Session, ranked, scaled_count
from vlmfix.errors import DataError, MethodError
from vlmfix.methods.allpath import AllPath
from vlmfix.observe.samples import CalibrationSample
from vlmfix.observe.watch import AttentionLog, AttentionWatch
from vlmfix.observe.words import decode, find_word, need_yes_no_tokens, word_tokens

logger = logging.getLogger("vlmfix")


LEARNED = ("up_heads", "down_heads")


@dataclass
class Scores:
    """Records of both scores.

    Attributes:
        text: Safe against unsafe answers.
        image: Objects that are there against objects that are not.
        counts: What was left out.
    """

    text: Contrast = field(default_factory=Contrast)
    image: Contrast = field(default_factory=Contrast)
    counts: Counter[str] = field(default_factory=Counter)


def search(
    session: Session,
    samples: Sequence[CalibrationSample],
    method: AllPath,
    *,
    lens_norm: bool = False,
    xi: int | None = None,
    zeta: int | None = None,
) -> Found:
    """Find heads to scale down (worst text scores) and up (best text scores, best image scores).

    Text score: how much head (l, n) raises the log probability of safe tokens minus that of unsafe ones, when it is
    added to the residual stream that enters layer l and both are read off by the logit lens. Safe is the right answer
    of a yes/no question, or a token that begins the word of an object that is there. Image score: attention to the
    image where an object is there minus where it is not; in the rows of the object's name in the question, or in the
    row that predicts its first mention in a caption. Where a sample has the object's ``cells``, attention to these
    counts instead of that to the whole image (the paper always has them). Costs one prefill or caption per sample, and
    ``layers * heads`` lens readings per record.

    Args:
        session: The model.
        samples: Yes/no questions with the object asked for, or images with their objects, as ``method.answers`` says.
        method: Parameters of AllPath.
        lens_norm: Apply the final norm before the head of the lens. The release does not.
        xi: Heads from each end of the text score. Default: 20 of 1024 (captions 40), scaled to the model's number of
            heads (a heuristic).
        zeta: Heads from the top of the image score. Default: 10 (captions 50), scaled.

    Raises:
        DataError: The samples lack what the format needs, or a class of records is empty.
        UnsupportedFeatureError: Yes or no is not a single token, or the lens cannot be applied.
        MethodError: An option out of range, another format, or no function that finds objects in captions.
    """
    if method.answers == "mcq":
        raise MethodError("allpath: heads can be found for answers='yesno' and 'caption' only.")
    is_caption = method.answers == "caption"
    total = len(session.heads)
    xi = scaled_count(40 if is_caption else 20, total) if xi is None else xi
    zeta = scaled_count(50 if is_caption else 10, total) if zeta is None else zeta
    for name, value in (("xi", xi), ("zeta", zeta)):
        if not 1 <= value <= total:
            raise MethodError(f"{name} must be from 1 to {total}, the number of heads, got {value!r}.")
    lens = LogitLens(session.anatomy, use_norm=lens_norm)
    scores = Scores()
    for _ in _captions(session, samples, lens, scores) if is_caption else _questions(session, samples, lens, scores):
        logger.info("allpath: records %s (text), %s (image)", scores.text.counts, scores.image.counts)
    counts = {**scores.counts, **_counts(scores.text, "text", "safe", "unsafe")}
    counts |= _counts(scores.image, "image", "present", "absent")
    if not all((*scores.text.counts.values(), *scores.image.counts.values())):
        raise DataError(
            f"allpath needs records of objects that are there and of objects that are not; found {counts}. Give more "
            "samples, of both kinds, and check that the objects' names stand in the questions or captions."
        )
    text, image = scores.text.difference(), scores.image.difference()
    by_text, by_image = ranked(text, session.layers()), ranked(image, session.layers())
    up = tuple(dict.fromkeys((*by_text[:xi], *by_image[:zeta])))
    found = dataclasses.replace(method, up_heads=up, down_heads=tuple(reversed(by_text[-xi:])))
    options = {"answers": method.answers, "lens_norm": lens_norm, "xi": xi, "zeta": zeta}
    return Found(found, counts, {"text": text, "image": image}, session.layers(), options)


def _counts(records: Contrast, kind: str, positive: str, negative: str) -> dict[str, int]:
    return {
        f"{kind}_{positive}": records.counts[True],
        f"{kind}_{negative}": records.counts[False],
        f"{kind}_dropped": records.dropped,
    }


def _questions(
    session: Session, samples: Sequence[CalibrationSample], lens: LogitLens, scores: Scores
) -> Iterator[None]:
    """Record yes/no questions, batch by batch."""
    session.need_answers(samples, "allpath with answers='yesno'")
    yes, no = need_yes_no_tokens(session.tokenizer)
    for batch, inputs in session.batches(samples):
        log, streams = AttentionLog([sample.cells for sample in batch]), StreamLog(session.anatomy)
        with streams.watch():
            session.next_logits(inputs, AttentionWatch(log.see))
        for number, sample in enumerate(batch):
            right, wrong = (yes, no) if sample.answer else (no, yes)
            gains = lens.gains(streams, 0, number, (right, wrong))
            scores.text.add(gains[0], positive=True)
            scores.text.add(gains[1], positive=False)
            _record_question(session, sample, inputs["input_ids"][number], number, log, scores)
        yield


def _record_question(
    session: Session, sample: CalibrationSample, ids: torch.Tensor, number: int, log: AttentionLog, scores: Scores
) -> None:
    """Record where the rows of the object's name in a question look."""
    is_image = session.anatomy.is_image(ids)
    behind = int(is_image.nonzero().max()) + 1
    text = ids[behind:].tolist()
    names = sorted({*(sample.objects or ()), *(sample.absent or ())}, key=len, reverse=True)
    name = next((each for each in names if find_word(decode(session.tokenizer, text), each)), None)
    if name is None:
        scores.counts["object_not_in_question"] += 1
        return
    if sample.shows(name) is not sample.answer:
        scores.counts["answer_contradicts_objects"] += 1
        return
    region = name if sample.answer else None
    rows = [behind + token for token in word_tokens(session.tokenizer, text, name)]
    record = torch.stack([log.on_object(0, row, number, region) for row in rows]).mean(0)
    scores.image.add(record, positive=bool(sample.answer))


def _captions(
    session: Session, samples: Sequence[CalibrationSample], lens: LogitLens, scores: Scores
) -> Iterator[None]:
    """Record captions, batch by batch."""
    session.need_objects(samples, "allpath with answers='caption'")
    for batch, inputs in session.batches(samples):
        log, streams = AttentionLog([sample.cells for sample in batch]), StreamLog(session.anatomy)
        with streams.watch():
            rows = session.captions(inputs, AttentionWatch(log.see))
        for number, (sample, ids) in enumerate(zip(batch, rows, strict=True)):
            seen: set[str] = set()
            for mention, is_real in session.objects_in(sample, ids, scores.counts):
                scores.text.add(lens.gains(streams, mention.token, number, ([ids[mention.token]],))[0], is_real)
                if mention.name not in seen:
                    seen.add(mention.name)
                    row = 0 if mention.token else inputs["input_ids"].shape[1] - 1
                    scores.image.add(
                        log.on_object(mention.token, row, number, mention.name if is_real else None), is_real
                    )
        yield
