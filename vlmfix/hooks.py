"""What a patch hangs on a model: hooks that begin forwards, config copies that lead attention to vlmfix.

The only module that changes a model.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from vlmfix.decoding.base import DecodingMethod
from vlmfix.decoding.branch import PairedForward
from vlmfix.decoding.opera import OPERA
from vlmfix.decoding.opera_search import GenerateWithOpera
from vlmfix.decoding.other_image import RAW_IMAGES_KWARG
from vlmfix.decoding.two_branches import DRAFTS, TwoBranches
from vlmfix.engine.attend import ATTENTION_NAME
from vlmfix.engine.image_free import encode_text_only, run_text_only
from vlmfix.engine.plan import Site, edits_text_only_stream, make_sites
from vlmfix.engine.prompt_pass import begin_methods
from vlmfix.engine.start import (
    ReorderWithState,
    answer_length,
    begin_answer,
    begin_prompt,
    check_batch,
    every_row,
    has_images,
    is_empty,
    length_of,
    num_drafted,
    parameter_names,
)
from vlmfix.engine.status import Counters, Status, describe
from vlmfix.engine.stream import EarlyHead, make_block_hooks
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.views import STATE_ATTRIBUTE, Forward, SequenceState, state_of
from vlmfix.model.anatomy import FORWARD_KWARG, SITE_ATTRIBUTE
from vlmfix.model.images import ImageFinder
from vlmfix.model.vision_tower import VisionRecorder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmfix.methods.base import Method
    from vlmfix.model.anatomy import Anatomy


@dataclasses.dataclass(eq=False)
class Context:
    """A ``with vlmfix.patched(...)`` block.

    Attributes:
        before: The patch that was on the model when it began.
        is_over: Whether it has ended.
    """

    before: Patch | None
    is_over: bool = False


class Patch:
    """Everything one ``patch`` call changed in a model, and the hooks that run while it is on."""

    def __init__(self, anatomy: Anatomy, methods: tuple[Method, ...]) -> None:
        self.anatomy = anatomy
        self.methods = methods
        self.counters = Counters(len(methods))
        self.sites = make_sites(anatomy, methods)
        self.block_hooks = make_block_hooks(anatomy, methods)
        self.early_head = EarlyHead(anatomy, methods)
        self.notes = tuple(note for method in methods for note in method.notes(anatomy))
        self.images = ImageFinder(anatomy)
        self.owner: Context | None = None
        self._handles: list[Any] = []
        self._stand_ins: list[tuple[nn.Module, str, Any, dict[str, Any]]] = []
        self._hooked = tuple(dict.fromkeys([anatomy.model, anatomy.language_model, anatomy.inner]))
        self._parameters = {type(module): parameter_names(module) for module in self._hooked}
        active = [method for method in methods if not method.is_identity]
        self._needs_text = any(method.text_only_stream or method.needs_ids for method in active)
        self._needs_past = any(site.is_sliding for site in self.sites) or any(each.needs_past for each in active)
        takes = self._parameters[type(anatomy.language_model)]
        self._cannot_tell_drafts = bool(active) and anatomy.encoder is None and "logits_to_keep" not in takes
        vision_layers = sorted({layer for method in active for layer in method.vision_layers})
        self.vision = VisionRecorder(anatomy, vision_layers) if vision_layers else None
        self._needs_cache = [method.name for method in active if method.needs_cache]
        self.branches = next(
            (
                TwoBranches(anatomy, method, number, self.counters)
                for number, method in enumerate(methods)
                if isinstance(method, DecodingMethod) and not method.is_identity
            ),
            None,
        )
        self.search = next(
            (
                GenerateWithOpera(anatomy, method, number, self.counters)
                for number, method in enumerate(methods)
                if isinstance(method, OPERA)
            ),
            None,
        )
        self._reorders = self.branches is not None or any(method.reorders for method in active)
        # The stock model may read only the rows whose logits are wanted there (Gemma 4).
        read = anatomy.sites if self.block_hooks else self.sites
        self._edits_shared = bool(active) and any(getattr(s.module, "is_kv_shared_layer", False) for s in read)

    # Attach and restore.

    def attach(self) -> None:
        """Change the model; on any error, restore it and raise."""
        try:
            for site in self.sites:
                config = copy.copy(site.base_config)
                config.__dict__["_attn_implementation_internal"] = ATTENTION_NAME
                config.__dict__[SITE_ATTRIBUTE] = site
                site.module.config = config  # type: ignore[assignment]
            for module in self._hooked:
                self._handles.append(module.register_forward_pre_hook(self.before_forward, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self.after_forward, with_kwargs=True))
            for model in dict.fromkeys([self.anatomy.model, self.anatomy.language_model]):
                self._put(model, _PAGED, _refuse_paged)
            for decoder in (self.branches, self.search):
                for name, stand_in in decoder.stand_ins().items() if decoder else ():
                    self._put(self.anatomy.model, name, stand_in)
            if self.branches is None and self._cannot_tell_drafts:
                self._put(self.anatomy.language_model, DRAFTS, _refuse_drafts)
            self._handles += self.images.attach()
            if self.vision is not None:
                self._handles += self.vision.attach()
            follows = edits_text_only_stream(self.methods)
            for site in self.sites:
                if site.readers or follows:
                    hook = LayerHook(site)
                    self._handles.append(site.decoder_layer.register_forward_pre_hook(hook.before, with_kwargs=True))
                    if follows:
                        self._handles.append(site.decoder_layer.register_forward_hook(hook.after, with_kwargs=True))
            for block_hooks in self.block_hooks:  # behind those, which may run a layer within a layer
                self._handles += block_hooks.attach()
            _forget_compiled_code(self.anatomy.model)
        except BaseException:
            self.detach()
            raise

    def _put(self, model: nn.Module, name: str, stand_in: Any) -> None:
        """Let ``stand_in`` take the place of a method of a model; what somebody else has put there comes back."""
        before = {name: vars(model)[name]} if name in vars(model) else {}
        self._stand_ins.append((model, name, stand_in, before))
        model.__dict__[name] = stand_in

    def detach(self) -> None:
        """Restore the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for model, name, stand_in, before in reversed(self._stand_ins):
            if vars(model).get(name) is stand_in:  # else somebody else has put something there since
                del model.__dict__[name]
                model.__dict__.update(before)
        self._stand_ins.clear()
        for site in self.sites:
            if getattr(site.module.config, SITE_ATTRIBUTE, None) is site:
                site.module.config = site.base_config
        _forget_compiled_code(self.anatomy.model)

    # Hooks on the model.

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add a ``Forward`` to the keyword arguments, unless the caller (or an outer hook) chose one."""
        raw = None
        if RAW_IMAGES_KWARG in kwargs:
            kwargs = dict(kwargs)
            raw = kwargs.pop(RAW_IMAGES_KWARG)
        if FORWARD_KWARG in kwargs:
            if module is self.anatomy.inner and isinstance(kwargs[FORWARD_KWARG], Forward):
                kwargs[FORWARD_KWARG].hold_past()
            return None if raw is None else (args, kwargs)
        inputs = {**dict(zip(self._parameters[type(module)], args, strict=False)), **kwargs}
        cache = inputs.get("past_key_values")
        state = state_of(cache)
        if self.anatomy.encoder is not None:
            return args, {**kwargs, FORWARD_KWARG: self._begin_answer(module, cache, state, inputs)}
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # the model itself says what is missing
        q_len = tokens.shape[1]
        # A draft is always checked with a cache (which some versions leave to the model to make); without one, many
        # logits are just wanted.
        drafted = num_drafted(inputs) if cache is not None or inputs.get("use_cache") else 0
        is_draft = q_len - drafted <= 1 and not has_images(inputs)
        if state is not None and (q_len == 1 or is_draft) and not is_empty(cache):
            if state.image_mask.shape[0] > 1 or self._reorders:  # a single prompt may be continued in several ways
                check_batch(state, tokens.shape[0])
            forward = self._begin_decode(module, cache, state, inputs.get("input_ids"), q_len)
        else:
            forward = self._begin_prompt(module, cache, state, inputs, drafted)
        if self.branches is not None and module is self.anatomy.model:
            chosen, kwargs = self.branches.begin(forward, inputs, kwargs, raw)
            if isinstance(chosen, PairedForward):
                return (), {**kwargs, FORWARD_KWARG: chosen}
        rows = every_row(kwargs, tokens) if self._edits_shared and forward.state.any_image else {}
        return args, {**kwargs, **rows, FORWARD_KWARG: forward}

    def _begin_decode(
        self, module: nn.Module, cache: Any, state: SequenceState, input_ids: torch.Tensor | None, q_len: int
    ) -> Forward:
        self._check_same_methods(state)
        keeps_ids = self._needs_text and not torch.compiler.is_compiling()
        past: int | torch.Tensor = 0
        is_static = getattr(cache, "is_compileable", False)
        if self._needs_past or keeps_ids or not is_static:
            # The outermost hooks are compiled by themselves: a copy made there would be a graph of its own.
            is_later = is_static and torch.compiler.is_compiling() and module is not self.anatomy.inner
            past = cache.get_seq_length() if is_later else length_of(cache)
        if not is_static and past < state.image_mask.shape[1]:
            state = state.cropped(int(past))
            setattr(cache, STATE_ATTRIBUTE, state)
        if keeps_ids and input_ids is not None:
            state.decoded.append((past, input_ids))
        state.is_answered = True
        forward = Forward(state, self.counters, is_prefill=False, past=past, q_len=q_len, prompt_len=0)
        forward.past_is_live = isinstance(past, torch.Tensor) and torch.compiler.is_compiling()
        return forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_prompt(
        self, module: nn.Module, cache: Any, state: SequenceState | None, inputs: dict[str, Any], drafted: int
    ) -> Forward:
        past, state = self._continued(cache, state)
        if self._needs_cache and cache is None and self._is_step_without_cache(inputs):
            raise UnsupportedFeatureError(
                f"{self._needs_cache[0]} edits a prompt otherwise than the tokens generated behind it, and without a "
                "cache every new token makes all of them a prompt. Leave use_cache on."
            )
        input_ids = inputs.get("input_ids")
        image_mask = self.images.find(inputs, past=past, is_inside=self._is_inside(module))
        # Only inside a vision-language model: elsewhere a prompt is more than its embeddings.
        embeds = inputs.get("inputs_embeds") if self._is_inside(module) and not past else None
        prompt_len = image_mask.shape[1] - drafted
        if drafted and (prompt_len <= 1 or bool(image_mask[:, prompt_len:].any())):
            drafted = 0  # a prompt whose caller wants many logits
        forward = begin_prompt(
            self.methods,
            self.counters,
            input_ids=input_ids,
            image_mask=image_mask,
            attention_mask=inputs.get("attention_mask"),
            known=state,
            past=past,
            drafted=drafted,
            text_only=lambda new_state: run_text_only(self.anatomy, self.sites, new_state, inputs, embeds),
        )
        begin_methods(self.anatomy, self._head(module), forward, inputs, self.vision, embeds)
        if cache is not None:
            self._keep(cache, forward.state)
        return forward

    def _is_step_without_cache(self, inputs: dict[str, Any]) -> bool:
        """Whether a forward is one of ``generate`` without a cache, which asks for few logits where it can."""
        takes = self._parameters[type(self.anatomy.language_model)]
        few = inputs.get("logits_to_keep") is not None or "logits_to_keep" not in takes
        return few and inputs.get("use_cache") is False

    def _begin_answer(
        self, module: nn.Module, cache: Any, state: SequenceState | None, inputs: dict[str, Any]
    ) -> Forward:
        """Start a forward of an encoder-decoder model: every token of its decoder counts as generated."""
        if state is not None and not is_empty(cache):
            self._check_same_methods(state)
            past: int | torch.Tensor = length_of(cache)
        else:
            past, state = self._continued(cache, state)
        forward = begin_answer(
            self.methods,
            self.counters,
            encoded=None if state else self.images.find_encoded(inputs, is_inside=self._is_inside(module)),
            known=state,
            past=past,
            q_len=answer_length(inputs),
            text_only=lambda encoded: encode_text_only(self.anatomy, self.sites, encoded, inputs),
        )
        if forward.begins:
            begin_methods(self.anatomy, self._head(module), forward, inputs, self.vision)
            if cache is not None:
                self._keep(cache, forward.state)
        return forward

    def _continued(self, cache: Any, state: SequenceState | None) -> tuple[int, SequenceState | None]:
        """Return how many tokens a forward continues, and what is known about them."""
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and state is None:
            raise UnsupportedFeatureError(
                "This cache was filled before the model was patched, so vlmfix does not know where its images are. "
                "Start with an empty cache."
            )
        if not past:
            return 0, None
        if state is not None:
            self._check_same_methods(state)
            if past < state.image_mask.shape[1]:
                state = state.cropped(past)
        return past, state

    def _is_inside(self, module: nn.Module) -> bool:
        """Whether a module is (part of) a language model that ``generate`` calls inside the model."""
        return self.anatomy.language_model is not self.anatomy.model and module is not self.anatomy.model

    def _head(self, module: nn.Module) -> PreTrainedModel:
        """Return the model with the head of the language model that a module's arguments are for."""
        return self.anatomy.language_model if self._is_inside(module) else self.anatomy.model

    def _keep(self, cache: Any, state: SequenceState) -> None:
        setattr(cache, STATE_ATTRIBUTE, state)
        if self._reorders and hasattr(cache, "reorder_cache"):
            cache.reorder_cache = ReorderWithState(cache)

    def _check_same_methods(self, state: SequenceState) -> None:
        if state.methods != self.methods:
            raise UnsupportedFeatureError(
                f"This cache was filled under {describe(state.methods)}, and the model is now patched with "
                f"{describe(self.methods)}. Start with an empty cache."
            )

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Settle what was learned, keep the state on a new cache, mix logits, run the other branch."""
        forward = kwargs.get(FORWARD_KWARG)
        if not isinstance(forward, (Forward, PairedForward)):
            return None
        own = forward.own if isinstance(forward, PairedForward) else forward
        if own is forward and not own.finished:
            self._settle(own, output)
        mixed = None
        if own.early and module is self.anatomy.language_model:
            inputs = {**dict(zip(self._parameters[type(module)], args, strict=False)), **kwargs}
            mixed = output = self.early_head.mix(own, output, inputs)
        if self.branches is None or module is not self.anatomy.model:
            return mixed
        return self.branches.finish(forward, output)

    def _settle(self, forward: Forward, output: Any) -> None:
        forward.finish()
        if forward.begins:
            parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
            for cache in parts:
                if hasattr(cache, "get_seq_length"):
                    self._keep(cache, forward.state)

    def status(self) -> Status:
        """Describe the patch."""
        prompts, prompts_without_image, decode_steps, edited = self.counters.read()
        return Status(
            model=type(self.anatomy.model).__name__,
            methods=self.methods,
            layers=tuple(sorted({layer for method in self.methods for layer in method.layer_indices})),
            image_token_ids=self.anatomy.image_token_ids,
            prompts=prompts,
            prompts_without_image=prompts_without_image,
            decode_steps=decode_steps,
            edited=edited,
            notes=self.notes,
        )


class LayerHook:
    """Hooks on one decoder layer, as bound methods: they follow ``copy.deepcopy(model)``."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show the layer's input to the forward."""
        forward = kwargs.get(FORWARD_KWARG)
        if forward is not None:
            forward.before_layer(self.site, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Tell the forward that the layer is done."""
        forward = kwargs.get(FORWARD_KWARG)
        if forward is not None:
            forward.after_layer(self.site)


_PAGED = "init_continuous_batching"
"""The method of a model that every way into continuous batching passes."""


def _refuse_paged(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for ``init_continuous_batching``: its own thread would swallow the error of the attention function."""
    raise UnsupportedFeatureError(
        "Continuous batching (generate_batch, cache_implementation='paged') packs several prompts into one row, which "
        "vlmfix does not support. Use model.generate(...) with a padded batch, or vlmfix.unpatch(model) first."
    )


def _refuse_drafts(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for ``_get_candidate_generator`` where nothing in a forward tells drafted tokens from a further turn."""
    raise UnsupportedFeatureError(
        "This model takes no logits_to_keep, by which vlmfix tells drafted tokens from a prompt. Leave assistant_model "
        "and prompt_lookup_num_tokens unset, or vlmfix.unpatch(model) first."
    )


def _forget_compiled_code(model: nn.Module) -> None:
    """Drop code compiled before the model changed: it would go on without looking at the new hooks.

    Dynamo cannot tell which code belongs to a model, so all of it is dropped; other models only compile again.
    """
    model.__dict__.pop("_compiled_call", None)
    if "torch._dynamo" in sys.modules and torch._dynamo.utils.counters["frames"]:
        torch._dynamo.reset()
