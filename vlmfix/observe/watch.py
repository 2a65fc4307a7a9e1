"""Looking into a model while it answers: attention rows, residual streams and head slices, and heads taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from vlmfix.errors import DataError, UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.views import Forward, Layer, PromptRows
from vlmfix.model.anatomy import OUTPUT_PROJECTIONS, Anatomy, AttentionKind

Head = tuple[int, int]


@dataclass(frozen=True)
class HeadAblation(Method):
    """Set one head's output to 0, another one in each sample; meant for single decode steps.

    The heads do not count when two ablations are compared, so that a cache filled without any
    can be continued with each.

    Attributes:
        targets: One (layer, head) pair per sample, or ``None`` for a sample that is left alone.
    """

    name: ClassVar[str] = "head_ablation"
    edits_heads: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    targets: tuple[Head | None, ...] = field(default=(), compare=False)

    @property
    def prompt_rows(self) -> PromptRows:
        """None."""
        return "none"

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Zero slices of ``[batch, 1, num_heads, head_dim]``."""
        at = layer.site.layer_idx
        here = [(row, target[1]) for row, target in enumerate(self.targets) if target is not None and target[0] == at]
        if not here:
            return head_outputs
        edited = head_outputs.clone()
        for row, head in here:
            edited[row, :, head] = 0
        return edited


@dataclass(frozen=True)
class RowWatch(Method):
    """Show attention weights behind the image, and those of generated tokens, to a function; edit nothing.

    While decoding, softmax is written out for the rows it shows, so a step equals the stock model's up to rounding.

    Attributes:
        show: Called with what ``Method.observe`` gets.
    """

    name: ClassVar[str] = "row_watch"
    edits_weights: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    show: Callable[[torch.Tensor, torch.Tensor, Layer], None] = field(compare=False, repr=False)

    @property
    def prompt_rows(self) -> PromptRows:
        """None."""
        return "none"

    @property
    def observed_rows(self) -> PromptRows:
        """Those behind the last image token."""
        return "text"

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Show them."""
        self.show(attn_weights, allowed, layer)

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Edit nothing."""
        return attn_weights, torch.zeros(attn_weights.shape[:3], dtype=torch.bool, device=attn_weights.device)


@dataclass
class Step:
    """One forward, as ``AttentionLog`` saw it. Tensors are fp32, on the CPU.

    Attributes:
        start: First row shown, relative to the forward.
        regions: Per layer, mass on the image and on each region: ``[batch, num_heads, rows, 1 + regions]``.
        generated: Per layer, mass on generated tokens: ``[batch, num_heads, rows]``.
        num_generated: Per layer, how many of those each row sees: ``[batch, 1 or num_heads, rows]``.
    """

    start: int
    regions: dict[int, torch.Tensor] = field(default_factory=dict)
    generated: dict[int, torch.Tensor] = field(default_factory=dict)
    num_generated: dict[int, torch.Tensor] = field(default_factory=dict)


