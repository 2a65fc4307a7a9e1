"""Parameters under which every method has something to do in a tiny random model.

A new method that acts by default needs no entry. ``layers=":"`` goes without saying where a method acts in layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vlmfix.errors import UnsupportedModelError
from vlmfix.methods.registry import method_class, method_names
from vlmfix.model.anatomy import Anatomy, analyse
from vlmfix.model.vision_tower import find_vision_layers


def _sinks(anatomy: Anatomy) -> dict[str, Any]:
    """Dimensions and a threshold for which about half of all tokens are sinks."""
    return {"sink_dims": [0, 1, 2, 3], "sink_threshold": 1.4, "nonsink_ratio": 0.1, "image_mass": 0.02}


def _heads(anatomy: Anatomy, head: int) -> list[tuple[int, int]]:
    """One head of every layer with softmax attention over text."""
    return [(layer, head) for layer in sorted({site.layer_idx for site in anatomy.sites if site.kind != "image"})]


def _statistics(anatomy: Anatomy) -> dict[str, Any]:
    """Made-up attention to generated text, under which the gate is open and heads differ."""
    heads = anatomy.text_config.num_attention_heads
    hallucinated = [[1.0] * heads for _ in range(anatomy.num_layers)]
    real = [[2.0 + head for head in range(heads)] for _ in range(anatomy.num_layers)]
    return {"real": real, "hallucinated": hallucinated, "num_real": 10, "num_hallucinated": 10}


def _ranking(anatomy: Anatomy) -> dict[str, Any]:
    """A made-up ranking under which the first layers are sources and all layers targets."""
    rates = [1.0 / (1 + layer) for layer in range(anatomy.num_layers)]
    name = anatomy.model.config._name_or_path
    return {"model": name, "rr_attn": rates, "rr_mlp": rates}


def _directions(anatomy: Anatomy) -> dict[str, Any]:
    """Made-up directions, of the vision tower too where its layers are known."""
    name = anatomy.model.config._name_or_path
    text = [[math.sin(layer + 2 * d) for d in range(anatomy.hidden_size)] for layer in range(anatomy.num_layers)]
    try:
        tower = find_vision_layers(anatomy.model)
    except UnsupportedModelError:
        return {"alpha_text": 3.0, "alpha_image": 0.0, "directions": {"model": name, "text": text}}
    norms = [[p for name, p in each.layer.named_parameters() if "norm" in name] for each in tower]
    widths = [max(parameter.shape[0] for parameter in parameters) for parameters in norms]  # those of heads are smaller
    vision = [[[math.cos(layer + 3 * d) for d in range(width)]] for layer, width in enumerate(widths)]
    return {"alpha_text": 3.0, "alpha_image": 3.0, "directions": {"model": name, "text": text, "vision": vision}}


PARAMETERS: dict[str, Callable[[Anatomy], dict[str, Any]]] = {
    "act": lambda anatomy: {"sink_threshold": 0.05, "min_rows": 2},
    "adaiat": lambda anatomy: {"statistics": _statistics(anatomy)},
    "adhh": lambda anatomy: {"heads": _heads(anatomy, 1), "tau": 0.05},
    "allpath": lambda anatomy: {"up_heads": _heads(anatomy, 0), "down_heads": _heads(anatomy, 1)},
    "causalmm": lambda anatomy: {"in_layers": ":", "alpha": 0.5, "beta": 0.0},
    "cmai": lambda anatomy: {"experimental": True, "rho": 0.5},
    "deco": lambda anatomy: {"alpha": 2.0, "cut": False},
    "dola": lambda anatomy: {"relative_top": 0.0},
    "edited": lambda anatomy: {"edit": {"method": "pai", "alpha": 0.8, "layers": ":"}, "alpha": 0.5, "beta": 0.0},
    "flb": lambda anatomy: {"gamma": 2.0, "lam": 1.0, "beta": 0.0},
    "fia": lambda anatomy: {"local_ratio": 0.5},
    "icd": lambda anatomy: {"disturbance": [20, 21, 22], "beta": 0.0},
    "ibd": lambda anatomy: {"epsilon": 10.0, "alpha": 5.0, "beta": 0.0},
    "ifg": lambda anatomy: {"alpha": 1.0, "beta": 0.0},
    "guidance": lambda anatomy: {"gamma": 1.5, "beta": 0.0},
    "lqcd": lambda anatomy: {"hint": [20, 21, 22], "behind": 1, "neutralise": False, "beta": 0.0},
    "iri": lambda anatomy: {"ranking": _ranking(anatomy)},
    "maskcd": lambda anatomy: {"heads": _heads(anatomy, 1), "alpha": 0.5, "beta": 0.0},
    "m3id": lambda anatomy: {"lam": 0.1, "alpha": 1.0},
    "modality_balance": lambda anatomy: {"experimental": True},
    "opera": lambda anatomy: {"num_attn_candidates": 40, "penalty_weights": 10.0},
    "sid": lambda anatomy: {"keep": 2, "beta": 0.0},
    "spin": lambda anatomy: {"keep": 0.5},
    "var": _sinks,
    "vti": _directions,
    "vcd": lambda anatomy: {"beta": 0.0},
}
"""By method's name, as functions of the model."""


