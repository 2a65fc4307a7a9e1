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
    from vlmfix.calibration.calibrate import calibrate
    from vlmfix.decoding.guidance import Guidance
    from vlmfix.decoding.ifg import IFG
    from vlmfix.decoding.lqcd import LQCD
    from vlmfix.decoding.opera import OPERA
    from vlmfix.decoding.vcd import VCD
    from vlmfix.engine.status import Status
    from vlmfix.methods.act import ACT
    from vlmfix.methods.adaiat import AdaIAT
    from vlmfix.methods.adaptvis import AdaptVis
    from vlmfix.methods.adhh import ADHH
    from vlmfix.methods.allpath import AllPath
    from vlmfix.methods.base import Method
    from vlmfix.methods.cmai import CMAI
    from vlmfix.methods.eah import EAH
    from vlmfix.methods.fia import FIA
    from vlmfix.methods.hgai import HGAI
    from vlmfix.methods.iat import IAT
    from vlmfix.methods.iri import IRI
    from vlmfix.methods.measured import Calibration
    from vlmfix.methods.mma import MMA
    from vlmfix.methods.modality_balance import ModalityBalance
    from vlmfix.methods.none import NoMethod
    from vlmfix.methods.pai import PAI
    from vlmfix.methods.registry import list_methods
    from vlmfix.methods.spin import SPIN
    from vlmfix.methods.vaf import VAF
    from vlmfix.methods.var import VAR
    from vlmfix.methods.vhr import VHR
    from vlmfix.methods.vista import VISTA
    from vlmfix.model.sink_dims import find_sink_dims
    from vlmfix.observe.samples import CalibrationSample
    from vlmfix.patching import patch, patched, status, unpatch
    from vlmfix.prefix import Prefix, shared_prefix
    from vlmfix.recipes import load_recipe, save_recipe


__version__ = "0.1.0"


_LAZY = {
    "Method": "vlmfix.methods.base",
    "Calibration": "vlmfix.methods.measured",
    "CalibrationSample": "vlmfix.observe.samples",
    "calibrate": "vlmfix.calibration.calibrate",
    "Status": "vlmfix.engine.status",
    "patch": "vlmfix.patching",
    "patched": "vlmfix.patching",
    "status": "vlmfix.patching",
    "unpatch": "vlmfix.patching",
    "list_methods": "vlmfix.methods.registry",
    "load_recipe": "vlmfix.recipes",
    "save_recipe": "vlmfix.recipes",
    "find_sink_dims": "vlmfix.model.sink_dims",
    "Prefix": "vlmfix.prefix",
    "shared_prefix": "vlmfix.prefix",
}
"""Public names that need torch: imported on first use, so that ``import vlmfix`` and the command line start at once."""


__all__ = [
    "ACT",
    "ADHH",
    "CMAI",
    "EAH",
    "FIA",
    "HGAI",
    "IAT",
    "IFG",
    "IRI",
    "LQCD",
    "MMA",
    "OPERA",
    "PAI",
    "SPIN",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "VISTA",
    "AdaIAT",
    "AdaptVis",
    "AllPath",
    "Calibration",
    "CalibrationSample",
    "DataError",
    "Guidance",
    "Method",
    "MethodError",
    "ModalityBalance",
    "NoMethod",
    "Prefix",
    "Status",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "VlmfixError",
    "__version__",
    "calibrate",
    "find_sink_dims",
    "list_methods",
    "load_recipe",
    "methods",
    "patch",
    "patched",
    "probes",
    "save_recipe",
    "shared_prefix",
    "status",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in ("methods", "probes"):
        return import_module(f"vlmfix.{name}")
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
    else:
        value = _method_class(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Also the names that nobody has used yet."""
    return sorted({*globals(), *__all__})


def _method_class(name: str) -> Any:
    """Return a method's class by its own name: every file with a method has one."""
    if name[:1].isupper():
        from vlmfix.methods.registry import list_methods

        for method in list_methods().values():
            if method.__name__ == name:
                return method
    raise AttributeError(f"module 'vlmfix' has no attribute {name!r}")
