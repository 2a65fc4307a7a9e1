"""``vlmfix.calibrate``: from a few samples to a recipe."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmfix.calibration import act, adaiat, adhh, allpath, iri, maskcd, vaf, var, verify, vti
from vlmfix.calibration.session import Found, Session, open_session
from vlmfix.errors import MethodError
from vlmfix.methods.measured import Calibration, plain
from vlmfix.methods.registry import make_method
from vlmfix.observe.samples import CalibrationSample, Mentions, choose

logger = logging.getLogger("vlmfix")


SEARCHES = {
    module.__name__.rpartition(".")[2]: module
    for module in (act, adaiat, adhh, allpath, iri, maskcd, vaf, var, verify, vti)
}
"""By method: the module whose ``search`` finds the parameters that its ``LEARNED`` names."""


@torch.no_grad()
def calibrate(
    model: object,
    method: str,
    data: Iterable[CalibrationSample],
    *,
    processor: Any = None,
    prompt: Callable[[str], str] | None = None,
    mentions: Mentions | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    **options: Any,
) -> Calibration:
    """Learn from a few samples what a method needs to know about a model.

    ========= =============================== =======================================================
    method    samples                         learned
    ========= =============================== =======================================================
    act       yes/no questions with answers   heads whose calibration alone favours the right answer
    adhh      images with their objects       heads that favour hallucinated objects
    adaiat    images with their objects       attention to generated text at real and at other objects
    allpath   either, as ``answers`` says     heads to scale up and down
    iri       yes/no questions with answers   per layer, how much of a yes its blocks restore
    maskcd    any                             heads that look at the image
    vaf       any                             per layer, the half of the heads that look at the image
    var       any                             hidden dimensions that mark sinks
    verify    images, at best with objects    what each kind of evidence says about a word
    vti       images with their objects       directions from hallucinated to right captions, and in the vision tower
    ========= =============================== =======================================================

    The model may be patched or not: the stock model is looked at, and left as it was found. The same samples and seed
    give the same result on the same machine. Use images that no evaluation uses.

    Args:
        model: A Hugging Face vision-language model, or a pipeline.
        method: One of the above.
        data: The samples.
        processor: The model's processor. Default: the pipeline's, or the one saved with the model.
        prompt: Makes the prompt's text from a question. Default: the processor's chat template; without one, the
            question must be the whole prompt, with the image placeholder.
        mentions: For captions: finds the objects a caption names, as (word as it stands in the caption, name) pairs in
            its order. Names are compared with those of the samples.
        limit: Use this many of the samples, drawn by ``seed``.
        seed: Of that choice, the only random one.
        batch_size: Samples per forward.
        max_new_tokens: Limit of captions.
        **options: Options of the search (act: ``share``; adhh: ``count``, ``variants``; adaiat: ``min_generated``;
            allpath: ``lens_norm``, ``xi``, ``zeta``; iri: ``corruption``, ``sigma``, ``floor``, ``rows``; maskcd:
            ``threshold``; var: ``sink_threshold``, ``sink_share``; verify: ``labels``; vti: ``pairs``, ``swapped``,
            ``trials``, ``masked``, ``mask_seed``, ``vision_tokens``,
            ``sign``) and parameters of the method (``beta=0.5``).

    Returns:
        The method and how it came about. ``vlmfix.patch(model, calibration)`` takes it as it is.

    Raises:
        MethodError: Another method, an unknown option, or one out of range.
        DataError: The samples do not hold what the method learns from.
        UnsupportedModelError: The model cannot be patched.
        UnsupportedFeatureError: The model lacks what the search looks at.
    """
    search = plan(method, options)
    samples = choose(data, limit, seed)
    with open_session(model, processor, prompt, mentions, batch_size, max_new_tokens) as session:
        found = search(session, samples)
        calibration = Calibration(found.method, _provenance(session, samples, found, seed))
    logger.info("%s: %r from %s", method, calibration.method, found.counts)
    return calibration


def plan(method: str, options: Mapping[str, Any]) -> Callable[[Session, Sequence[CalibrationSample]], Found]:
    """Return the search of a method with its options, checked before anything is loaded.

    Raises:
        MethodError: The method learns nothing, or an option is unknown.
    """
    if method not in SEARCHES:
        raise MethodError(f"{method!r} learns nothing from data. Calibrate one of: {', '.join(SEARCHES)}.")
    search = SEARCHES[method].search
    given = [name for name in SEARCHES[method].LEARNED if name in options]
    if given:
        raise MethodError(
            f"{given[0]} of {method} is what calibrate finds. To set it: vlmfix.patch(model, {method!r}, ...)."
        )
    of_search = [p.name for p in inspect.signature(search).parameters.values() if p.kind is p.KEYWORD_ONLY]
    base = make_method(method, {name: value for name, value in options.items() if name not in of_search})
    return partial(search, method=base, **{name: options[name] for name in of_search if name in options})


def _provenance(session: Session, samples: list[CalibrationSample], found: Found, seed: int) -> dict[str, Any]:
    config, anatomy = session.model.config, session.anatomy
    name = str(config._name_or_path)
    result = {
        "method": found.method.name,
        "model": {
            "name": Path(name).name if Path(name).is_dir() else name,
            "revision": getattr(config, "_commit_hash", None),
            "class": type(session.model).__name__,
            "num_layers": anatomy.num_layers,
            "num_heads": anatomy.num_heads,
            "hidden_size": anatomy.hidden_size,
            "vocab_size": anatomy.text_config.vocab_size,
            "dtype": str(session.model.dtype).removeprefix("torch."),
        },
        "prompt": session.prompt(samples[0].question),
        "max_new_tokens": session.max_new_tokens,
        "seed": seed,
        "num_samples": len(samples),
        "sample_ids": [index if each.image_id is None else each.image_id for index, each in enumerate(samples)],
        "counts": found.counts,
        "options": found.options,
        "versions": {package: importlib.metadata.version(package) for package in ("vlmfix", "torch", "transformers")},
        "layers": found.layers,
        "scores": found.scores,
    }
    plained: dict[str, Any] = plain(result)
    return plained