IN_FORWARDS: tuple[str, ...] = tuple(name for name in method_names() if not method_class(name).rewrites_answers)
"""The methods that act inside forwards. Those that rewrite answers need words: ``tests/plugin/verification``."""


def parameters_of(method: str, model: object) -> dict[str, Any]:
    """The parameters a method is tested with on a model."""
    make = PARAMETERS.get(method)
    layers = {} if method_class(method).replaces_logits else {"layers": ":"}
    return {**layers, **({} if make is None else make(analyse(model)))}


OFF: list[tuple[str, dict[str, Any]]] = [
    ("act", {"beta": 1.0}),
    ("act", {"heads": ()}),
    ("adaiat", {"alpha": 0.0}),
    ("deco", {"alpha": 0.0, "cut": False}),
    ("dola", {"alpha": 0.0, "relative_top": 0.0}),
    ("adaiat", {"alpha": 0.0, "statistics": "nowhere.json"}),
    ("adaptvis", {"mode": "fixed", "factor": 1.0}),
    ("adaptvis", {"low": 1.0, "high": 1.0}),
    ("adhh", {"heads": ()}),
    ("adhh", {"tau": 1.5}),
    ("adhh", {"heads": (), "mode": "always"}),
    ("allpath", {"up": 1.0, "down": 1.0}),
    ("allpath", {"up_heads": (), "down_heads": ()}),
    ("allpath", {"up_heads": [(0, 1), (1, 1)], "down_heads": [(0, 1), (1, 1)]}),
    ("causalmm", {"alpha": 0.0, "beta": 0.0}),
    ("cmai", {"rho": 1.0}),
    ("eah", {"threshold": 1.0}),
    ("fia", {"alpha": 0.0, "beta": 0.0}),
    ("edited", {"alpha": 0.0}),
    ("edited", {"edit": {"method": "pai", "alpha": 0.0}}),
    ("flb", {"gamma": 0.0}),
    ("flb", {"lam": 0.0}),
    ("guidance", {"gamma": 1.0}),
    ("hgai", {"alpha": 0.0}),
    ("iat", {"alpha": 0.0}),
    ("ibd", {"alpha": 0.0, "beta": 0.0}),
    ("ibd", {"epsilon": 0.0, "beta": 0.0}),
    ("icd", {"alpha": 0.0}),
    ("ifg", {"alpha": 0.0}),
    ("iri", {"lambda_a": 0.0, "lambda_m": 0.0}),
    ("iri", {"k1": 0}),
    ("lqcd", {"alpha": 0.0}),
    ("maskcd", {"heads": ()}),
    ("maskcd", {"alpha": 0.0, "beta": 0.0}),
    ("m3id", {"lam": 0.0}),
    ("m3id", {"alpha": 0.0}),
    ("memvr", {"ratio": 0.0}),
    ("memvr", {"threshold": 1.0}),
    ("mma", {"gamma": 0.0}),
    ("modality_balance", {"tau": 0.0}),
    ("pai", {"alpha": 0.0}),
    ("sid", {"alpha": 0.0, "beta": 0.0}),
    ("spin", {"keep": 1.0}),
    ("spin", {"suppress": 1.0}),
    ("vaf", {"enhance": 1.0, "suppress": 1.0}),
    ("vaf", {"heads": ()}),
    ("var", {"recycle": 0.0}),
    ("var", {"sink_dims": ()}),
    ("vcd", {"alpha": 0.0}),
    ("vhr", {"alpha": 1.0}),
    ("vti", {"alpha_text": 0.0, "alpha_image": 0.0}),
    ("vista", {"lam": 0.0, "sla_alpha": 0.0}),
]
"""What switches a method off; one may stand here several times."""
