"""The engine of two branches: the other branch runs beside every forward of the model's own, in the model's hooks.

After a forward, the logits of the next token are those of the contrast. So whatever calls the model (greedy search,
sampling, beams, a pipeline, a loop of the user's own) sees contrasted logits, and logits processors, streamers and
stopping criteria of ``generate`` work as ever: nothing of ``generate`` is replaced.

Two batches of one row cost twice a step. So the caches of both branches are joined into one of twice the rows after the
prompt, and a step is one forward over both, in which every weight is read once (``PairedCache``). In CPU time on the
model of ``scripts/bench.py`` (163 M parameters, fp32, 576 image tokens, 1 thread) that is 1.7 to 1.9 of a greedy step,
and two forwards are 1.9 to 2.1. Caches whose layers hold more than keys and values (recurrent states, cross-attention)
cannot be joined: there the other branch has a cache and a forward of its own, as it has for every prompt. Tokens that
both branches begin with are read once: their keys and values are copied, never shared.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vlmfix.decoding.branch import (
    Branch,
    PairedForward,
    Pending,
    cache_of,
    joined_arguments,
    logits_of,
    rows_of,
    with_last_logits,
)
from vlmfix.decoding.caches import PairedCache, copy_columns, emptied, is_plain, with_new_layers
from vlmfix.decoding.other_image import ENCODES, KeepImages, RawImages, looks_of
from vlmfix.decoding.other_prompt import WATCHED, OtherPrompt, with_other_image, with_other_tokens
from vlmfix.engine.calls import parameter_names
from vlmfix.engine.image_free import positions_kept
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import FORWARD_KWARG

if TYPE_CHECKING:
    from vlmfix.decoding.base import DecodingMethod
    from vlmfix.engine.forwards import EditedForward
    from vlmfix.engine.status import Counters
    from vlmfix.model.anatomy import Anatomy


DRAFTS = "_get_candidate_generator"
"""The method of a model that every way into assisted decoding passes."""


class RefuseDrafts:
    """Stands in for a model's ``DRAFTS``, for a method that defines the logits of the next token only."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Refuse, unless the call asks for the stock model (``vlmfix=None``)."""
        if model_kwargs.get(FORWARD_KWARG, self) is None:
            return getattr(type(self.model), DRAFTS)(self.model, *args, model_kwargs=model_kwargs, **kwargs)
        raise UnsupportedFeatureError(
            "Assisted decoding checks several tokens at once, and a decoding method contrasts the next one only. Leave "
            "assistant_model and prompt_lookup_num_tokens unset, or vlmfix.unpatch(model) first."
        )


