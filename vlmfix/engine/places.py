"""Whether a forward came past every place where a patch acts: kernels and exchanged classes may go another way."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from torch import nn

from vlmfix.engine.forwards import EditedForward
from vlmfix.engine.plan import PatchedSite
from vlmfix.engine.stream import BlockHooks
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import Anatomy


def passed_by(model: nn.Module, missed: Sequence[str]) -> UnsupportedFeatureError:
    """Return the error for a forward that did not come to some places, with what to do."""
    more = f" and {len(missed) - 2} more" if len(missed) > 2 else ""
    return UnsupportedFeatureError(
        f"This forward of a patched {type(model).__name__} passed by {' and '.join(missed[:2])}{more}, where a method "
        "of the patch acts, so its result is not the method's. Something else computes what belongs there: a kernel "
        "(use_kernels, kernel_config), a class in the place of the model's own (register_patch_mapping), or a forward "
        "that somebody put on a module. Load the model without it (use_kernels=False), or let it call transformers' "
        "attention interface and the modules inside it; vlmfix.unpatch(model) gives the stock model."
    )


class Places:
    """The places of a patch. Whatever computes a layer past one of them would give the stock model's result."""

    def __init__(self, anatomy: Anatomy, sites: Sequence[PatchedSite], block_hooks: Sequence[BlockHooks] = ()) -> None:
        self._anatomy = anatomy
        self._depth = self._current_depth()
        self._sites = tuple(
            each for each in sites if each.readers or each.masks or each.scores or each.weights or each.heads
        )
        self._block_hooks = tuple(block_hooks)

    def check(self, forward: EditedForward, module: nn.Module) -> None:
        """Refuse a forward that is over and has passed by a place where a method acts.

        Compiled code does not tell where it came. In training, layers may be dropped on purpose.

        Raises:
            UnsupportedFeatureError: It has, or the model has more layers than before; the message says what to do.
        """
        # A caller may use fewer layers (early exit): the others are passed by on purpose.
        depth = self._current_depth()
        if not forward.acts or forward.is_traced or module.training or (depth or 0) < (self._depth or 0):
            return
        if depth != self._depth:
            raise UnsupportedFeatureError(
                f"This model has {depth} layers, and had {self._depth} when it was patched. Patch it again: "
                "vlmfix.patch(model, ...)."
            )
        missed = [name for place, name in self._expected(forward) if place not in forward.reached]
        if missed:
            raise passed_by(self._anatomy.model, missed)

    def _current_depth(self) -> int | None:
        return getattr(self._anatomy.text_config, "num_hidden_layers", None)

    def _expected(self, forward: EditedForward) -> Iterator[tuple[Hashable, str]]:
        """The places that a forward must reach, and what to call them."""
        any_image = forward.state.any_image
        for site in self._sites:
            if site.kind == "image" and not any_image:
                continue  # cross-attention to image features is left out where there are none
            yield site.index, f"the attention of {site.name}"
            if site.readers and forward.is_prefill:
                yield ("input", site.index), f"the input of the layer of {site.name}"
        for hooks in self._block_hooks if any_image else ():
            layer = hooks.blocks.layer_idx
            for kind in hooks.edits.keys() - {"embedding"}:
                yield (kind, layer), f"the {kind} block of layer {layer}"
            if hooks.early:
                yield ("output", layer), f"the output of layer {layer}"