class AttentionLog:
    """What the rows of a batch look at, forward by forward: the prompt, then each decode step.

    Args:
        cells: Per sample, image tokens (0-based) of named objects; their masses follow the image's in ``regions``, in
            the order of ``names``.
    """

    def __init__(self, cells: Sequence[Mapping[str, Sequence[int]] | None] = ()) -> None:
        self.steps: list[Step] = []
        self.names = [list(each or {}) for each in cells]
        self._cells = cells
        self._run: Forward | None = None
        self._regions: torch.Tensor | None = None

    def method(self) -> RowWatch:
        """Return the method that fills the log."""
        return RowWatch(self.see)

    def mass(self, step: int, row: int, sample: int, name: str | None = None) -> torch.Tensor:
        """Return the mass on an object's cells, or on the image if it has none: ``[layers, num_heads]``.

        Args:
            step: Which forward.
            row: Which of its rows.
            sample: Which sample of the batch.
            name: The object.
        """
        seen = self.steps[step]
        region = 1 + self.names[sample].index(name) if self.names and name in self.names[sample] else 0
        return torch.stack([seen.regions[at][sample, :, row - seen.start, region] for at in sorted(seen.regions)])

    def generated(self, step: int, sample: int, kind: str) -> torch.Tensor:
        """Return the mass on generated tokens in the last row of a step, or its mean per token.

        Args:
            step: Which forward.
            sample: Which sample of the batch.
            kind: ``"share"`` or ``"mean"``.

        Returns:
            ``[layers, num_heads]``.
        """
        seen = self.steps[step]
        layers = sorted(seen.generated)
        share = torch.stack([seen.generated[at][sample, :, -1] for at in layers])
        if kind == "share":
            return share
        return share / torch.stack([seen.num_generated[at][sample, :, -1] for at in layers])

    def see(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Sum up ``[batch, num_heads, rows, keys]`` over groups of keys."""
        if layer.forward is not self._run:
            self._run = layer.forward
            self.steps.append(Step(layer.rows[0]))
        step, at = self.steps[-1], layer.site.layer_idx
        regions = layer.visible_keys(self._prompt_regions(layer), attn_weights.shape[-1]).to(attn_weights)
        generated = layer.keys("generated", attn_weights)[:, None, None] & allowed
        self._add(step.regions, at, attn_weights[..., : regions.shape[1]] @ regions[:, None])
        self._add(step.generated, at, (attn_weights * generated).sum(-1))
        self._add(step.num_generated, at, generated.sum(-1))

    @staticmethod
    def _add(found: dict[int, torch.Tensor], at: int, rows: torch.Tensor) -> None:
        """Append rows: a long prompt is shown in pieces."""
        rows = rows.float().cpu()
        found[at] = torch.cat([found[at], rows], dim=2) if at in found else rows

    def _prompt_regions(self, layer: Layer) -> torch.Tensor:
        """Image and regions of the prompt's tokens, bool ``[batch, prompt, 1 + regions]``."""
        if self._regions is None:
            image = layer.forward.image_mask
            most = max((len(names) for names in self.names), default=0)
            regions = torch.zeros(*image.shape, 1 + most, dtype=torch.bool, device=image.device)
            regions[..., 0] = image
            for sample, cells in enumerate(self._cells):
                positions = image[sample].nonzero()[:, 0]
                for number, (name, indices) in enumerate((cells or {}).items()):
                    if any(not 0 <= index < len(positions) for index in indices):
                        raise DataError(
                            f"The cells of {name!r} must be from 0 to {len(positions) - 1}, the image's tokens; got "
                            f"{min(indices)} to {max(indices)}."
                        )
                    regions[sample, positions[list(indices)], 1 + number] = True
            self._regions = regions
        return self._regions


class StreamLog:
    """The residual stream entering each layer, and the slices of its heads, in the last row of every forward.

    Attributes:
        residuals: Per forward, by layer: ``[batch, hidden_size]``.
        slices: Per forward, by layer: what enters the output projection, ``[batch, num_heads, head_dim]``.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.residuals: list[dict[int, torch.Tensor]] = []
        self.slices: list[dict[int, torch.Tensor]] = []

    @contextmanager
    def watch(self) -> Iterator[StreamLog]:
        """Fill the log by every forward inside the block."""
        handles = [self.anatomy.decoder_layers[0].register_forward_pre_hook(self._begin)]
        try:
            for site in self.anatomy.sites:
                handles.append(
                    site.decoder_layer.register_forward_pre_hook(self._residual(site.layer_idx), with_kwargs=True)
                )
                handles.append(output_projection(site.module).register_forward_pre_hook(self._slices(site.layer_idx)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.residuals.append({})
        self.slices.append({})

    def _residual(self, at: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            if hidden_states.dim() != 3:
                raise UnsupportedFeatureError(
                    f"{type(module).__name__} carries a residual stream of shape {tuple(hidden_states.shape)}; "
                    "expected [batch, length, hidden_size]. Heads of this model cannot be scored by a logit lens."
                )
            self.residuals[-1][at] = hidden_states[:, -1].cpu()

        return see

    def _slices(self, at: int) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            last = args[0].reshape(args[0].shape[0], -1, args[0].shape[-1])[:, -1]
            self.slices[-1][at] = last.reshape(len(last), self.anatomy.num_heads, -1).cpu()

        return see


def output_projection(module: nn.Module) -> nn.Module:
    """Return the output projection of an attention module."""
    for name in OUTPUT_PROJECTIONS:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    raise AssertionError(f"{type(module).__name__} has no output projection")  # it would be no site


@dataclass(frozen=True)
class Cut(Method):
    """Hide some tokens from some rows, in prompts with an image and in their answers.

    Attributes:
        source: Bool ``[batch, tokens]``: the tokens to hide, by position in prompt and answer; none behind the end.
        target: Bool ``[batch, tokens]``: the rows to hide them from.
        rows: Rows of the prompt that may be targets: write out no more than these.
        keep_self: Whether a row goes on seeing itself.
    """

    name: ClassVar[str] = "knockout"
    edits_scores: ClassVar[bool] = True
    hides_keys: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False
    needs_past: ClassVar[bool] = True

    source: torch.Tensor = field(compare=False, repr=False)
    target: torch.Tensor = field(compare=False, repr=False)
    rows: PromptRows = field(default="all", compare=False)
    keep_self: bool = field(default=True, compare=False)

    @property
    def prompt_rows(self) -> PromptRows:
        """As chosen."""
        return self.rows

    @property
    def edits_decode(self) -> bool:
        """Whether targets lie in the answer; a mask of the prompt's length has none there."""
        return True

    @property
    def needs_whole_prompt(self) -> bool:
        """Tokens are told apart by their place in the prompt."""
        return True

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Where rows see image tokens among the text."""
        return ("joint",)

    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cut pairs of ``[batch, num_heads, rows, keys]`` the lowest score there is."""
        num_keys, device = scores.shape[-1], scores.device
        source = layer.visible_keys(self.source.to(device), num_keys)
        source = F.pad(source, (0, num_keys - source.shape[1]))
        rows = torch.arange(*layer.rows, device=device) + layer.forward.past
        length = self.target.shape[1]
        target = self.target.to(device)[:, rows.clamp_max(length - 1)] & (rows < length)
        cut = target[:, None, :, None] & source[:, None, None] & allowed
        if self.keep_self:
            keys = torch.arange(num_keys, device=device) + layer.key_offset(num_keys)
            cut = cut & (keys != rows[:, None])
        cut = cut & (allowed & ~cut).any(-1, keepdim=True)  # no row loses all it sees
        cut = cut.expand(-1, scores.shape[1], -1, -1)
        return scores.masked_fill_(cut, torch.finfo(scores.dtype).min), cut.any(-1)


@dataclass(frozen=True)
class AttentionWatch(RowWatch):
    """Show attention weights of some rows of a prompt, and of every generated token, beside the base kernel.

    Attributes:
        show: Called with what ``Method.observe`` gets.
        rows: Which rows of the prompt.
    """

    name: ClassVar[str] = "attention_watch"

    rows: PromptRows = "text"

    @property
    def observed_rows(self) -> PromptRows:
        """As chosen."""
        return self.rows

    @property
    def edits_decode(self) -> bool:
        """Nothing is edited, so the base kernel computes generated rows too."""
        return False

    @property
    def needs_whole_prompt(self) -> bool:
        """Rows are told apart by their place in the prompt."""
        return True


@dataclass(frozen=True)
class HeadWatch(Method):
    """Show head outputs, ``[batch, q_len, num_heads, head_dim]``, before any method scales them in their layer."""

    name: ClassVar[str] = "head_watch"
    edits_heads: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    show: Callable[[torch.Tensor, Layer], None] = field(compare=False, repr=False)

    @property
    def prompt_rows(self) -> PromptRows:
        """None."""
        return "none"

    @property
    def needs_whole_prompt(self) -> bool:
        """Steps are counted from the end of the prompt."""
        return True

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Show, and edit nothing."""
        self.show(head_outputs, layer)
        return head_outputs


@dataclass(frozen=True)
class InputWatch(Method):
    """Show the residual stream ``[batch, q_len, hidden_size]`` entering each layer in a prompt."""

    name: ClassVar[str] = "input_watch"
    reads_layer_input: ClassVar[bool] = True
    needs_text_keys: ClassVar[bool] = False

    show: Callable[[torch.Tensor, Layer], None] = field(compare=False, repr=False)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Where image tokens are tokens of the decoder's own stream."""
        return ("joint",)

    @property
    def needs_whole_prompt(self) -> bool:
        """Tokens are told apart by their place in the prompt."""
        return True

    def learn(self, hidden_states: torch.Tensor, layer: Layer) -> None:
        """Show, and learn nothing."""
        self.show(hidden_states, layer)