class TwoBranches:
    """Runs a decoding method's other branch beside the forwards of a patched model."""

    def __init__(self, anatomy: Anatomy, method: DecodingMethod, index: int, counters: Counters) -> None:
        self._anatomy = anatomy
        self._method = method
        self._index = index
        self._counters = counters

    def stand_ins(self) -> dict[str, Any]:
        """Return the methods of the model that are replaced."""
        model = self._anatomy.model
        found: dict[str, Any] = {DRAFTS: RefuseDrafts(model)}
        if hasattr(type(model), ENCODES):
            found[ENCODES] = KeepImages(model)
        return found

    # Before a forward of the model's own branch.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(
        self, forward: EditedForward, inputs: dict[str, Any], kwargs: dict[str, Any], raw: RawImages | None
    ) -> tuple[Any, dict[str, Any]]:
        """Prepare the other branch's part of a forward.

        Args:
            forward: The forward of the model's own branch.
            inputs: Its arguments by name.
            kwargs: Its keyword arguments.
            raw: The images, when ``generate`` has encoded them itself.

        Returns:
            The ``Forward`` to hand down, and the keyword arguments.

        Raises:
            UnsupportedFeatureError: Something the method is not defined for, or cannot be done beside two branches.
        """
        if not forward.state.any_image:
            return forward, kwargs
        self._check(forward, inputs)
        branch = forward.state.branch
        if branch is not None and 0 < int(forward.past) < branch.own_length:
            raise UnsupportedFeatureError(
                "This cache was cropped into its prompt, which the two branches do not have in common. Start with an "
                "empty cache."
            )
        if not self._method.uses_branch:
            forward.pending = Pending()
        elif forward.is_prefill:
            forward.pending = self._begin_prompt(forward, inputs, raw)
        elif branch is None:
            raise UnsupportedFeatureError(f"{self._method.name} knows nothing of this cache's prompt. Start anew.")
        else:
            cache = inputs["past_key_values"]
            if branch.pair is not None:
                branch.pair.crop(cache.get_seq_length())
                if not self._can_join(inputs, branch):
                    branch.cache, branch.pair = branch.pair.other(), None
            if branch.pair is not None:
                return PairedForward(forward, branch, cache), joined_arguments(branch, branch.pair, inputs, kwargs)
            self._follow_crop(branch, cache)
            forward.pending = Pending(inputs)
        return forward, kwargs

    def _check(self, forward: EditedForward, inputs: dict[str, Any]) -> None:
        name = self._method.name
        cache = inputs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise UnsupportedFeatureError(
                f"{name} runs a second branch, whose cache grows beside that of the first; a static cache has no room "
                "for it. Leave cache_implementation at its default."
            )
        if forward.q_len != forward.prompt_len and (forward.is_prefill or forward.q_len > 1):
            raise UnsupportedFeatureError(
                f"{name} defines the logits of the next token only, and this forward wants those of several (assisted "
                "decoding, or logits_to_keep > 1). Leave assistant_model and prompt_lookup_num_tokens unset."
            )
        if inputs.get("labels") is not None:
            raise UnsupportedFeatureError(f"{name} defines no loss. Leave labels out, or vlmfix.unpatch(model) first.")
        mask = inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise UnsupportedFeatureError(
                f"{name} needs to know which tokens are padding. Pass attention_mask as [batch, length], as the "
                "processor gave it."
            )

    def _begin_prompt(self, forward: EditedForward, inputs: dict[str, Any], raw: RawImages | None) -> Pending:
        cache, branch = inputs.get("past_key_values"), forward.state.branch
        past, known = int(forward.past), None
        if past and branch is not None:
            if branch.pair is not None:
                branch.pair.crop(past)
                branch.cache, branch.pair = branch.pair.other(), None
            self._follow_crop(branch, cache)
            other_cache = branch.cache
            known = F.pad(branch.valid, (0, past - branch.own_length), value=True)
            known[:, branch.valid.shape[1] :] &= forward.valid_mask[:, branch.own_length : past]
        elif past and is_plain(cache):
            known, other_cache = forward.valid_mask[:, :past], with_new_layers(cache)
        else:
            known, other_cache = (forward.valid_mask[:, :past] if past else None), copy.deepcopy(cache)
        if self._method.changes_image:
            other = with_other_image(self._method, self._anatomy, forward, inputs, raw)
        else:
            other = with_other_tokens(self._method, self._anatomy, forward, inputs, known)
        if branch is not None:
            forward.state.branch = None
        return Pending(inputs, other, other_cache)

    def _can_join(self, inputs: dict[str, Any], branch: Branch) -> bool:
        """Whether a step can be one forward over both branches."""
        configs = (self._anatomy.model.config, self._anatomy.text_config)
        if any(inputs.get(name) or any(getattr(each, name, False) for each in configs) for name in WATCHED):
            return False  # they are asked for of the model's own branch
        return inputs.get("position_ids") is not None or not hasattr(self._anatomy.inner, "rope_deltas")

    @staticmethod
    def _follow_crop(branch: Branch, cache: Any) -> None:
        """Crop the other branch's cache as far as the model's own was."""
        own = cache.get_seq_length() - branch.own_length
        extra = branch.cache.get_seq_length() - branch.valid.shape[1] - own
        if extra:
            branch.cache.crop(-extra)

    # After it.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def finish(self, forward: Any, output: Any) -> Any:
        """Put the contrast into the output of a forward.

        Args:
            forward: What ``begin`` returned.
            output: The output of the model.

        Returns:
            The output with the logits of the next token replaced.
        """
        if isinstance(forward, PairedForward):
            return self._finish_pair(forward, output)
        pending: Pending | None = forward.pending
        if pending is None:
            return output
        forward.pending = None
        logits = logits_of(output)
        own = (
            forward.at_last_position(logits)
            if forward.is_prefill and logits.shape[1] == forward.q_len
            else logits[:, -1]
        )
        own = own.float()
        if not self._method.uses_branch:
            return self._replaced(forward, output, own, own, forward.has_image, None)
        if pending.other is not None:
            other, branch = self._read_prompt(pending.other, pending.cache, output, forward, pending.inputs)
        else:
            branch = forward.state.branch
            other = self._read_step(branch, pending.inputs)
        return self._replaced(forward, output, own, other, branch.active, branch.swapped)

    def _finish_pair(self, forward: PairedForward, output: Any) -> Any:
        branch, pair = forward.branch, forward.branch.pair
        assert pair is not None
        pair.show(forward.cache)
        batch = branch.active.shape[0]
        logits = logits_of(output)[:, -1].float()
        output = rows_of(output, batch, {id(pair.cache): forward.cache})
        return self._replaced(forward.own, output, logits[:batch], logits[batch:], branch.active, branch.swapped)

    @torch.no_grad()
    def _run(
        self, arguments: dict[str, Any], cache: Any, valid: torch.Tensor | None, *, use_cache: bool
    ) -> tuple[torch.Tensor, Any]:
        """Run the other branch: fp32 logits behind each row's last token, and the cache. ``None``: all are valid."""
        length = next(arguments[name].shape[1] for name in ("input_ids", "inputs_embeds") if name in arguments)
        ends = valid is None or bool(valid[:, -1].all())  # of a step, nothing is asked that the device must answer
        if ends and "logits_to_keep" in parameter_names(self._anatomy.model):
            arguments = {**arguments, "logits_to_keep": 1}
        options = {"past_key_values": cache, "use_cache": use_cache, "return_dict": True, FORWARD_KWARG: None}
        with positions_kept(self._anatomy):
            output = self._anatomy.model(**{**arguments, **options})
        logits: torch.Tensor = output.logits
        if valid is None or ends or logits.shape[1] != length:
            last = logits[:, -1]
        else:
            new = valid[:, -length:]
            last = logits[torch.arange(len(new)), (torch.arange(length, device=new.device) * new).amax(1)]
        return last.float(), getattr(output, "past_key_values", None)

    def _read_prompt(
        self, other: OtherPrompt, cache: Any, output: Any, forward: EditedForward, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, Branch]:
        own_cache = cache_of(output, inputs)
        arguments = other.arguments
        if cache is None and own_cache is not None and is_plain(own_cache):
            cache = emptied(own_cache)  # the model made its own
        may_share = all(method is self._method or method.is_identity for method in forward.methods)
        if may_share and own_cache is not None and cache is not None:
            if copy_columns(cache, own_cache, other.shared):
                arguments = other.behind_shared()
        logits, filled = self._run(arguments, cache, other.valid, use_cache=own_cache is not None)
        if other.times > 1:
            rows = torch.arange(len(logits), device=logits.device).repeat_interleave(other.times)
            logits = logits[rows]
            if filled is not None:  # layers with a recurrent state cannot be repeated, but reordered
                type(filled).reorder_cache(filled, rows)
        last = other.last_position
        branch = Branch(
            other.active,
            other.swapped,
            other.valid.repeat_interleave(other.times, 0),
            int(forward.past) + forward.q_len,
            last,
        )
        if own_cache is not None:
            if PairedCache.fits(own_cache, filled) and self._edits_can_split(forward):
                branch.pair = PairedCache(own_cache, filled)
                branch.pair.show(own_cache)
            else:
                branch.cache = filled
            forward.state.branch = branch
        return logits, branch

    def _read_step(self, branch: Branch, inputs: dict[str, Any]) -> torch.Tensor:
        own_length = inputs["past_key_values"].get_seq_length()
        steps = own_length - branch.own_length
        left_out = ("past_key_values", "attention_mask", "position_ids", "cache_position", "return_dict", *WATCHED)
        arguments = {name: value for name, value in inputs.items() if name not in left_out}
        arguments["attention_mask"] = branch.mask(inputs.get("attention_mask"), steps)
        positions = branch.positions(inputs.get("position_ids"), steps)
        if positions is not None:
            arguments["position_ids"] = positions
        for name, looks in looks_of(arguments).items():
            if looks.shape[1] > 1:  # of the answer, what its last token looks at
                length = branch.valid.shape[1] + steps
                arguments[name] = looks[:, -1:].expand(-1, length, *looks.shape[2:])
        if inputs.get("cache_position") is not None:  # transformers 4
            arguments["cache_position"] = torch.full_like(inputs["cache_position"], branch.cache.get_seq_length())
        for name in ("logits_to_keep", "use_cache"):
            arguments.pop(name, None)
        logits, _ = self._run(arguments, branch.cache, None, use_cache=True)
        return logits

    def _edits_can_split(self, forward: EditedForward) -> bool:
        """Whether what other methods edit can be kept to the rows of the model's own branch."""
        if any(method.edits_blocks and not method.is_identity for method in forward.methods):
            return False
        return bool(self._anatomy.text_config._attn_implementation != "flex_attention")

    def _replaced(
        self,
        forward: EditedForward,
        output: Any,
        own: torch.Tensor,
        other: torch.Tensor,
        active: torch.Tensor,
        swapped: torch.Tensor | None,
    ) -> Any:
        active, other = active.to(own.device), other.to(own.device)
        first, second = own, other
        if swapped is not None:
            swaps = swapped.to(own.device)[:, None]
            first, second = torch.where(swaps, other, own), torch.where(swaps, own, other)
        result = torch.where(active[:, None], self._method.combine(first, second), own)
        self._counters.count(self._index, active.sum())
        return with_last_logits(forward, output, result)
