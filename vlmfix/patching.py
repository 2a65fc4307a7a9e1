"""The transaction: check, attach, record, restore. The only module that changes a model."""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vlmfix.activity import Counters, Status, describe
from vlmfix.anatomy import Anatomy, analyse, unwrap
from vlmfix.attention import ATTENTION_NAME, RUN_KWARG, SITE_ATTRIBUTE
from vlmfix.calibration.result import Calibration
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.methods.base import Method
from vlmfix.prompt import begin_methods
from vlmfix.recipes import resolve_methods
from vlmfix.run import STATE_ATTRIBUTE, Run, SequenceState, begin_prompt, state_of
from vlmfix.sites import Site, edits_text_only_stream, make_sites
from vlmfix.text_only import run_text_only
from vlmfix.vision import VisionRecorder

logger = logging.getLogger("vlmfix")

ModelT = TypeVar("ModelT")
MethodSpec = str | Path | Method | Calibration | dict[str, Any] | Sequence[str | Method | dict[str, Any]]
"""What ``patch`` takes for a method: a name, a method, its dict, a recipe file, what ``calibrate``
returned, or several of them."""


class Patch:
    """Everything one ``patch`` call changed in a model, and the hooks that run while it is on."""

    def __init__(self, anatomy: Anatomy, methods: tuple[Method, ...]) -> None:
        self.anatomy = anatomy
        self.methods = methods
        self.counters = Counters(len(methods))
        self.sites = make_sites(anatomy, methods)
        self.notes = tuple(note for method in methods for note in method.notes(anatomy))
        self.owner: Context | None = None
        self._handles: list[Any] = []
        self._needs_text = any(method.text_only_stream for method in methods if not method.is_identity)
        active = [method for method in methods if not method.is_identity]
        self._needs_past = any(site.is_sliding for site in self.sites) or any(each.needs_past for each in active)
        vision_layers = sorted({layer for method in active for layer in method.vision_layers})
        self.vision = VisionRecorder(anatomy, vision_layers) if vision_layers else None
        self._reorders = any(method.reorders for method in active)

    # Attach and restore.

    def attach(self) -> None:
        """Change the model; on any error, restore it and raise."""
        try:
            for site in self.sites:
                config = copy.copy(site.base_config)
                config.__dict__["_attn_implementation_internal"] = ATTENTION_NAME
                config.__dict__[SITE_ATTRIBUTE] = site
                site.module.config = config  # type: ignore[assignment]
            for module in dict.fromkeys([self.anatomy.model, self.anatomy.inner]):
                self._handles.append(module.register_forward_pre_hook(self.before_forward, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self.after_forward, with_kwargs=True))
            if self.vision is not None:
                self._handles += self.vision.attach()
            follows = edits_text_only_stream(self.methods)
            for site in self.sites:
                if site.readers or follows:
                    hook = LayerHook(site)
                    self._handles.append(site.decoder_layer.register_forward_pre_hook(hook.before, with_kwargs=True))
                    if follows:
                        self._handles.append(site.decoder_layer.register_forward_hook(hook.after, with_kwargs=True))
            _forget_compiled_code(self.anatomy.model)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for site in self.sites:
            if getattr(site.module.config, SITE_ATTRIBUTE, None) is site:
                site.module.config = site.base_config
        _forget_compiled_code(self.anatomy.model)

    # Hooks on the model.

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the ``Run`` of this forward to its keyword arguments, unless the caller (or an outer hook) chose one."""
        if RUN_KWARG in kwargs:
            return None
        inputs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
        cache = inputs.get("past_key_values")
        state = state_of(cache)
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # the model itself says what is missing
        q_len = tokens.shape[1]
        # A draft is always checked with a cache; without one, many logits are just wanted.
        drafted = 0 if cache is None else _num_drafted(kwargs)
        is_draft = q_len - drafted <= 1 and not _has_images(kwargs)
        if state is not None and (q_len == 1 or is_draft) and not _is_empty(cache):
            run = self._begin_decode(cache, state, inputs.get("input_ids"), q_len)
        else:
            run = self._begin_prompt(cache, state, inputs, drafted)
        return args, {**kwargs, RUN_KWARG: run}

    def _begin_decode(self, cache: Any, state: SequenceState, input_ids: torch.Tensor | None, q_len: int) -> Run:
        self._check_same_methods(state)
        keeps_ids = self._needs_text and not torch.compiler.is_compiling()
        past: int | torch.Tensor = 0
        is_static = getattr(cache, "is_compileable", False)
        if self._needs_past or keeps_ids or not is_static:
            past = cache.get_seq_length()
            past = past.clone() if isinstance(past, torch.Tensor) else past  # a static cache counts in place
        if not is_static and past < state.image_mask.shape[1]:
            state = state.cropped(int(past))
            setattr(cache, STATE_ATTRIBUTE, state)
        if keeps_ids and input_ids is not None:
            state.decoded.append((past, input_ids))
        state.is_answered = True
        return Run(state, self.counters, is_prefill=False, past=past, q_len=q_len, prompt_len=0)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin_prompt(self, cache: Any, state: SequenceState | None, inputs: dict[str, Any], drafted: int) -> Run:
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and state is None:
            raise UnsupportedFeatureError(
                "This cache was filled before the model was patched, so vlmfix does not know where its images are. "
                "Start with an empty cache."
            )
        if not past:
            state = None
        if state is not None:
            self._check_same_methods(state)
        input_ids = inputs.get("input_ids")
        image_mask = self._image_mask(input_ids, inputs.get("inputs_embeds"))
        prompt_len = image_mask.shape[1] - drafted
        if drafted and (prompt_len <= 1 or bool(image_mask[:, prompt_len:].any())):
            drafted = 0  # a prompt whose caller wants many logits
        run = begin_prompt(
            self.methods,
            self.counters,
            input_ids=input_ids,
            image_mask=image_mask,
            attention_mask=inputs.get("attention_mask"),
            known=state,
            past=past,
            drafted=drafted,
            text_only=lambda new_state: run_text_only(self.anatomy.inner, self.sites, new_state),
        )
        begin_methods(self.anatomy, run, inputs, self.vision)
        if cache is not None:
            self._keep(cache, run.state)
        return run

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

    def _image_mask(self, input_ids: torch.Tensor | None, embeds: torch.Tensor | None) -> torch.Tensor:
        ids = self.anatomy.image_token_ids
        if input_ids is not None:
            mask: torch.Tensor = input_ids == ids[0]
            for other in ids[1:]:
                mask = mask | (input_ids == other)
            return mask
        assert embeds is not None
        embedding = self.anatomy.model.get_input_embeddings()
        rows = embedding(torch.tensor(ids, device=embeds.device).clamp_max(embedding.num_embeddings - 1))
        mask = (embeds[:, :, None] == rows.to(embeds)).all(-1).any(-1)
        if not bool(mask.any()):
            raise UnsupportedFeatureError(
                "The model was called with inputs_embeds that hold no image placeholder, so vlmfix cannot tell which "
                "of them are image tokens. Pass input_ids and pixel_values and let the model merge them, or call "
                "vlmfix.unpatch(model) first."
            )
        return mask

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Settle what was learned; keep the state on a cache the model made itself."""
        run = kwargs.get(RUN_KWARG)
        if not isinstance(run, Run) or run.finished:
            return
        run.finish()
        if run.is_prefill:
            parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
            for cache in parts:
                if hasattr(cache, "get_seq_length"):
                    self._keep(cache, run.state)

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


