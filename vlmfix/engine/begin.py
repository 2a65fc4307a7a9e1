"""Begins forwards: finds out what a call of the model means, and what is known about its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vlmfix.engine.calls import (
    answer_length,
    check_batch,
    check_whole_prompt,
    is_empty,
    length_of,
    num_drafted,
    packed_rows,
    parameter_names,
    refuse_export,
    tokens_of,
    with_prompt,
)
from vlmfix.engine.forwards import EditedForward
from vlmfix.engine.plan import PatchedSite
from vlmfix.engine.prompt_pass import begin_methods, encoded_text_only_heads, text_only_heads
from vlmfix.engine.status import describe
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.methods.sequence import SequenceState, extend_mask, keep_state, state_of
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.images import ImageFinder, attended_keys, brings_pictures
from vlmfix.model.vision_tower import VisionRecorder


class ForwardBeginner:
    """Makes the ``EditedForward`` of every call of a patched model, for bound methods and the modules they touch.

    Attributes:
        images: Finds the image tokens of a prompt.
        vision: Records the vision tower, for methods that read it.
        runs_passes: Whether a prompt is read in passes beside its own forward.
        can_tell_drafts: Whether something in a forward tells drafted tokens from a further turn.
    """

    def __init__(self, anatomy: Anatomy, methods: tuple[Method, ...], sites: Sequence[PatchedSite]) -> None:
        self.anatomy = anatomy
        self.methods = methods
        self.images = ImageFinder(anatomy)
        active = [method for method in methods if not method.is_identity]
        vision_layers = sorted({layer for method in active for layer in method.vision_layers})
        self.vision = VisionRecorder(anatomy, vision_layers) if vision_layers else None
        self._compared = frozenset(
            site.index for site in sites if any(method.needs_text_only_heads for _, method in site.heads)
        )
        self.runs_passes = bool(self._compared) or any(method.reads_prompt for method in active)
        self._keeps_ids = bool(self._compared) or any(method.needs_ids for method in active)
        self._needs_past = any(site.is_sliding for site in sites) or any(each.needs_past for each in active)
        # Contrasts have two prompts, and the vision tower runs before the first forward only.
        self._needs_cache = [
            each.name for each in active if each.needs_cache and (each.replaces_logits or each.vision_layers)
        ]
        self._contrasts = any(each.replaces_logits for each in active)
        self._acts = bool(active)
        self._reorders = any(method.reorders or method.replaces_logits for method in active)
        self._takes_few_logits = "logits_to_keep" in parameter_names(anatomy.language_model)
        self.can_tell_drafts = not active or anatomy.encoder is not None or self._takes_few_logits

    def begin(self, module: nn.Module, inputs: dict[str, Any], prompt_end: int | None = None) -> EditedForward | None:
        """Make the forward of a call.

        Args:
            module: What is called: the model, or a language model inside it that ``generate`` calls.
            inputs: Its arguments by name.
            prompt_end: Length of the prompt, earlier turns included, where ``generate`` says that the call reads one.

        Returns:
            The forward; ``None`` for a call without tokens, of which the model itself says what is missing.

        Raises:
            UnsupportedFeatureError: The call is one that the methods are not defined for.
        """
        refuse_export()
        cache = inputs.get("past_key_values")
        state = state_of(cache)
        if self.anatomy.encoder is not None:
            return self._begin_answer(module, cache, state, inputs, prompt_end)
        state = self._followed(cache, state)
        tokens = tokens_of(inputs)
        if tokens is None:
            return None
        batch, q_len = tokens.shape[:2]
        drafted = num_drafted(inputs) if self._acts else 0
        if cache is None and prompt_end is not None and not self._contrasts:
            drafted = q_len - prompt_end  # the answer so far
        # Behind a known prompt, a single token goes on with the answer, and so do several that are a draft but for the
        # token before it. That a single token is the rest of a prompt is known to generate, and of a cropped prompt.
        goes_on = q_len == 1 or (q_len - drafted <= 1 and not brings_pictures(inputs))
        is_rest = state is not None and (state.is_cut or (prompt_end is not None and not state.is_answered))
        if state is not None and goes_on and not is_rest and not is_empty(cache):
            if state.image_mask.shape[0] > 1 or self._reorders:  # a single prompt may be continued in several ways
                check_batch(state, batch)
            return self._begin_decode(module, cache, state, inputs.get("input_ids"), q_len)
        forward: EditedForward = self._begin_prompt(module, cache, state, inputs, drafted, prompt_end)
        return forward

    def keep(self, cache: Any, state: SequenceState) -> None:
        """Keep what is known about sequences on their cache."""
        keep_state(cache, state, reorders=self._reorders)

    def _followed(self, cache: Any, state: SequenceState | None) -> SequenceState | None:
        """Follow a cache that was cropped since its last forward; a static one cannot be."""
        if state is None or getattr(cache, "is_compileable", False):
            return state
        past, known = int(cache.get_seq_length()), state.image_mask.shape[1]
        if past == known:
            state.is_answered = False
        elif 0 < past < known:
            state = state.cropped(past)
            keep_state(cache, state)
        return state

    # Further tokens of an answer.

    def _begin_decode(
        self, module: nn.Module, cache: Any, state: SequenceState, input_ids: torch.Tensor | None, q_len: int
    ) -> EditedForward:
        self._check_same_methods(state)
        keeps_ids = self._keeps_ids and not torch.compiler.is_compiling()
        past: int | torch.Tensor = 0
        is_static = getattr(cache, "is_compileable", False)
        if self._needs_past or keeps_ids or not is_static:
            # The outermost hooks are compiled by themselves: a copy made there would be a graph of its own.
            is_later = is_static and torch.compiler.is_compiling() and module is not self.anatomy.inner
            past = cache.get_seq_length() if is_later else length_of(cache)
        if state.outdated:
            raise UnsupportedFeatureError(
                f"This cache was cropped, and the prompt is gone at whose end {state.outdated[0]} has chosen what to "
                "edit. Start with an empty cache, or go on with a further turn."
            )
        if keeps_ids and input_ids is not None:
            state.decoded.append((past, input_ids))
        forward = EditedForward(state, self.methods, is_prefill=False, past=past, q_len=q_len, prompt_len=0)
        if not torch.compiler.is_compiling():  # compiled code would be compiled again for the second step
            forward.is_measured = not state.is_answered
        state.is_answered = True
        forward.past_is_live = isinstance(past, torch.Tensor) and torch.compiler.is_compiling()
        return forward

    # A prompt, or a further turn.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_prompt(
        self,
        module: nn.Module,
        cache: Any,
        known: SequenceState | None,
        inputs: dict[str, Any],
        drafted: int,
        prompt_end: int | None,
    ) -> EditedForward:
        past, known = self._continued(cache, known)
        # In 5.0 a model makes its cache itself: that generate hands none does not mean that there will be none.
        has_none = cache is None and inputs.get("use_cache") is False
        if self._needs_cache and has_none and prompt_end is not None:
            raise UnsupportedFeatureError(
                f"{self._needs_cache[0]} edits a prompt and the tokens generated behind it in different ways, and "
                "without a cache every new token makes all of them a prompt. Leave use_cache on."
            )
        image_mask = self.images.find(inputs, past=past, is_inside=self._is_inside(module), must_know=self._acts)
        prompt_len = image_mask.shape[1] - drafted
        if drafted and (prompt_len <= 1 or bool(image_mask[:, prompt_len:].any())):
            drafted = 0  # a prompt whose caller wants many logits
        forward = self._read(known, past, image_mask, inputs, drafted)
        forward.state.of_generate = prompt_end is not None
        goes_on = prompt_end is not None and past + forward.q_len < prompt_end
        check_whole_prompt(known, forward, goes_on=goes_on)
        # Only inside a vision-language model: elsewhere a prompt is more than its embeddings.
        embeds = inputs.get("inputs_embeds") if self._is_inside(module) and not past else None
        if forward.state.any_image and self._compared:
            forward.text_only_heads = text_only_heads(self.anatomy, self._compared, forward.state, inputs, embeds)
        begin_methods(self.anatomy, self._head(module), forward, inputs, self.vision, embeds)
        if cache is not None:
            self.keep(cache, forward.state)
        return forward

    def _read(
        self, known: SequenceState | None, past: int, image_mask: torch.Tensor, inputs: dict[str, Any], drafted: int
    ) -> EditedForward:
        """Extend what is known about ``past`` tokens by those of a prompt.

        Args:
            known: State of the earlier turns, if any.
            past: Tokens in the cache.
            image_mask: bool ``[batch, q_len]`` of the new tokens.
            inputs: The call's arguments by name.
            drafted: How many of the new tokens are a drafted answer behind the prompt.

        Raises:
            UnsupportedFeatureError: The cache belongs to a batch of another size.
        """
        batch, q_len = image_mask.shape
        if known is not None:
            check_batch(known, batch)
        prompt_len = q_len - drafted
        attention_mask, input_ids = inputs.get("attention_mask"), inputs.get("input_ids")
        valid = attended_keys(attention_mask, past, q_len, image_mask)[:, :prompt_len]
        image_mask = extend_mask(None if known is None else known.image_mask, image_mask[:, :prompt_len] & valid, past)
        valid = extend_mask(None if known is None else known.valid_mask, valid, past, fill=True)
        if past and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            if attention_mask.shape[1] >= past + q_len:
                # Answers of a batch end at different lengths: what the caller hides behind shorter ones is padding.
                valid = valid & attention_mask[:, : past + prompt_len].to(valid.device).bool()
        decoded: list[tuple[int | torch.Tensor, torch.Tensor]] = []
        if input_ids is not None:
            if drafted:
                decoded.append((past + prompt_len, input_ids[:, prompt_len:]))
            input_ids = input_ids[:, :prompt_len]
            if known is not None:
                input_ids = torch.cat([known.ids_so_far(past), input_ids], dim=1)
        # The one place that waits for the device: which samples have an image, where the last one ends, and the prompt.
        positions = torch.arange(past + prompt_len, device=image_mask.device)
        ends = [torch.where(mask, positions, -1).amax(1) for mask in (image_mask, valid)]
        seen = torch.stack([*ends, packed_rows(inputs, like=ends[0])]).tolist()
        if any(seen[2]) and self._acts:
            raise UnsupportedFeatureError(
                "The position_ids of a row start again, so that it holds several prompts (padding-free batches), which "
                "vlmfix would take for one. Pass the prompts as rows of a padded batch, with an attention_mask."
            )
        with_image = [(image_end, end) for image_end, end, _ in zip(*seen, strict=True) if image_end >= 0]
        state = SequenceState(
            self.methods,
            image_mask,
            valid,
            input_ids,
            any_image=bool(with_image),
            all_images=len(with_image) == batch,
            learned={} if known is None else dict(known.learned),
            decoded=decoded,
            prompts=with_prompt(known, past, past + prompt_len),
            branch=None if known is None else known.branch,
        )
        image_stops = [max(image_end + 1 - past, 0) for image_end, _ in with_image]
        return EditedForward(
            state,
            self.methods,
            is_prefill=True,
            past=past,
            q_len=q_len,
            prompt_len=prompt_len,
            first_rows={
                "text": min(image_stops, default=q_len),
                "last": min((max(end - past, 0) for _, end in with_image), default=q_len),
                "image_stop": max(image_stops, default=0),
            },
        )

    # An answer behind an encoder.

    def _begin_answer(
        self,
        module: nn.Module,
        cache: Any,
        state: SequenceState | None,
        inputs: dict[str, Any],
        prompt_end: int | None,
    ) -> EditedForward:
        """Begin a forward of a decoder whose encoder has read the prompt: all its rows are generated tokens'."""
        if state is not None and not is_empty(cache):
            self._check_same_methods(state)
            past: int | torch.Tensor = length_of(cache)
        else:
            past, state = self._continued(cache, state)
        begins, encoded = state is None, None
        if state is None:
            encoded = self.images.find_encoded(inputs, is_inside=self._is_inside(module))
            has_image = encoded.image_mask.any(1).tolist()
            state = SequenceState(
                self.methods,
                encoded.image_mask,
                encoded.valid_mask,
                None,
                any_image=any(has_image),
                all_images=all(has_image),
                in_encoder=True,
            )
        q_len = answer_length(inputs)
        forward = EditedForward(state, self.methods, is_prefill=False, past=past, q_len=q_len, prompt_len=0)
        forward.begins = forward.is_measured = begins
        if inputs.get("labels") is not None:
            forward.num_given = min(q_len - num_drafted(inputs) + 1, q_len)  # a row's label is the next token
        elif begins and prompt_end is not None:
            forward.num_given = prompt_end
        if encoded is not None:
            if state.any_image and self._compared:
                forward.text_only_heads = encoded_text_only_heads(
                    self.anatomy, self._compared, encoded, inputs, forward.num_given
                )
            begin_methods(self.anatomy, self._head(module), forward, inputs, self.vision)
            if cache is not None:
                self.keep(cache, state)
        return forward

    # What a call continues.

    def _continued(self, cache: Any, state: SequenceState | None) -> tuple[int, SequenceState | None]:
        """Return how many tokens a forward continues, and what is known about them."""
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and state is None and self._acts:
            raise UnsupportedFeatureError(
                "This cache was filled before the model was patched, so vlmfix does not know where its images are. "
                "Start with an empty cache."
            )
        if not past:
            return 0, None
        if state is not None:
            self._check_same_methods(state)
        return past, state

    def _check_same_methods(self, state: SequenceState) -> None:
        if state.stale and self._acts:
            raise UnsupportedFeatureError(f"{state.stale} Start with an empty cache.")
        if state.methods != self.methods:
            raise UnsupportedFeatureError(
                f"This cache was filled under {describe(state.methods)}, and the model is now patched with "
                f"{describe(self.methods)}. Start with an empty cache."
            )

    def _is_inside(self, module: nn.Module) -> bool:
        """Whether a module is (part of) a language model that ``generate`` calls inside the model."""
        return self.anatomy.language_model is not self.anatomy.model and module is not self.anatomy.model

    def _head(self, module: nn.Module) -> PreTrainedModel:
        """Return the model with the head of the language model that a module's arguments are for."""
        return self.anatomy.language_model if self._is_inside(module) else self.anatomy.model
