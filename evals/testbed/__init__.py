"""The embedded vision-language models and their scenes.

``MODEL_DIR`` is an ordinary ``from_pretrained`` folder; :func:`prepare` writes the scenes of a split as a COCO folder.
Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .captions import DETAILED_PROMPTS, SHORT_ANSWER
from .export import default_cache_dir, prepare
from .models import CAPTION_TOKENS, MODELS, OF_SMOL, ModelName, load, model_folder
from .scenes import SPLITS, Split

__all__ = [
    "CAPTION_TOKENS",
    "MODELS",
    "MODEL_DIR",
    "OF_SMOL",
    "PROMPTS",
    "RECIPES",
    "SPLITS",
    "ModelName",
    "Split",
    "default_cache_dir",
    "load",
    "model_folder",
    "prepare",
]


MODEL_DIR = Path(__file__).parent / "model"
"""Folder for ``AutoModelForImageTextToText.from_pretrained`` and ``AutoProcessor.from_pretrained``."""


RECIPES: Mapping[str | None, Path] = MappingProxyType(
    {
        None: Path(__file__).parent / "recipe.json",
        "smol": Path(__file__).parent / "smol" / "recipe.json",
        "smol-seed1": Path(__file__).parent / "smol" / "recipe_seed1.json",
    }
)
"""Method strengths by the model's name (None: the default model), chosen on the calibration split."""


PROMPTS: Mapping[str, str] = MappingProxyType(
    {"describe": DETAILED_PROMPTS[0], "describe_in_detail": DETAILED_PROMPTS[1], "answer_suffix": SHORT_ANSWER[0]}
)
"""Instructions the model was trained on: a caption, the captioning prompt of CHAIR papers, LLaVA's POPE suffix."""
