"""lmms-eval: the model ``vlmfix``, which is any of its models with a patch.

    python -m lmms_eval --model vlmfix --model_args base=llava_hf,pretrained=MODEL,method=vhr,method.alpha=2 --tasks ...

The method stands in the results and in the keys of cached answers, as do all arguments of a model.
"""

from __future__ import annotations

from typing import Any

from vlmfix.clients.loading import PatchOnLoad
from vlmfix.clients.options import methods_among
from vlmfix.errors import MethodError, UnsupportedModelError

try:
    from lmms_eval.api.model import lmms
except ImportError:  # nobody uses this class then, but every module of the package can be imported
    lmms = object


class PatchedModel(lmms):  # type: ignore[misc]
    """Makes a model of lmms-eval, patched; it is never one itself."""

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Return the model named ``base``, with its model patched.

        Args:
            arg_string: ``base=NAME``, ``method=NAME``, the method's parameters as ``method.KEY``, and the arguments of
                the base, all joined by commas.
            additional_config: Batch size and device, as lmms-eval gives them.

        Raises:
            VlmfixError: No base or method is named, or the base loads no model that can be patched so.
        """
        from lmms_eval.models import get_model
        from lmms_eval.utils import simple_parse_args_string

        methods, rest = methods_among(simple_parse_args_string(arg_string))
        if "base" not in rest:
            raise MethodError("Name a model of lmms-eval among the model's arguments: base=llava_hf.")
        base = rest.pop("base")
        with PatchOnLoad(methods) as loading:
            made = get_model(base)(**rest, **{k: v for k, v in (additional_config or {}).items() if v is not None})
        if not loading.patched:
            raise UnsupportedModelError(f"{base} loads no vision-language model of transformers in this process.")
        return made


def manifest() -> Any:
    """Return what lmms-eval wants to know of the model; the entry point of the group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlmfix", chat_class_path=f"{__name__}.{PatchedModel.__name__}")
