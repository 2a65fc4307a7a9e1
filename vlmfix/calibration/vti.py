"""Directions for VTI (arXiv 2410.15778): from hallucinated to right captions, and from pictures to masked ones."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from vlmfix.calibration.session import Found, Session
from vlmfix.decoding.other_image import each_image, mean_image, replace_images
from vlmfix.engine.calls import parameter_names
from vlmfix.errors import DataError, MethodError
from vlmfix.methods.measured import Directions, checkpoint_name, plain
from vlmfix.methods.vti import VTI
from vlmfix.model.vision_tower import VisionLayer, find_vision_layers
from vlmfix.observe.prompts import encode
from vlmfix.observe.samples import CalibrationSample

logger = logging.getLogger("vlmfix")


LEARNED = ("directions",)


Pair = tuple[str, str]
"""A right caption, and a hallucinated one."""


def search(
    session: Session,
    samples: Sequence[CalibrationSample],
    method: VTI,
    *,
    pairs: Callable[[CalibrationSample], Pair] | None = None,
    swapped: float = 0.5,
    trials: int = 50,
    masked: float = 0.99,
    mask_seed: int = 0,
    vision_tokens: Literal["mean", "each"] = "mean",
    sign: Literal["released", "aligned"] = "released",
) -> Found:
    """Measure the directions of VTI.

    *Text*: per sample, the states of the last token behind a right caption minus those behind a hallucinated one, all
    layers in one long vector. *Vision*: per sample, the mean state of every token of the vision tower over ``trials``
    masked copies of the picture, minus its state for the picture. A direction is the mean of the samples' vectors plus
    their first principal component, a unit vector, as released.

    The released pairs of captions have no licence. These are made of the samples' objects (ours): the right caption
    lists them, and the hallucinated one has a share of them replaced by absent objects, which go together with the
    others most often in these samples. Costs two prefills a sample, and ``trials + 1`` passes of the vision tower.

    Args:
        session: The model.
        samples: Images with their objects.
        method: Parameters of VTI. With ``alpha_image`` 0, the vision tower is left out.
        pairs: Makes a right and a hallucinated caption for a sample, instead.
        swapped: The share of objects that are replaced, in (0, 1]; at least one is.
        trials: Masked copies of each picture.
        masked: Share of a picture's patches that take its mean colour in each of them, in (0, 1].
        mask_seed: Seed of the choice of patches.
        vision_tokens: ``"mean"``: all tokens share their mean. ``"each"``: a direction for every token, as released;
            its file is large, and it needs pictures of one size.
        sign: The sign of the principal component: ``"released"``: by its largest score, which has nothing to do with
            the purpose; ``"aligned"``: along the mean (ours).

    Raises:
        DataError: Fewer than two samples, or no objects to make captions of.
        MethodError: An option out of range.
        UnsupportedModelError: The vision tower is not known.
    """
    for name, share in (("swapped", swapped), ("masked", masked)):
        if not 0 < share <= 1:
            raise MethodError(f"{name} must lie between 0 and 1, got {share!r}.")
    if trials < 1:
        raise MethodError(f"trials must be at least 1, got {trials}.")
    if vision_tokens not in ("mean", "each") or sign not in ("released", "aligned"):
        raise MethodError("vision_tokens must be mean or each, and sign released or aligned.")
    if len(samples) < 2:
        raise DataError("vti takes the main direction of several samples, and there is one. Give two or more.")
    captions = [pairs(sample) for sample in samples] if pairs else made_pairs(samples, swapped)
    text = principal(_text_differences(session, samples, captions), sign)[1:]  # layer 0 is the embedding
    vision: Any = ()
    if method.alpha_image:
        differences = [
            _vision_difference(session, sample, trials, masked, mask_seed + number * trials)
            for number, sample in enumerate(samples)
        ]
        if vision_tokens == "mean":
            differences = [each.mean(1, keepdim=True) for each in differences]
        if len({each.shape for each in differences}) != 1:
            raise DataError("Pictures of several sizes have no tokens in common. Choose vision_tokens='mean'.")
        by_token = torch.stack(differences).unbind(2)
        vision = plain(torch.stack([principal(each, sign) for each in by_token], dim=1)[1:])
    directions = Directions(checkpoint_name(session.anatomy), plain(text), vision)
    lengths = {"length": text.norm(dim=-1, keepdim=True)}
    options = {
        **{"swapped": swapped, "trials": trials, "masked": masked, "mask_seed": mask_seed},
        **{"vision_tokens": vision_tokens, "sign": sign, "captions": captions[0]},
    }
    counts = {"pairs": len(samples), "vision_layers": len(vision)}
    layers = tuple(range(session.anatomy.num_layers))
    return Found(dataclasses.replace(method, directions=directions), counts, lengths, layers, options)


def principal(differences: torch.Tensor, sign: Literal["released", "aligned"] = "released") -> torch.Tensor:
    """Return the mean of ``[samples, ...]`` plus their first principal component, a unit vector over all the rest."""
    rows = differences.double().flatten(1)
    mean = rows.mean(0)
    left, _, right = torch.linalg.svd(rows - mean, full_matrices=False)
    scores, component = left[:, 0], right[0]
    along = component @ mean if sign == "aligned" else scores[scores.abs().argmax()]
    return (mean + torch.where(along < 0, -component, component)).reshape(differences.shape[1:])


def made_pairs(samples: Sequence[CalibrationSample], swapped: float) -> list[Pair]:
    """Return a right and a hallucinated caption of every sample, made of the objects of all.

    Raises:
        DataError: A sample does not say what is in its image, or there is no object that could be invented.
    """
    together: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        if not sample.objects:
            raise DataError(
                "vti learns from right and hallucinated captions, which are made of objects, and a sample names none. "
                "Write CalibrationSample(image, 'Describe the image.', objects={'dog', 'person'}), or pass pairs=..."
            )
        together.update((one, two) for one in sample.objects for two in sample.objects)
    names = sorted({one for one, _ in together})
    captions = []
    for sample in samples:
        there = sorted(sample.objects or ())
        kept = there[: len(there) - max(round(swapped * len(there)), 1)]
        absent = [name for name in names if sample.shows(name) is False]
        absent.sort(key=lambda name: -sum(together[name, each] for each in kept or there))
        invented = absent[: len(there) - len(kept)]
        if not invented:
            raise DataError("Every image shows every object, so that none can be invented. Give more various images.")
        captions.append((listed(there), listed([*kept, *invented])))
    return captions


def listed(names: Sequence[str]) -> str:
    """Return a caption that names objects."""
    named = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    *first, last = named
    return f"The image shows {', '.join(first)} and {last}." if first else f"The image shows {last}."


def _text_differences(session: Session, samples: Sequence[CalibrationSample], captions: Sequence[Pair]) -> torch.Tensor:
    """Return the last token's states behind right captions minus behind others, ``[samples, layers + 1, size]``."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in parameter_names(session.model) else {}
    found = []
    for start in range(0, len(samples), session.batch_size):
        batch, states = samples[start : start + session.batch_size], []
        for which in (0, 1):
            behind = [pair[which] for pair in captions[start : start + session.batch_size]]
            prompts = [session.prompt(sample.question) for sample in batch]
            texts = [prompt if prompt[-1:].isspace() else f"{prompt} " for prompt in prompts]
            texts = [text + caption for text, caption in zip(texts, behind, strict=True)]
            inputs = encode(session.processor, texts, [sample.load() for sample in batch], session.model)
            with session.acting():
                output = session.model(**inputs, **keep, use_cache=False, output_hidden_states=True)
            states.append(torch.stack([each[:, -1].double().cpu() for each in output.hidden_states], dim=1))
        found.append(states[0] - states[1])
        logger.info("vti: %d of %d pairs of captions", start + len(batch), len(samples))
    return torch.cat(found)


