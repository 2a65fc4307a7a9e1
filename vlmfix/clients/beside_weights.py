"""A recipe beside the weights of a model: whoever loads the folder gets the model patched."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError, UnsupportedModelError
from vlmfix.patching import MethodSpec, find_patch, patch
from vlmfix.recipes import check_placement, load_recipe, resolve_methods, save_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RECIPE_FILE = "vlmfix.json"
"""The recipe's name in a model's folder."""


GENERATE_FILE = "custom_generate/generate.py"
"""What transformers runs in the place of ``generate`` for whoever trusts the code of a model's folder."""


_GENERATE = f'''\
"""Patches the model with {RECIPE_FILE} of this folder when it first generates; needs the package vlmfix."""

from vlmfix.clients.beside_weights import generate
'''


_PATCHING = threading.Lock()


_DONE = "vlmfix_patched"
"""Marks what stands in for ``generate`` of a model that has been patched by its recipe, or by somebody else."""


def save_recipe_beside_weights(folder: str | Path, method: MethodSpec | None = None, **parameters: Any) -> None:
    """Write a recipe into a model's folder, so that whoever loads it gets the model patched.

    With ``trust_remote_code=True``, ``from_pretrained(folder)``, ``pipeline(model=folder)`` and ``transformers serve``
    give a model that patches itself when it first generates. Without, ``vlmfix.from_pretrained(folder)`` does.

    Args:
        folder: A folder with a model's config, as ``save_pretrained`` writes it.
        method: As for ``patch``.
        **parameters: Parameters of a single method given by name.

    Raises:
        UnsupportedModelError: The folder holds no model that can be patched.
        MethodError: As by ``patch``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlmfix.model.anatomy import analyse

    try:
        with torch.device("meta"):  # the structure without the weights
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{folder} holds no vision-language model: {error}") from error
    anatomy = analyse(model)
    methods = resolve_methods(method, parameters, anatomy)
    for each in methods:
        check_placement(each, anatomy)
        each.bind(anatomy)
    generate_file = Path(folder) / GENERATE_FILE
    generate_file.parent.mkdir(exist_ok=True)
    generate_file.write_text(_GENERATE, encoding="utf-8")
    save_recipe(Path(folder) / RECIPE_FILE, methods)


def from_pretrained(name: str | Path, **options: Any) -> PreTrainedModel:
    """Load a vision-language model and patch it with the recipe beside its weights.

    Args:
        name: A folder or hub id with a recipe, see ``save_recipe_beside_weights``.
        **options: As for ``AutoModelForImageTextToText.from_pretrained``.

    Raises:
        MethodError: There is no recipe, or see ``patch``.
    """
    from transformers import AutoModelForImageTextToText

    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(name, **options)
    _patch_by_recipe(model, **{key: options[key] for key in ("revision", "token", "cache_dir") if key in options})
    return model


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Stand in for ``generate`` of a model with a recipe beside its weights: patch it first, unless somebody has.

    Raises:
        MethodError: The recipe is gone, or see ``patch``.
    """
    ours = vars(model).get("generate")
    ours = ours if _is_ours(ours) else getattr(ours, "stock", None)
    was_done = not _is_ours(ours) or _DONE in vars(ours)
    with _PATCHING:
        if _is_ours(vars(model).get("generate")) and not was_done and find_patch(model) is None:
            # It stays where it is, under the patch, so that no other thread meets a model that is patched by half.
            _patch_by_recipe(model)
        if _is_ours(ours):
            vars(ours)[_DONE] = True
    # Once that is done, whoever comes here comes from the patch, or from a model that was unpatched.
    return type(model).generate(model, *args, **kwargs) if was_done else model.generate(*args, **kwargs)


def _is_ours(function: object) -> bool:
    return isinstance(function, functools.partial) and function.func is generate


def _patch_by_recipe(model: PreTrainedModel, **where: Any) -> None:
    from transformers.utils import cached_file

    where.setdefault("revision", getattr(model.config, "_commit_hash", None))
    recipe = cached_file(model.name_or_path, RECIPE_FILE, _raise_exceptions_for_missing_entries=False, **where)
    if recipe is None:
        raise MethodError(
            f"There is no {RECIPE_FILE} beside the weights of {model.name_or_path}. Write one with "
            "vlmfix.save_recipe_beside_weights(folder, 'vhr'), or patch the model: vlmfix.patch(model, 'vhr')."
        )
    methods = load_recipe(recipe)
    if any(each.searches for each in methods) and _is_ours(vars(model).get("generate")):
        del model.__dict__["generate"]  # a search refuses models with a generate of their own
    patch(model, methods)
