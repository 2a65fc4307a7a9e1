"""lm-evaluation-harness: the model ``vlmfix``, which is ``hf-multimodal`` with a patch.

    lm_eval --model vlmfix --model_args pretrained=MODEL,method=vhr,method.alpha=2 --tasks ...

Releases that load no models of other packages know it once this module is imported.
"""

from __future__ import annotations

from typing import Any

from vlmfix.clients.loading import end_program
from vlmfix.clients.options import methods_among
from vlmfix.engine.status import describe
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.patching import find_patch, patch

try:
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
    from lm_eval.models.hf_vlms import HFMultimodalLM
except ImportError:  # nobody uses this class then, but every module of the package can be imported
    MODEL_REGISTRY, register_model, HFMultimodalLM = {"vlmfix": None}, None, object


class PatchedLM(HFMultimodalLM):  # type: ignore[misc]
    """A patched vision-language model.

    Args:
        pretrained: As of ``hf-multimodal``.
        **arguments: Those of ``hf-multimodal``, ``method`` (a method's name, a recipe file or ``default``), and the
            method's parameters as ``method.KEY``.

    Raises:
        VlmfixError: The method is unknown, or the model cannot be patched so.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        methods, rest = methods_among(arguments)
        super().__init__(pretrained, **rest)
        patch(self.model, methods)
        made = find_patch(self.model)
        assert made is not None
        made.on_refusal = end_program
        self._methods = describe(made.methods)

    def get_model_info(self) -> dict[str, Any]:
        """Return what stands in the head of the results, the methods too."""
        return {**super().get_model_info(), "vlmfix": self._methods}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a cache of answers.

        Raises:
            UnsupportedFeatureError: There is one: its keys do not name the model.
        """
        if getattr(cache_hook, "dbdict", None) is not None:
            raise UnsupportedFeatureError(
                "lm_eval --use_cache keeps answers under keys that name neither the model nor its patch, so that one "
                "would be given the other's. Leave it out."
            )
        super().set_cache_hook(cache_hook)


if "vlmfix" not in MODEL_REGISTRY:
    register_model("vlmfix")(PatchedLM)
