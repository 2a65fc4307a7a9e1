"""Causal tracing of what the image adds to an answer (FCCT: Causal Tracing of Object Representations, 2511.05923)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.errors import DataError, MethodError
from vlmfix.methods.selection import resolve_layers
from vlmfix.model.anatomy import Anatomy
from vlmfix.observe.ask import look_at
from vlmfix.observe.words import prompt_tokens
from vlmfix.probes.component_runs import COMPONENTS, Component, Tracer
from vlmfix.probes.corruption import Corruption, choose_sigma
from vlmfix.probes.result import ProbeResult, new_axis

IMAGE_GROUPS = ("image_before", "image_object", "image_after")


TEXT_GROUPS = ("text_before", "text_object", "text_after")


GROUPS = (*IMAGE_GROUPS, *TEXT_GROUPS, "last", "all")
"""Image tokens before, on and after an object; text before the word for it, the word, text after it; the prompt's last
token. The seven are disjoint and cover all tokens but padding; ``"all"`` is their union."""


@dataclass(frozen=True)
class ObjectPlace:
    """Where an object is in a sample.

    Attributes:
        cells: Which of the sample's image tokens show it (0-based, in the order of the prompt). ``None``: all.
        word: Which of the sample's tokens spell it (0-based, padding left out). Empty: it is not named, and all text
            comes before it.
    """

    cells: Sequence[int] | None = None
    word: Sequence[int] = ()


def token_groups(
    anatomy: Anatomy, inputs: Mapping[str, Any], places: Sequence[ObjectPlace] | None = None
) -> dict[str, torch.Tensor]:
    """Sort the tokens of a batch of prompts into ``GROUPS``.

    Image tokens behind the object's first one that do not show it come after it.

    Args:
        anatomy: The model.
        inputs: The processor's output.
        places: Per sample. Default: the whole image, and no word.

    Returns:
        Bool ``[batch, length]`` by name.

    Raises:
        MethodError: Places that do not fit the batch.
    """
    valid, image, last, _ = prompt_tokens(anatomy, inputs)
    places = [ObjectPlace()] * len(valid) if places is None else places
    if len(places) != len(valid):
        raise MethodError(f"places must hold one for each of {len(valid)} samples, got {len(places)}.")
    shown, said = torch.zeros_like(image), torch.zeros_like(image)
    for sample, place in enumerate(places):
        pictured, written = image[sample].nonzero()[:, 0], valid[sample].nonzero()[:, 0]
        shown[sample, _chosen(pictured, place.cells, f"cells of sample {sample}", "image tokens")] = True
        said[sample, _chosen(written, place.word, f"word of sample {sample}", "tokens")] = True
    if bool((said & image).any()):
        raise MethodError("The word for an object cannot be an image token. Count the tokens of the whole prompt.")
    picture, text, said = image & ~last, valid & ~image & ~last, said & ~last
    found = {
        "image_before": picture & ~shown & (shown.cumsum(1) == 0),
        "image_object": picture & shown,
        "image_after": picture & ~shown & (shown.cumsum(1) > 0),
        "text_before": text & ~said & (said.cumsum(1) == 0),
        "text_object": said,
        "text_after": text & ~said & (said.cumsum(1) > 0),
        "last": last,
        "all": valid,
    }
    return {name: found[name] for name in GROUPS}


def _chosen(positions: torch.Tensor, chosen: Sequence[int] | None, what: str, among: str) -> torch.Tensor:
    if chosen is None:
        return positions
    if any(not 0 <= each < len(positions) for each in chosen):
        raise MethodError(f"The {what} must be from 0 to {len(positions) - 1}, its {among}; got {list(chosen)}.")
    return positions[torch.tensor(list(chosen), dtype=torch.int64, device=positions.device)]


@dataclass(frozen=True, eq=False)
class CausalTrace(ProbeResult):
    """Which share of an answer comes back when one component's clean output is put into a run on corrupted images.

    ``RR = (P_patched - P_corrupted) / (P_clean - P_corrupted)``: 1 full recovery, 0 none; it may leave [0, 1].

    Attributes:
        components: Of ``"attention"`` and ``"mlp"`` (what the blocks add to the residual stream) and ``"hidden"`` (what
            leaves the layer).
        groups: Groups of tokens that were patched, see ``GROUPS``.
        recovery: fp64 ``[components, layers, groups]``: mean over samples of RR.
        ratio_of_means: The same shape: mean recovered probability over mean lost probability; steadier where little
            is lost.
        p_clean: fp64 ``[samples]``: probability of the answer on the image.
        p_corrupted: The same on the corrupted image.
        p_patched: fp64 ``[samples, components, layers, groups]``: the same with one component patched.
        is_kept: Bool ``[samples]``: the samples that count: those that lose at least ``floor``.
        floor: See there.
        corruption: How images were corrupted.
        answer: Token ids whose probabilities were added up.
        model: Name or path of the checkpoint.
        num_layers: Its depth.
        ids: Names of the samples.
    """

    components: tuple[Component, ...]
    groups: tuple[str, ...]
    recovery: torch.Tensor
    ratio_of_means: torch.Tensor
    p_clean: torch.Tensor
    p_corrupted: torch.Tensor
    p_patched: torch.Tensor
    is_kept: torch.Tensor
    floor: float
    corruption: Corruption
    answer: tuple[int, ...]
    model: str
    num_layers: int
    ids: tuple[int | str, ...]

    def of(self, component: Component, group: str = "last") -> torch.Tensor:
        """Return the recovery rates of a component at a group of tokens, ``[layers]``."""
        return self.recovery[self.components.index(component), :, self.groups.index(group)]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        parts = {name: getattr(self.corruption, name) for name in ("kind", "sigma", "seed")}
        return super().to_dict() | {"corruption": parts, "num_skipped": int((~self.is_kept).sum())}

    def plot(
        self, ax: Any = None, *, component: Component | None = None, group: str | None = None, **options: Any
    ) -> Any:
        """Draw recovery rates: over the layers for one group of tokens, else of one component as a map of both."""
        title = f"causal tracing, {int(self.is_kept.sum())} of {len(self.is_kept)} samples"
        if group is None and len(self.groups) > 1:
            at = 0 if component is None else self.components.index(component)
            title = f"{title}\n{self.components[at]}"
            ax = self._map(ax, self.recovery[at], xlabel="tokens", label="recovery rate", title=title)
            ax.set_xticks(range(len(self.groups)), [group.replace("_", "\n") for group in self.groups])
            return ax
        ax, group = new_axis(ax), group or self.groups[0]
        for name in self.components:
            if component in (None, name):
                ax.plot(self.layers, self.of(name, group).tolist(), marker="o", markersize=3, label=name)
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        ax.locator_params(axis="x", integer=True)
        ax.legend()
        return self._labelled(ax, "layer", "recovery rate", f"{title}\ntokens: {group}")


@torch.no_grad()
def causal_trace(
    model: object,
    inputs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    answer: Sequence[int],
    *,
    corruption: Corruption | None = None,
    components: Sequence[Component] = ("attention", "mlp"),
    groups: Sequence[str] = ("last",),
    places: Sequence[ObjectPlace] | None = None,
    layers: Sequence[int] | str | None = None,
    rows: int = 32,
    floor: float = 0.05,
    ids: Sequence[int | str] | None = None,
) -> CausalTrace:
    """Trace which components carry what the image says, by patching them into runs on corrupted images.

    Per batch: one clean forward that keeps what the components give, one on the corrupted images, and for each
    component, layer and group of tokens one in which these tokens of that component are the clean ones; several of them
    run as one batch whose rows differ only in what is patched. Prompts only, nothing is decoded. The stock model is
    looked at, also in a patched one, and left as it was.

    Args:
        model: A Hugging Face vision-language model.
        inputs: The processor's output for left-padded prompts that ask for one object each, or several such batches.
        answer: Token ids of the right first answer token; their probabilities are added up (``"Yes"`` in its casings).
        corruption: How images are corrupted. Default: by the least noise of ``SIGMAS`` that halves the answer's mean
            probability.
        components: Which of ``"attention"``, ``"mlp"``, ``"hidden"``.
        groups: Which of ``GROUPS``.
        places: Per sample, where its object is in image and text. Default: the whole image, and no word.
        layers: Decoder layers, see ``LayerSpec``. Default: all.
        rows: Most prompts per forward.
        floor: Samples whose answer loses less probability by the corruption are left out, and counted.
        ids: Names of the samples. Default: their numbers.

    Raises:
        DataError: No sample is left, or there is none.
        MethodError: An unknown component or group, places that do not fit, or a number out of range.
        UnsupportedFeatureError: See ``vlmfix.probes``; or no images among the inputs.
        UnsupportedModelError: The decoder layers do not add two separate outputs to one residual stream.
    """
    _check(answer, components, groups, rows, floor)
    batches = [inputs] if isinstance(inputs, Mapping) else inputs
    if corruption is None:
        batches = list(batches)
        corruption = Corruption(sigma=choose_sigma(model, lambda: batches, answer))
    found: list[torch.Tensor] = []
    clean: list[torch.Tensor] = []
    corrupted: list[torch.Tensor] = []
    tracer: Tracer | None = None
    for batch in batches:
        anatomy = look_at(model, "causal_trace", batch).anatomy
        if tracer is None:
            depth = anatomy.num_layers
            wanted = tuple(range(depth)) if layers is None else resolve_layers(layers, depth, "layers")
            tracer = Tracer(anatomy, tuple(answer), tuple(components), wanted)
        size = len(batch["input_ids"])
        done = sum(map(len, clean))
        here = None if places is None else places[done : done + size]
        masks = token_groups(anatomy, batch, here)
        chosen = {name: masks[name] for name in groups}
        start = int(torch.stack(list(chosen.values())).flatten(0, 1).any(0).int().argmax())
        p_clean, states = tracer.record(batch, start)
        broken = corruption(batch)
        p_corrupted = tracer.probability(broken)
        targets = list(itertools.product(components, wanted, groups))
        p_patched = tracer.patched(broken, states, chosen, targets, max(1, rows // size))
        shape = (len(components), len(wanted), len(groups), size)
        found.append(p_patched.view(shape).permute(3, 0, 1, 2))
        clean.append(p_clean)
        corrupted.append(p_corrupted)
    if tracer is None:
        raise DataError("No prompts to trace. Pass the processor's output for prompts with an image.")
    before, after, patched = torch.cat(clean), torch.cat(corrupted), torch.cat(found)
    recovery, ratio, is_kept = recovery_rates(before, after, patched, floor)
    if not is_kept.any():
        raise DataError(
            f"In none of {len(before)} samples does the corruption take {floor} off the answer's probability (mean "
            f"{before.mean():.3f} on the image, {after.mean():.3f} corrupted). Use stronger noise (sigma), a lower "
            "floor, or prompts that the model answers rightly."
        )
    return CausalTrace(
        layers=wanted,
        patch=None,
        components=tuple(components),
        groups=tuple(groups),
        recovery=recovery,
        ratio_of_means=ratio,
        p_clean=before,
        p_corrupted=after,
        p_patched=patched,
        is_kept=is_kept,
        floor=floor,
        corruption=corruption,
        answer=tuple(answer),
        model=str(anatomy.model.config._name_or_path),
        num_layers=anatomy.num_layers,
        ids=tuple(range(len(before)) if ids is None else ids),
    )


def recovery_rates(
    clean: torch.Tensor, corrupted: torch.Tensor, patched: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Average recovery rates over the samples that lose enough.

    Args:
        clean: ``[samples]``, probabilities of the answer.
        corrupted: The same.
        patched: ``[samples, ...]``.
        floor: Least loss.

    Returns:
        The mean of ratios ``[...]``, the ratio of means ``[...]``, and which samples counted, bool ``[samples]``.
    """
    lost = clean - corrupted
    is_kept = lost >= max(floor, torch.finfo(lost.dtype).tiny)
    per_sample = (1,) * (patched.dim() - 1)
    gained = (patched - corrupted.view(-1, *per_sample))[is_kept]
    lost = lost[is_kept].view(-1, *per_sample)
    return (gained / lost).mean(0), gained.mean(0) / lost.mean(0), is_kept


def _check(
    answer: Sequence[int], components: Sequence[Component], groups: Sequence[str], rows: int, floor: float
) -> None:
    for name, given, known in (("components", components, COMPONENTS), ("groups", groups, GROUPS)):
        wrong = [each for each in given if each not in known]
        if not given or wrong or len(set(given)) < len(given):
            raise MethodError(f"{name} must be different ones of {', '.join(known)}; got {tuple(given)}.")
    if not answer:
        raise MethodError("answer must hold the token ids of the right answer, got none.")
    if rows < 1 or floor < 0:
        raise MethodError(f"rows must be at least 1 and floor at least 0, got {rows} and {floor}.")
