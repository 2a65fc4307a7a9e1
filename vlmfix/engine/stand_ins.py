"""Objects in the place of a model's methods, where a call would go another way than through a patch's hooks."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import nn

from vlmfix.errors import UnsupportedFeatureError, VlmfixError
from vlmfix.model.anatomy import FORWARD_KWARG
from vlmfix.model.products import fast_products

PROMPT_END_KWARG = "vlmfix_prompt_end"
"""The keyword argument in which ``generate`` tells the forwards that read a prompt how long it is, earlier turns
included."""


PREFILL = "_prefill"
"""The method of a model in which ``generate`` reads a prompt (since transformers 5.x)."""


BEFORE_PROMPT = "_get_initial_cache_position"
"""The method of a model that ``generate`` calls once before it reads a prompt (up to transformers 5.0)."""


PAGED = "init_continuous_batching"
"""The method of a model that every way into continuous batching passes. Its own thread would swallow the error of the
attention function."""


DRAFTS = "_get_candidate_generator"
"""The method of a model that every way into assisted decoding passes."""


class StandIns:
    """What a patch has put in the place of methods, and what was there before.

    Attributes:
        removed_in: The thread in which they were removed last.
    """

    def __init__(self) -> None:
        self.removed_in: int | None = None
        self._placed: list[tuple[nn.Module, str, Any, dict[str, Any]]] = []

    def put(self, module: nn.Module, name: str, stand_in: Any) -> None:
        """Put an object in the place of a module's method."""
        before = {name: module.__dict__[name]} if name in module.__dict__ else {}
        self._placed.append((module, name, stand_in, before))
        module.__dict__[name] = stand_in

    def remove(self) -> None:
        """Put back what was there before; what somebody else has put there since stays."""
        for module, name, stand_in, before in reversed(self._placed):
            if module.__dict__.get(name) is stand_in:
                del module.__dict__[name]
                module.__dict__.update(before)
        self._placed.clear()
        self.removed_in = threading.get_ident()


@dataclasses.dataclass(frozen=True)
class ForwardWithHooks:
    """Stands in for a model's ``forward``: ``model.forward(...)`` is ``model(...)``, which passes the hooks.

    Users call it, and so do wrappers (PEFT up to 0.20).

    Attributes:
        patch: The ``vlmfix.hooks.Patch``.
        model: The model.
        stock: Its own forward.
    """

    patch: Any
    model: nn.Module
    stock: Callable[..., Any]

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model, by which ``generate`` checks its arguments."""
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward if the hooks have been passed, else pass them.

        Raises:
            UnsupportedFeatureError: There are no hooks any more.
        """
        if args and args[0] is self.model:  # somebody took this for a function and bound it (Accelerator.unwrap_model)
            args = args[1:]
        # Somebody may have wrapped this since (offloading does), so that it stays when the patch is taken off.
        if FORWARD_KWARG in kwargs or not self.patch.is_on:
            joins = getattr(kwargs.get(FORWARD_KWARG), "joins_branches", False)
            with fast_products(self.model) if joins else nullcontext():
                return self.stock(*args, **kwargs)
        refuse_remains(self.patch, self.model)
        return self.model(*args, **kwargs)


def refuse_remains(patch: Any, model: nn.Module) -> None:
    """Refuse a patch of which somebody else has removed a part.

    Raises:
        UnsupportedFeatureError: Hooks are missing, on the model or on any of its layers.
    """
    if not patch.is_whole():
        raise UnsupportedFeatureError(
            f"Some hooks of this patched {type(model).__name__} were removed by somebody else, so vlmfix "
            "cannot act. Take the rest of the patch off, vlmfix.unpatch(model), and patch the model again."
        )