class ReorderWithState:
    """A cache's ``reorder_cache`` that takes along what methods learned; kept on the cache, so it is copied with it."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, beam_idx: torch.Tensor) -> None:
        """Reorder the cache and its state: row ``i`` continues row ``beam_idx[i]``."""
        type(self.cache).reorder_cache(self.cache, beam_idx)
        state = state_of(self.cache)
        if state is not None:
            state.reorder(beam_idx)


class LayerHook:
    """Hooks on one decoder layer, as bound methods: they follow ``copy.deepcopy(model)``."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show the layer's input to the run."""
        run = kwargs.get(RUN_KWARG)
        if run is not None:
            run.before_layer(self.site, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Tell the run that the layer is done."""
        run = kwargs.get(RUN_KWARG)
        if run is not None:
            run.after_layer(self.site)


def patch(model: ModelT, method: MethodSpec | None = None, **parameters: Any) -> ModelT:
    """Patch a vision-language model in place, so that ``generate`` and pipelines hallucinate less.

    Args:
        model: A Hugging Face vision-language model, a pipeline, or a PEFT-wrapped or compiled model.
        method: A method's name, a method object, several of them, or a recipe (dict or JSON file). ``None`` takes the
            default recipe of the model family.
        **parameters: Parameters of a single method given by name.

    Returns:
        ``model`` itself.

    Raises:
        UnsupportedModelError: The model cannot be patched; it is unchanged.
        MethodError: Unknown method, unknown parameter, value out of range, or methods that do not compose.

    Patching a patched model replaces the first patch. ``unpatch`` restores the stock model bit for bit.
    """
    anatomy = analyse(model)
    wanted = resolve_methods(method, parameters, anatomy)
    previous = find_patch(model)
    if previous is not None:
        previous.detach()
    try:
        bound = tuple(each.bind(anatomy) for each in wanted)
        new = Patch(anatomy, bound)
        if not new.sites:
            raise MethodError(
                f"{describe(bound)} touches no attention layer of this model (softmax attention is in layers "
                f"{sorted({site.layer_idx for site in anatomy.sites})}). Choose others with layers=..."
            )
        new.attach()
    except BaseException:
        if previous is not None:
            previous.attach()
        raise
    logger.info("%s", new.status())
    return model


def unpatch(model: ModelT) -> ModelT:
    """Take the patch off: the model is bitwise the stock model again. Without a patch, do nothing.

    Returns:
        ``model`` itself.
    """
    found = find_patch(model)
    if found is not None:
        found.detach()
    return model


@contextmanager
def patched(model: ModelT, method: MethodSpec | None = None, **parameters: Any) -> Iterator[ModelT]:
    """Patch a model inside a ``with`` block and restore what was there before, also after an exception.

    Blocks may end in any order: the model is stock again once the last one has ended.
    """
    context = Context(before=find_patch(model))
    patch(model, method, **parameters)
    mine = find_patch(model)
    assert mine is not None
    mine.owner = context
    try:
        yield model
    finally:
        context.is_over = True
        current = find_patch(model)
        if current is None or current.owner is None or current.owner.is_over:
            if current is not None:
                current.detach()
            before = context.before
            while before is not None and before.owner is not None and before.owner.is_over:
                before = before.owner.before
            if before is not None:
                before.attach()


@dataclasses.dataclass(eq=False)
class Context:
    """A ``with vlmfix.patched(...)`` block.

    Attributes:
        before: The patch that was on the model when it began.
        is_over: Whether it has ended.
    """

    before: Patch | None
    is_over: bool = False


def status(model: object) -> Status | None:
    """Return what is active on a model, or ``None`` for a model that is not patched."""
    found = find_patch(model)
    return None if found is None else found.status()


def find_patch(model: object) -> Patch | None:
    """Return the patch on a model. It is found by its hooks, so a deep copy of a patched model has its own."""
    for module in unwrap(model).modules():  # a patch may have been put on an inner model
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Patch):
                return owner
    return None


def _num_drafted(kwargs: dict[str, Any]) -> int:
    """How many of the new tokens are a drafted answer rather than a prompt.

    Assisted decoding asks for the logits of the token before the draft and of every drafted one, also in the forward
    that reads the prompt; a caller who scores an answer behind a prompt does the same. Otherwise it is none.
    """
    wanted = kwargs.get("logits_to_keep")
    return max(wanted - 1, 0) if isinstance(wanted, int) else 0


def _has_images(kwargs: dict[str, Any]) -> bool:
    """Whether a forward brings images of its own, encoded or not; one that checks a draft never does."""
    return any(
        value is not None and (name.startswith("pixel_values") or (name == "mm_encoder_outputs" and bool(value)))
        for name, value in kwargs.items()
    )


def _is_empty(cache: Any) -> bool:
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor):
        # A static cache counts on the device; waiting for it at every step would cost more than it can find.
        return length.device.type == "cpu" and not torch.compiler.is_compiling() and int(length) == 0
    return int(length) == 0


def _forget_compiled_code(model: nn.Module) -> None:
    """Drop code compiled before the model changed: it would go on without looking at the new hooks.

    Dynamo cannot tell which code belongs to a model, so all of it is dropped; other models only compile again.
    """
    model.__dict__.pop("_compiled_call", None)
    if "torch._dynamo" in sys.modules and torch._dynamo.utils.counters["frames"]:
        torch._dynamo.reset()
