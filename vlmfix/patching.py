"""The transaction: check, attach, restore; which patch is on a model."""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from vlmfix.engine.status import Status, describe
from vlmfix.errors import MethodError, UnsupportedFeatureError
from vlmfix.hooks import PATCH_ATTRIBUTE, Context, Patch
from vlmfix.methods.base import Method
from vlmfix.methods.measured import Calibration
from vlmfix.model.anatomy import analyse, unwrap
from vlmfix.model.uncopied import standing
from vlmfix.recipes import check_placement, layers_with, resolve_methods

logger = logging.getLogger("vlmfix")


ModelT = TypeVar("ModelT")


MethodSpec = str | Path | Method | Calibration | dict[str, Any] | Sequence[str | Method | dict[str, Any]]
"""What ``patch`` takes for a method: a name, a method, its dict, a recipe file, what ``calibrate``
returned, or several of them."""


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
        MethodError: Unknown method, unknown parameter, value out of range, methods that do not compose, or one that
            means nothing in this model.

    Patching a patched model replaces the first patch. ``unpatch`` restores the stock model bit for bit.

    On a patched model a single call may choose for itself, in any thread: ``model.generate(..., vlmfix=None)`` is the
    stock model's, and ``model.generate(..., vlmfix="vhr")`` that of other methods, given as ``method`` is here.
    ``status`` counts the patch's own forwards only.
    """
    anatomy = analyse(model)
    wanted = resolve_methods(method, parameters, anatomy)
    previous = find_patch(model)
    if previous is not None:
        previous.detach()
    try:
        for each in wanted:
            check_placement(each, anatomy)
        bound = tuple(each.bind(anatomy) for each in wanted)
        new = Patch(anatomy, bound, under_methods)
        acts_elsewhere = any(each.replaces_logits or each.rewrites_answers for each in bound)
        if not new.sites and not new.block_hooks and not acts_elsewhere:
            raise MethodError(
                f"{describe(bound)} touches no attention layer of this model (the attention it acts in is in layers "
                f"{layers_with(bound, anatomy)}). Choose others with layers=..."
            )
        new.attach()
    except BaseException:
        if previous is not None:
            previous.attach()
        raise
    for caution in (caution for each in bound for caution in each.cautions(anatomy)):
        warnings.warn(f"{caution} ({type(anatomy.model).__name__}).", stacklevel=2)
    logger.info("%s", new.status())
    return model


_MAKING_VARIANT = threading.Lock()


_VARIANTS_KEPT = 32
"""How many methods of single calls are kept beside a patch: whoever asks a server could think of ever new ones."""


def under_methods(model: PreTrainedModel, method: MethodSpec) -> PreTrainedModel:
    """Return a patched model's twin with the same weights under other methods, for a single call; made once.

    All its modules, configs and hooks are its own, so that it neither sees nor changes the patch on ``model``. Its
    parameters and buffers are those of ``model``, the same objects.

    Raises:
        MethodError: As by ``patch``.
        UnsupportedFeatureError: The model cannot be copied without its weights.
    """
    patch_on_model = find_patch(model)
    assert patch_on_model is not None
    key = describe(resolve_methods(method, {}, patch_on_model.anatomy))
    made_of = standing(model)  # dtype, device, adapters or hooks may have changed since
    with _MAKING_VARIANT:
        known, variant = patch_on_model.variants.get(key, (None, None))
        if known != made_of:
            variant = patch(copy_without_weights(model), method)
            patch_on_model.variants[key] = (made_of, variant)
            if len(patch_on_model.variants) > _VARIANTS_KEPT:
                del patch_on_model.variants[next(iter(patch_on_model.variants))]
    variant.generation_config = model.generation_config
    return variant


def copy_without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with modules, configs and hooks of its own, and the same weights.

    Raises:
        UnsupportedFeatureError: The weights are offloaded.
    """
    if {"cpu", "disk"} & set(map(str, (getattr(model, "hf_device_map", None) or {}).values())):
        raise UnsupportedFeatureError(
            "Weights of this model are offloaded, so that no second model can share them. Choose methods with "
            "'with vlmfix.patched(model, ...)', in one thread at a time."
        )
    with _no_hooks_being_installed():
        return copy.deepcopy(model, _weights(model))  # what is in the memo is not copied


def _no_hooks_being_installed() -> AbstractContextManager[Any]:
    """Wait for another thread whose forward is the model's first to collect hidden states.

    transformers then hooks the layers one after the other, and a copy made meanwhile would take itself for hooked.
    Older versions install no such hooks.
    """
    try:
        from transformers.utils.output_capturing import _hook_installation_lock
    except ImportError:
        return nullcontext()
    lock: AbstractContextManager[Any] = _hook_installation_lock
    return lock


def _weights(model: PreTrainedModel) -> dict[int, Any]:
    """Return a model's parameters and buffers by their ids."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


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


def status(model: object) -> Status | None:
    """Return what is active on a model, or ``None`` for a model that is not patched."""
    found = find_patch(model)
    return None if found is None else found.status()


def find_patch(model: object) -> Patch | None:
    """Return the patch on a model, or on one inside it. A deep copy of a patched model has its own."""
    found = (module.__dict__.get(PATCH_ATTRIBUTE) for module in unwrap(model).modules())
    return next((each for each in found if each is not None), None)
