"""OPERA as a function for ``model.generate(custom_generate=...)`` of a model that is not patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vlmfix.decoding.opera import OPERA
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.patching import copy_without_weights, find_patch, patch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def opera_generate(**parameters: Any) -> Callable[..., Any]:
    """Return OPERA's search, for one call: ``model.generate(**inputs, custom_generate=vlmfix.opera_generate())``.

    The model is left alone, in other threads too: the search runs in a copy of it that shares its weights. A streamer
    is given nothing, because ``generate`` hands none to such a function.

    Args:
        **parameters: Of ``OPERA``.

    Raises:
        MethodError: A parameter is unknown or out of range.
    """
    method = OPERA(**parameters)

    def search(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> Any:
        """Search over one prompt with an image.

        Raises:
            MethodError: OPERA does not act in this model.
            UnsupportedFeatureError: Several prompts, beams that were asked of ``generate``, or no image.
        """
        if options["generation_config"].num_beams != 1 or input_ids.shape[0] != 1:
            raise UnsupportedFeatureError(
                "opera searches for one prompt at a time, with beams of its own. Call generate for each prompt, and "
                "give vlmfix.opera_generate(num_beams=...) their number."
            )
        made = find_patch(patch(copy_without_weights(model), method))
        assert made is not None and made.search is not None
        if not set(made.anatomy.image_token_ids) & set(input_ids[0].tolist()):
            raise UnsupportedFeatureError(
                "opera looks at the image, and this prompt has none. Call generate without custom_generate."
            )
        return made.search.search(method.num_beams, input_ids, **options)

    return search
