"""vlmfix: make vision-language models hallucinate less at inference time, without training.

>>> import vlmfix
>>> vlmfix.__version__
'0.1.0'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmfix.errors import DataError, MethodError, UnsupportedFeatureError, UnsupportedModelError, VlmfixError

if TYPE_CHECKING:
    from vlmfix.activity import Status
    from vlmfix.calibration.api import calibrate
    from vlmfix.calibration.result import Calibration
    from vlmfix.calibration.samples import CalibrationSample
    from vlmfix.methods.act import ACT
    from vlmfix.methods.base import Method
    from vlmfix.methods.fia import FIA
    from vlmfix.methods.mma import MMA
    from vlmfix.methods.none import NoMethod
    from vlmfix.methods.pai import PAI
    from vlmfix.methods.var import VAR
    from vlmfix.methods.vhr import VHR
    from vlmfix.patching import patch, patched, status, unpatch
    from vlmfix.recipes import load_recipe, save_recipe
    from vlmfix.sinks import find_sink_dims

__version__ = "0.1.0"

_LAZY = {
    "ACT": "vlmfix.methods.act",
    "FIA": "vlmfix.methods.fia",
    "MMA": "vlmfix.methods.mma",
    "PAI": "vlmfix.methods.pai",
    "Method": "vlmfix.methods.base",
    "NoMethod": "vlmfix.methods.none",
    "VAR": "vlmfix.methods.var",
    "VHR": "vlmfix.methods.vhr",
    "Calibration": "vlmfix.calibration.result",
    "CalibrationSample": "vlmfix.calibration.samples",
    "calibrate": "vlmfix.calibration.api",
    "Status": "vlmfix.activity",
    "patch": "vlmfix.patching",
    "patched": "vlmfix.patching",
    "status": "vlmfix.patching",
    "unpatch": "vlmfix.patching",
    "load_recipe": "vlmfix.recipes",
    "save_recipe": "vlmfix.recipes",
    "find_sink_dims": "vlmfix.sinks",
}
"""Public names that need torch: imported on first use, so that ``import vlmfix`` and the command line start at once."""

__all__ = [
    "ACT",
    "FIA",
    "MMA",
    "PAI",
    "VAR",
    "VHR",
    "Calibration",
    "CalibrationSample",
    "DataError",
    "Method",
    "MethodError",
    "NoMethod",
    "Status",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "VlmfixError",
    "__version__",
    "calibrate",
    "find_sink_dims",
    "load_recipe",
    "methods",
    "patch",
    "patched",
    "save_recipe",
    "status",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("vlmfix.methods")
    if name not in _LAZY:
        raise AttributeError(f"module 'vlmfix' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