# The vision tower.


class _SeenEnough(Exception):
    """Ends a forward once the vision tower has run."""


def _vision_difference(
    session: Session, sample: CalibrationSample, trials: int, masked: float, seed: int
) -> torch.Tensor:
    """Return the mean states for masked copies of a picture minus those for it, ``[layers + 1, tokens, width]``."""
    tower, inputs = find_vision_layers(session.model), session.encode([sample])
    total: torch.Tensor | int = 0
    for trial in range(trials):
        mask = functools.partial(
            masked_image,
            patch=_patch_size(session),
            masked=masked,
            generator=torch.Generator().manual_seed(seed + trial),
        )

        def made(name: str, images: torch.Tensor, per_image: Sequence[int] | None, mask: Any = mask) -> torch.Tensor:
            return each_image(images, per_image, mask)

        total = total + _tower_states(session, tower, replace_images(inputs, made))
    return total / trials - _tower_states(session, tower, inputs)


def masked_image(image: torch.Tensor, patch: int, masked: float, generator: torch.Generator) -> torch.Tensor:
    """Return ``[channels, height, width]``, or patches ``[patches, size]``, with a share of them in the mean colour."""
    height, width = (-(-side // patch) for side in image.shape[1:]) if image.dim() == 3 else (len(image), 1)
    order = torch.randperm(height * width, generator=generator)
    is_masked = (order < round(masked * height * width)).view(height, width).to(image.device)
    if image.dim() == 3:
        is_masked = is_masked.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        is_masked = is_masked[: image.shape[1], : image.shape[2]]
    return torch.where(is_masked, mean_image(image), image)


def _patch_size(session: Session) -> int:
    size = getattr(getattr(session.model.config, "vision_config", None), "patch_size", None)
    return size if isinstance(size, int) else 14  # the released code's


def _tower_states(session: Session, tower: Sequence[VisionLayer], inputs: Any) -> torch.Tensor:
    """Return what enters the first layer of the tower and what leaves each, ``[layers + 1, tokens, width]``."""
    states: list[torch.Tensor] = []

    def enters(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def leaves(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)
        if module is tower[-1].layer:
            raise _SeenEnough

    with session.acting():
        handles = [tower[0].layer.register_forward_pre_hook(enters, with_kwargs=True)]
        handles += [each.layer.register_forward_hook(leaves) for each in tower]
        try:
            session.model(**inputs, use_cache=False)
        except _SeenEnough:
            pass
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack([each.reshape(-1, each.shape[-1]).double().cpu() for each in states])
