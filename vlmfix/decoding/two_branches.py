"""The engine of two branches: the other branch runs beside every forward of the model's own, in the model's hooks.

After a forward, the logits of the next token are those of the contrast. So whatever calls the model (greedy search,
sampling, beams, a pipeline, a loop of the user's own) sees contrasted logits, and logits processors, streamers and
stopping criteria of ``generate`` work as ever: nothing of ``generate`` is replaced.

Two batches of one row cost twice a step. So the caches of both branches are joined into one of twice the rows after the
prompt, and a step is one forward over both, in which every weight is read once (``PairedCache``). On the model of
``scripts/bench.py`` (163 M parameters, 576 image tokens, one thread) that is 1.2 to 1.3 of a greedy step; in fp32 by
oneDNN's products, which such a step takes (``vlmfix.model.products``), and 1.7 to 1.9 by torch's. Caches whose layers
hold more than keys and values (recurrent states, cross-attention) cannot be joined: there the other branch has a cache
and a forward of its own, as it has for every prompt. Tokens that both branches begin with are read once: their keys and
values are copied, never shared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from vlmfix.decoding.base import AnswerToken, DecodingMethod
from vlmfix.decoding.branch import (
    WATCHED,
    Branch,
    BranchEdits,
    BranchForward,
    PairedForward,
    cache_of,
    logits_of,
    next_token_rows,
    own_part,
    with_logits,
)
from vlmfix.decoding.caches import PairedCache, copy_columns, emptied, forget_prompt_length, is_plain, with_new_layers
from vlmfix.decoding.other_image import ENCODES, EncodeOtherImages, OtherImages
from vlmfix.decoding.other_prompt import OtherPrompt, with_other_tokens, with_same_tokens
from vlmfix.engine.calls import every_row, parameter_names, tokens_of
from vlmfix.engine.forwards import STOCK, EditedForward
from vlmfix.engine.prompt_pass import positions_kept
from vlmfix.engine.stand_ins import DRAFTS, RefuseDrafts
from vlmfix.engine.status import Counters
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.forward import squared_move
from vlmfix.model.anatomy import FORWARD_KWARG, Anatomy

_NO_DRAFTS = "Assisted decoding checks several tokens at once, and a decoding method contrasts the next one only."


@dataclass
class Pending:
    """What the other branch is to read once a forward of the model's own branch is over: nothing, if only the cut acts.

    Attributes:
        inputs: Arguments of the model's own forward by name.
        prompt: The other prompt, if it is a prompt's forward.
        cache: The cache to read it with.
        step: Arguments of a step, if it is one.
    """

    inputs: dict[str, Any]
    prompt: OtherPrompt | None = None
    cache: Any = None
    step: dict[str, Any] | None = None


class TwoBranches:
    """Runs a decoding method's other branch beside the forwards of a patched model."""

    def __init__(self, anatomy: Anatomy, method: DecodingMethod, index: int, counters: Counters) -> None:
        self._anatomy = anatomy
        self._method = method
        self._index = index
        self._counters = counters
        layers = {
            kind: {site.module.layer_idx for site in anatomy.sites if site.kind == kind} for kind in anatomy.kinds
        }
        # Layers of cross-attention keep image features in the cache (Mllama), as many as there may be tokens.
        self._caches_tokens_only = layers.pop("image", set()) <= set().union(*layers.values())
        edit = method.branch_edit(anatomy) if method.uses_branch else None
        self._edits = None if edit is None else BranchEdits(anatomy, edit)

    @property
    def branch_methods(self) -> tuple[Method, ...]:
        """The bound attention methods of the other branch."""
        return () if self._edits is None else self._edits.methods

    def stand_ins(self) -> dict[str, Any]:
        """Return the methods of the model that are replaced."""
        model = self._anatomy.model
        found: dict[str, Any] = {DRAFTS: RefuseDrafts(model, _NO_DRAFTS)}
        if hasattr(type(model), ENCODES) and self._method.changes_image and self._method.uses_branch:
            found[ENCODES] = EncodeOtherImages(model, self._method)
        return found

    # Before a forward of the model's own branch.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(
        self, forward: EditedForward, inputs: dict[str, Any], kwargs: dict[str, Any], images: OtherImages | None
    ) -> tuple[Any, dict[str, Any]]:
        """Prepare the other branch's part of a forward.

        Args:
            forward: The forward of the model's own branch.
            inputs: Its arguments by name.
            kwargs: Its keyword arguments.
            images: The other images, when ``generate`` has encoded the model's own itself.

        Returns:
            What is to be handed down as the forward, and its keyword arguments.

        Raises:
            UnsupportedFeatureError: Something the method is not defined for, or cannot be done beside two branches.
        """
        if not forward.state.any_image:
            return forward, kwargs
        self._check(forward, inputs)
        if forward.is_prefill and not self._method.uses_branch:
            forward.pending = Pending(inputs)
            return forward, kwargs
        branch: Branch | None = forward.state.branch
        past = int(forward.past)
        if branch is not None and 0 < past < branch.own_length:
            raise UnsupportedFeatureError(
                "This cache was cropped into its prompt, which the two branches do not have in common. Start with an "
                "empty cache."
            )
        if branch is not None and past:
            branch.follow(inputs["past_key_values"])
        if forward.is_prefill:
            forward.pending = self._begin_prompt(forward, inputs, images)
        elif branch is None:
            raise UnsupportedFeatureError(f"{self._method.name} knows nothing of this cache's prompt. Start anew.")
        elif not self._method.uses_branch:
            forward.pending = Pending(inputs)
        else:
            steps = branch.steps(past)
            if branch.pair is not None and self._can_join(inputs):
                return PairedForward(forward, branch, inputs["past_key_values"]), branch.joined_step(
                    inputs, kwargs, steps
                )
            branch.part()
            forward.pending = Pending(inputs, step=branch.step(inputs, steps))
        return forward, kwargs

    def _check(self, forward: EditedForward, inputs: dict[str, Any]) -> None:
        name = self._method.name
        cache = inputs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise UnsupportedFeatureError(
                f"{name} looks at every step of an answer beside the model, and may run a second branch, whose cache "
                "grows; a static cache has no room for it. Leave cache_implementation at its default."
            )
        if forward.q_len != forward.prompt_len and (forward.is_prefill or forward.q_len > 1):
            raise UnsupportedFeatureError(
                f"{name} defines the logits of the next token only, and this forward wants those of several (assisted "
                "decoding, or logits_to_keep > 1). Leave assistant_model and prompt_lookup_num_tokens unset."
            )
        wanted = inputs.get("logits_to_keep")
        if isinstance(wanted, torch.Tensor) and forward.q_len > 1:
            places, last = (wanted.reshape(-1) % forward.q_len).tolist(), forward.q_len - 1
            if places.count(last) != 1 or places[-1] != last:
                raise UnsupportedFeatureError(
                    f"{name} defines the logits of the next token only. Where logits_to_keep names positions, the last "
                    "one must come last, and once. Leave it out, or give 1."
                )
        if inputs.get("labels") is not None:
            raise UnsupportedFeatureError(f"{name} defines no loss. Leave labels out, or vlmfix.unpatch(model) first.")
        mask = inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise UnsupportedFeatureError(
                f"{name} needs to know which tokens are padding. Pass attention_mask as [batch, length], as the "
                "processor gave it."
            )

    def _begin_prompt(self, forward: EditedForward, inputs: dict[str, Any], images: OtherImages | None) -> Pending:
        branch: Branch | None = forward.state.branch
        past, cache = int(forward.past), inputs.get("past_key_values")
        known = forward.valid_mask[:, :past]
        if past and branch is not None:  # a further turn
            branch.part()
            cache = branch.cache
            known = torch.cat([branch.valid, known[:, branch.own_length :]], dim=1)
        else:
            cache = with_new_layers(cache) if is_plain(cache) else copy.deepcopy(cache)
            if not past:
                forget_prompt_length(cache)
            if past and self._edits is not None:
                self._edits.keep_text(cache, forward.state, past)
        if self._method.changes_image or self._edits is not None:
            prompt = with_same_tokens(self._method, self._anatomy, forward, inputs, images)
        else:
            prompt = with_other_tokens(self._method, self._anatomy, forward, inputs, known)
        forward.state.branch = None
        return Pending(inputs, prompt, cache)

    def _can_join(self, inputs: dict[str, Any]) -> bool:
        """Whether a step can be one forward over both branches."""
        configs = (self._anatomy.model.config, self._anatomy.text_config)
        if any(inputs.get(name) or any(getattr(each, name, False) for each in configs) for name in WATCHED):
            return False  # they are asked for of the model's own branch
        return inputs.get("position_ids") is not None or not hasattr(self._anatomy.inner, "rope_deltas")

    # After it.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def finish(self, forward: Any, output: Any) -> Any:
        """Put the contrast in the place of the next token's logits, in what the model returned for ``forward``."""
        if isinstance(forward, PairedForward):
            return self._finish_pair(forward, output)
        pending: Pending | None = forward.pending
        if pending is None:
            return output
        forward.pending = None
        logits = logits_of(output)
        samples, last = torch.arange(len(logits), device=logits.device), next_token_rows(forward, logits)
        own = logits[samples, last].float()
        is_cut = forward.is_prefill and logits.shape[1] != forward.q_len
        if is_cut and bool((forward.has_image & ~forward.valid_mask[:, -1]).any()):
            raise UnsupportedFeatureError(
                f"{self._method.name} contrasts the logits behind each prompt's last token, and those asked for are "
                "behind padding. Pad on the left (padding_side='left'), or leave logits_to_keep out."
            )
        other, branch = own, forward.state.branch
        if pending.step is not None:
            other, _ = self._run(pending.step, branch.cache, None, use_cache=True)
        elif forward.is_prefill:
            own_cache = cache_of(output, pending.inputs)
            if pending.prompt is not None:
                other, branch = self._read_prompt(pending.prompt, pending.cache, own_cache, forward)
            else:
                branch = Branch(forward.has_image, None, forward.valid_mask, int(forward.past) + forward.q_len)
            if self._method.keeps_first_logits:
                branch.first_logits = own
            forward.state.branch = None if own_cache is None else branch
        result = self._combined(own, other, branch, forward)
        if logits.shape[1] == 1:
            return with_logits(output, result[:, None])
        logits = logits.clone()  # rounded to the model's dtype, beside the rows of other tokens
        logits[samples, last] = result.to(logits.dtype)
        return with_logits(output, logits)

    def _finish_pair(self, forward: PairedForward, output: Any) -> Any:
        branch, pair = forward.branch, forward.branch.pair
        assert pair is not None
        pair.show(forward.cache)
        batch = len(branch.active)
        logits = logits_of(output)[:, -1].float()
        result = self._combined(logits[:batch], logits[batch:], branch, forward.own)[:, None]

        output = own_part(output, batch, pair.cache, forward.cache)
        return with_logits(output, result)

    def _combined(self, own: torch.Tensor, other: torch.Tensor, branch: Branch, forward: EditedForward) -> torch.Tensor:
        """Combine fp32 logits ``[batch, vocab]`` of both branches, in the rows that are contrasted."""
        number = 1 if forward.is_prefill else branch.steps(int(forward.past)) + 1
        token = AnswerToken(number, branch.first_logits)
        active, other = branch.active.to(own.device), other.to(own.device)
        first, second = own, other
        if branch.swapped is not None:
            swaps = branch.swapped.to(own.device)[:, None]
            first, second = torch.where(swaps, other, own), torch.where(swaps, own, other)
        self._counters.count(self._index, active.sum())
        result = torch.where(active[:, None], self._method.combine(first, second, token), own)
        if forward.is_measured and not self._method.is_gated:
            move = squared_move(own.softmax(-1), result.softmax(-1), active[:, None])
            self._counters.move(self._index, move)
        return result

    def _read_prompt(
        self, prompt: OtherPrompt, cache: Any, own_cache: Any, forward: EditedForward
    ) -> tuple[torch.Tensor, Branch]:
        """Let the other branch read its prompt: fp32 logits of the next token, and the branch with its cache."""
        arguments, branch = prompt.arguments, prompt.branch
        if cache is None and own_cache is not None and is_plain(own_cache):
            cache = emptied(own_cache)  # the model made its own
        is_alone = all(method is self._method or method.is_identity for method in forward.methods)
        may_share = is_alone and self._caches_tokens_only
        if may_share and own_cache is not None and cache is not None and copy_columns(cache, own_cache, prompt.shared):
            arguments = prompt.behind_shared()
        logits, filled = self._run(arguments, cache, branch.valid, use_cache=own_cache is not None)
        fits = own_cache is not None and self._caches_tokens_only and PairedCache.fits(own_cache, filled)
        if fits and self._edits_can_split(forward):
            branch.pair = PairedCache(own_cache, filled)
            branch.pair.show(own_cache)
        else:
            branch.cache = filled
        return logits, branch

    @torch.no_grad()
    def _run(
        self, arguments: dict[str, Any], cache: Any, valid: torch.Tensor | None, *, use_cache: bool
    ) -> tuple[torch.Tensor, Any]:
        """Run the other branch: fp32 logits behind each row's last token, and the cache. ``None``: all are valid."""
        tokens = tokens_of(arguments)
        assert tokens is not None
        length = tokens.shape[1]
        ends = valid is None or bool(valid[:, -1].all())  # of a step, nothing is asked that the device must answer
        if ends and "logits_to_keep" in parameter_names(self._anatomy.model):
            arguments = {**arguments, "logits_to_keep": 1}
        options = {"past_key_values": cache, "use_cache": use_cache, "return_dict": True}
        arguments = {**arguments, **options}
        forward = STOCK
        if self._edits is not None:
            forward = self._edits.begin(arguments)
            arguments.update(every_row(arguments, length, tokens.device))  # as the patch does for the own branch
        with positions_kept(self._anatomy):
            output = self._anatomy.model(**arguments, **{FORWARD_KWARG: forward})
        filled, logits = getattr(output, "past_key_values", None), output.logits
        if self._edits is not None and isinstance(forward, BranchForward):
            self._edits.finish(forward, filled)
        if valid is None or ends or logits.shape[1] != length:
            last = logits[:, -1]
        else:
            new = valid[:, -length:]
            last = logits[torch.arange(len(new)), (torch.arange(length, device=new.device) * new).amax(1)]
        return last.float(), filled

    def _edits_can_split(self, forward: EditedForward) -> bool:
        """Whether what methods edit can be kept to the rows of the model's own branch."""
        if self._edits is not None or any(method.edits_blocks and not method.is_identity for method in forward.methods):
            return False
        return bool(self._anatomy.text_config._attn_implementation != "flex_attention")
