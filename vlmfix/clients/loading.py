"""Patches the vision-language models that somebody else's code loads."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmfix.engine.status import Status
from vlmfix.errors import UnsupportedModelError, VlmfixError
from vlmfix.patching import find_patch, patch

if TYPE_CHECKING:
    from typing_extensions import Self

    from vlmfix.hooks import Patch
    from vlmfix.methods.base import Method


class PatchedModel:
    """What is known of a model that was patched when it was loaded; it may be gone by now."""

    def __init__(self, patch_on_model: Patch) -> None:
        self._patch = weakref.ref(patch_on_model)
        self._counters = patch_on_model.counters
        self._first = patch_on_model.status()
        self.refusals = patch_on_model.refusals

    def status(self) -> Status:
        """What ``vlmfix.status`` says, or said when the model was given up."""
        found = self._patch()
        if found is not None:
            return found.status()
        prompts, without_image, steps, edited = self._counters.read()
        return dataclasses.replace(
            self._first,
            prompts=prompts,
            prompts_without_image=without_image,
            decode_steps=steps,
            edited=edited,
            moved=self._counters.read_moved(),
        )


class PatchOnLoad:
    """A ``with`` block in which every vision-language model of this process is patched.

    That is once ``from_pretrained`` returns it, or when it first generates if it was made in another way. Models of
    another kind are left alone.

    Args:
        methods: As ``patch`` takes them.

    Attributes:
        patched: The models so far.
        left_alone: Why other models are none that can be patched, by their class.
    """

    def __init__(self, methods: Sequence[Method] | None) -> None:
        self._methods = methods
        self._seen: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
        self.patched: list[PatchedModel] = []
        self.left_alone: dict[str, str] = {}

    def __enter__(self) -> Self:
        load, generate = vars(PreTrainedModel)["from_pretrained"], GenerationMixin.generate
        self._stock = load, generate

        @functools.wraps(load.__func__)
        def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
            loaded = load.__func__(cls, *args, **kwargs)
            self.patch(loaded[0] if isinstance(loaded, tuple) else loaded)  # with what could not be loaded
            return loaded

        @functools.wraps(generate)
        def generate_patched(model: Any, *args: Any, **kwargs: Any) -> Any:
            return (model.generate if self.patch(model) else functools.partial(generate, model))(*args, **kwargs)

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        GenerationMixin.generate = generate_patched
        return self

    def __exit__(self, *_: object) -> None:
        PreTrainedModel.from_pretrained, GenerationMixin.generate = self._stock

    def patch(self, model: PreTrainedModel) -> bool:
        """Patch a model that has not been seen yet, if it is a vision-language model.

        Returns:
            Whether it has just been patched.

        Raises:
            VlmfixError: It is one, and cannot be patched so.
        """
        if model in self._seen:
            return False
        self._seen.add(model)
        if find_patch(model) is not None:
            return False
        try:
            patch(model, self._methods)
        except UnsupportedModelError as error:
            if is_vision_language(model):
                raise
            self.left_alone[type(model).__name__] = str(error)
            return False
        made = find_patch(model)
        assert made is not None
        made.on_refusal = end_program
        self.patched.append(PatchedModel(made))
        return True


def is_vision_language(model: PreTrainedModel) -> bool:
    """Whether a model answers about pictures, as far as its class and config tell."""
    is_known = type(model).__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return is_known or bool(model.can_generate() and getattr(model.config, "vision_config", None))


def end_program(error: VlmfixError) -> None:
    """End the program at a refused call, which evaluators would score as an empty answer.

    In other threads, as servers have them, the error goes to whoever called.

    Raises:
        SystemExit: This is the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        sys.stderr.write(f"vlmfix: error: {error}\n")
        raise SystemExit(2) from error