@dataclasses.dataclass(frozen=True)
class TellingPrefill:
    """Stands in for ``_prefill`` of a model: tells the forwards that they read a prompt, and how long it is.

    The forwards of a prompt in parts cannot tell by themselves: its last token alone looks like one of the answer. Nor
    can those without a cache, which read the prompt and the answer so far: they are told at every step.
    """

    model: Any

    def __call__(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Do what the model's own method does."""
        stock = getattr(type(self.model), PREFILL)
        # In place, as the method itself (of 5.0) keeps positions there.
        model_kwargs[PROMPT_END_KWARG] = _prompt_end(self.model, input_ids.shape[1], model_kwargs)
        try:
            return stock(self.model, input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            if model_kwargs.get("use_cache") is not False:
                del model_kwargs[PROMPT_END_KWARG]


@dataclasses.dataclass(frozen=True)
class TellingLength:
    """Stands in for ``BEFORE_PROMPT`` of a model without ``PREFILL``: tells the forwards how long the prompt is.

    Only without a cache, where each of them reads the prompt. With one, the first reads it and the others do not.
    """

    model: Any

    def __call__(self, seq_length: int, device: Any, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Do what the model's own method does."""
        found: dict[str, Any] = getattr(type(self.model), BEFORE_PROMPT)(self.model, seq_length, device, model_kwargs)
        if found.get("use_cache") is False:
            found[PROMPT_END_KWARG] = _prompt_end(self.model, seq_length, found)
        return found


def _prompt_end(model: Any, length: int, model_kwargs: dict[str, Any]) -> int:
    """Return how long a prompt is, earlier turns included; ``length`` is that of its ids."""
    mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
    embeds = model_kwargs.get("inputs_embeds")
    if model.config.is_encoder_decoder:
        return length  # the ids are those of the decoder
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.shape[1]  # of all turns
    if embeds is not None:
        return int(embeds.shape[1])
    if cache is not None and length <= cache.get_seq_length():
        return length + int(cache.get_seq_length())
    return length


@dataclasses.dataclass(frozen=True)
class GenerateByCall:
    """Stands in for a model's ``generate``: ``generate(..., vlmfix="vhr")`` chooses methods for that call alone.

    Attributes:
        patch: The ``vlmfix.hooks.Patch``. It is told of refused calls before their error is raised: many callers
            swallow it.
        model: The model.
        stock: What generates without it.
    """

    patch: Any
    model: nn.Module
    stock: Any

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own ``generate``."""
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the methods of the patch, with none (``vlmfix=None``), or with those that are named."""
        try:
            if kwargs.get(FORWARD_KWARG) is not None:
                return self.patch.choose(self.model, kwargs.pop(FORWARD_KWARG)).generate(*args, **kwargs)
            self.patch.tower_hooks.call(is_stock=FORWARD_KWARG in kwargs)
            if FORWARD_KWARG in kwargs:
                return self.stock(*args, **kwargs)
            return self._under_the_patch(*args, **kwargs)
        except VlmfixError as error:
            self.patch.refuse(error)
            raise

    def _under_the_patch(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, and refuse an answer during which another thread has changed what is on the model."""
        was_on, cause = self.patch.is_on, None
        try:
            answer = self.stock(*args, **kwargs)
        except Exception as error:
            if not self._was_taken_off(was_on):
                raise
            cause = error
        if self._was_taken_off(was_on):
            raise UnsupportedFeatureError(
                "Another thread took off or replaced the patch of this model while generate ran, so that its answer is "
                "neither of the patched model nor of the stock model. Change patches between calls, or let each call "
                "choose for itself: model.generate(..., vlmfix='vhr'), or vlmfix=None."
            ) from cause
        return answer

    def _was_taken_off(self, was_on: bool) -> bool:
        """Whether another thread took the patch off; a logits processor in this one knows what it does."""
        return was_on and not self.patch.is_on and self.patch.stand_ins.removed_in != threading.get_ident()


def refuse_pages(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for a model's ``PAGED``."""
    raise UnsupportedFeatureError(
        "Continuous batching (generate_batch, cache_implementation='paged') packs several prompts into one row, which "
        "vlmfix does not support. Use model.generate(...) with a padded batch, or vlmfix.unpatch(model) first."
    )


@dataclasses.dataclass(frozen=True)
class RefuseDrafts:
    """Stands in for a model's ``DRAFTS``.

    Attributes:
        model: The model.
        reason: Why drafts cannot be checked.
    """

    model: nn.Module
    reason: str

    def __call__(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Refuse, unless the call asks for the stock model (``vlmfix=None``)."""
        if model_kwargs.get(FORWARD_KWARG, self) is None:
            return getattr(type(self.model), DRAFTS)(self.model, *args, model_kwargs=model_kwargs, **kwargs)
        raise UnsupportedFeatureError(
            f"{self.reason} Leave assistant_model and prompt_lookup_num_tokens unset, or vlmfix.unpatch(model) first."
        )


def forget_compiled_code(model: nn.Module) -> None:
    """Drop code compiled before the model changed: it would go on without looking at the new hooks.

    Dynamo cannot tell which code belongs to a model, so all of it is dropped; other models only compile again.
    """
    model.__dict__.pop("_compiled_call", None)
    if "torch._dynamo" in sys.modules and torch._dynamo.utils.counters["frames"]:
        torch._dynamo.reset()
