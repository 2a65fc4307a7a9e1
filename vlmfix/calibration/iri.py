"""A ranking of layers for IRI (arXiv 2511.05923): which blocks' outputs at the last token restore a "yes"."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from vlmfix.calibration.session import Found, Session
from vlmfix.errors import DataError
from vlmfix.methods.iri import IRI
from vlmfix.methods.measured import LayerRanking, checkpoint_name
from vlmfix.observe.samples import CalibrationSample
from vlmfix.observe.words import need_yes_no_tokens
from vlmfix.probes.causal_trace import causal_trace
from vlmfix.probes.corruption import Corruption, choose_sigma

logger = logging.getLogger("vlmfix")


LEARNED = ("ranking",)


def search(
    session: Session,
    samples: Sequence[CalibrationSample],
    method: IRI,
    *,
    corruption: Literal["noise", "mean"] = "noise",
    sigma: float | None = None,
    noise_seed: int = 0,
    floor: float = 0.05,
    rr_token: str = "last",
    rows: int = 32,
) -> Found:
    """Measure the recovery rates of all layers by causal tracing, see ``vlmfix.probes.causal_trace``.

    Questions whose right answer is yes are traced, the others left out: what is measured is how much of the probability
    of "yes" an object in the image brings back. Costs, per question, two prefills and two per layer, ``rows`` in a
    batch; and one per noise level tried.

    Args:
        session: The model.
        samples: Yes/no questions with their answers.
        method: Parameters of IRI.
        corruption: ``"noise"``, or ``"mean"``: the image's mean colour.
        sigma: Standard deviation of the noise on the normalised image. Default: the least that halves the mean
            probability of yes on these questions.
        noise_seed: Seed of the noise.
        floor: Questions that lose less probability are left out, and counted.
        rr_token: The group of tokens that is patched.
        rows: Most prompts per forward.

    Raises:
        DataError: No question with the answer yes, or none that loses enough.
        UnsupportedFeatureError: "yes" is not one token.
        MethodError: An option out of range.
    """
    session.need_answers(samples, "iri")
    asked = [sample for sample in samples if sample.answer]
    if not asked:
        raise DataError(
            f"iri traces how an object in the image brings back a yes, and none of {len(samples)} questions has that "
            "answer. Give questions about objects that are there."
        )
    answer = need_yes_no_tokens(session.tokenizer).yes

    def batches() -> Iterator[Any]:
        for number, (_, inputs) in enumerate(session.batches(asked)):
            logger.info("iri: question %d of %d", number * session.batch_size, len(asked))
            yield inputs

    if corruption == "noise" and sigma is None:
        sigma = choose_sigma(session.model, batches, answer, seed=noise_seed)
    broken = Corruption(corruption, 0.0 if sigma is None else sigma, noise_seed)
    traced = causal_trace(
        session.model, batches(), answer, corruption=broken, groups=[rr_token], rows=rows, floor=floor
    )
    kept = int(traced.is_kept.sum())
    if kept < len(asked):
        logger.info("iri: %d of %d questions lose less than %s", len(asked) - kept, len(asked), floor)
    rates = {"attention": traced.of("attention", rr_token), "mlp": traced.of("mlp", rr_token)}
    ranking = LayerRanking(
        model=checkpoint_name(session.anatomy),
        rr_attn=tuple(rates["attention"].tolist()),
        rr_mlp=tuple(rates["mlp"].tolist()),
        token=rr_token,
    )
    counts = {"traced": kept, "skipped": len(asked) - kept, "answered_no": len(samples) - len(asked)}
    tables = {
        "recovery_attention": traced.recovery[0],
        "recovery_mlp": traced.recovery[1],
        "ratio_of_means_attention": traced.ratio_of_means[0],
        "ratio_of_means_mlp": traced.ratio_of_means[1],
    }
    options = {
        "corruption": corruption,
        "sigma": sigma,
        "noise_seed": noise_seed,
        "floor": floor,
        "rr_token": rr_token,
        "answer_tokens": answer,
        "p_clean": float(traced.p_clean.mean()),
        "p_corrupted": float(traced.p_corrupted.mean()),
    }
    return Found(dataclasses.replace(method, ranking=ranking), counts, tables, traced.layers, options)
