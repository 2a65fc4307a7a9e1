"""What every method refuses, and where it acts by default."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families.tiny_llava import IMAGE, RAGGED, SINK_DIMS, collate, generate
from method_parameters import parameters_of
from naive.iri import RANKING

import vlmfix
from vlmfix.methods.registry import make_method, method_class

NAN, INF = math.nan, math.inf
OUT_OF_RANGE: dict[str, dict[str, list[Any]]] = {
    "act": {"beta": [1.1], "sink_threshold": ["five", -1.0], "rows": ["some"], "min_rows": [0], "heads": [[1, 2]]},
    "adaiat": {"alpha": [-1.0], "beta": [NAN], "m_form": ["plus_one"], "gate": ["sum"], "statistics": [3]},
    "adaptvis": {
        "mode": ["both"],
        "threshold": [1.1],
        "low": [NAN],
        "factor": [2.0],
        "probe_tokens": [[], [-1]],
    },
    "adhh": {"tau": [-0.1], "mode": ["never"]},
    "allpath": {"up": [INF], "down": [-1.0], "answers": ["essay"], "down_heads": [[(0, 1, 2)]]},
    "cmai": {"rho": [0.0, 1.1], "renorm": ["text"]},
    "eah": {"threshold": [-0.1, 1.5, True, "high"]},
    "causalmm": {"weights": ["shuffled"], "in_layers": [["a"]]},
    "fia": {"local_ratio": [2.0], "beta": [-1.0], "head_factors": [[[-1.0]], 2.0]},
    "ibd": {"epsilon": [-1.0], "alpha": [-0.1]},
    "maskcd": {"heads": [[(1, 2, 3)]]},
    "memvr": {"ratio": [-0.1, 1.1], "threshold": [2.0], "rows": ["last"]},
    "hgai": {"alpha": [-0.1, INF], "edit_prompt": [1]},
    "iat": {"alpha": [-0.1, INF]},
    "iri": {"lambda_a": [-0.1], "lambda_m": [INF], "k1": [-1], "k2": [1.5], "sources": ["both"], "ranking": [3]},
    "mma": {"gamma": [1.5], "columns": ["answer"]},
    "modality_balance": {"tau": [1.5]},
    "pai": {"alpha": [-0.1, INF]},
    "spin": {"keep": [1.2], "suppress": [-0.1], "score": ["weights"]},
    "vaf": {
        "enhance": [NAN],
        "suppress": [INF],
        "multiply": ["plain"],
        "heads": ["some", None, [(1, 2, 3)], [(-1, 2)]],
    },
    "var": {
        "sink_threshold": [0, INF],
        "recycle": [1.1, -0.1, None],
        "nonsink_ratio": [NAN],
        "image_mass": [2],
        "sink_dims": [[-1], 5, [1.5]],
    },
    "vhr": {
        "alpha": [0, -1.0, NAN, INF, "2", None, True],
        "select": ["best"],
        "layers": [3, ["a"], [1.7]],
        "outliers": ["no"],
    },
    "vti": {"alpha_text": [INF], "alpha_image": ["much"], "directions": [3]},
    "vista": {"lam": [-0.1, INF, "much"], "task": ["long"], "sla_alpha": [1.1], "sla_layers": [["a"]]},
}
NEEDED = {"cmai": {"experimental": True}, "modality_balance": {"experimental": True}, "iri": {"ranking": RANKING}}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_parameter_out_of_range_is_named(name: str) -> None:
    for parameter, values in OUT_OF_RANGE[name].items():
        for value in values:
            with pytest.raises(vlmfix.MethodError, match=f"{parameter} must be"):
                make_method(name, {**NEEDED.get(name, {}), parameter: value})


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("act", {"heads": [(0, -1)]}, "head"),
        ("act", {"heads": [(0, 4)]}, "head"),
        ("act", {"heads": [(9, 0)]}, "head"),
        ("act", {"heads": [(1, 0)], "layers": [2]}, "head"),
        ("adhh", {"heads": [(0, 9)]}, "head"),
        ("adhh", {"heads": [(7, 0)]}, "head"),
        ("adhh", {"renormalize": True, "mode": "always"}, "renormalize"),
        ("allpath", {"up_heads": [(0, 4)]}, "head"),
        ("vaf", {"heads": [(4, 0)]}, "does not exist"),
        ("vista", {"lam": 0.1, "task": "short"}, "task"),
        ("vista", {"sla_layers": [7]}, "layer 7"),
        ("cmai", {"layers": [2]}, "needs two"),
        ("iri", {"ranking": {"model": "", "rr_attn": [0.1]}}, "expected model, rr_attn, rr_mlp"),
        ("iri", {"ranking": {**RANKING, "rr_attn": [0.1]}}, "1 layers"),
        ("iri", {"ranking": {**RANKING, "rr_attn": [0.1, NAN, 0, 0]}}, "finite"),
        ("iri", {"ranking": {**RANKING, "model": None}}, "'model' must be a text"),
        ("iri", {"ranking": "missing.json"}, "Cannot read the ranking"),
        ("iri", {"ranking": {**RANKING, "model": "another/checkpoint"}}, "checkpoint 'another/checkpoint'"),
        ("iri", {"ranking": {**RANKING, "rr_attn": [0.1] * 5, "rr_mlp": [0.1] * 5}}, "5 layers"),
        ("adhh", {}, r"vlmfix\.calibrate\(model, 'adhh', data\)"),
        ("allpath", {}, r"vlmfix\.calibrate\(model, 'allpath', data\)"),
        ("adaiat", {}, r"vlmfix\.calibrate\(model, 'adaiat', data\)"),
        ("iri", {"ranking": None}, "vlmfix calibrate iri --model"),
        ("fia", {"head_factors": [[1.0] * 4]}, "4 layers of 4 heads"),
        ("maskcd", {}, "vlmfix calibrate maskcd --model"),
        ("maskcd", {"heads": [(9, 0)]}, "does not exist"),
        ("causalmm", {"in_layers": [7]}, "layer 7"),
        ("vti", {}, "vlmfix calibrate vti --model"),
        ("vti", {"directions": {"model": "", "text": [[0.1], [0.1, 0.2]]}}, "'text' must be a table"),
        ("vti", {"directions": {"model": "", "text": [[0.1] * 32] * 5}}, "5 layers of size 32"),
        ("vti", {"directions": {"model": "a/b", "text": [[0.1] * 32] * 4}}, "checkpoint 'a/b'"),
        ("cmai", {"experimental": False}, r"vlmfix.patch\(model, 'cmai', experimental=True\)"),
        ("modality_balance", {"experimental": False}, r"vlmfix.patch\(model, 'modality_balance', experimental=True\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_or_is_missing_is_refused(
    tiny: Any, name: str, parameters: dict[str, Any], says: str
) -> None:
    with pytest.raises(vlmfix.MethodError, match=says):
        vlmfix.patch(tiny, name, **{**NEEDED.get(name, {}), **parameters})
    assert vlmfix.status(tiny) is None


@pytest.mark.parametrize("name", ["modality_balance", "cmai"])
def test_a_method_without_evidence_says_so(tiny: Any, name: str) -> None:
    vlmfix.patch(tiny, name, experimental=True)
    assert "not a" in vlmfix.status(tiny).notes[0]
    assert generate(tiny, collate([RAGGED[1]]), 2)[1].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "says"), [("embeddings.class_embedding", "class token"), ("encoder.layers.1", "1 layers")]
)
def test_a_tower_without_what_fia_reads_is_refused(tiny: Any, changed: str, says: str) -> None:
    tower = tiny.model.vision_tower
    path, _, last = changed.rpartition(".")
    part = getattr(tower, "vision_model", tower).get_submodule(path)
    if last.isdigit():
        del part[int(last)]
    else:
        delattr(part, last)
    with pytest.raises(vlmfix.UnsupportedModelError, match=says):
        vlmfix.patch(tiny, "fia")
    assert vlmfix.status(tiny) is None


@pytest.mark.parametrize(
    ("name", "gives", "says"),
    [
        ("vhr", "image alone", "no text"),
        ("vista", "image alone", "no text"),
        ("vhr", "embeddings", "input_ids"),
        ("fia", "known features", "vision tower"),  # tiled images have no one-to-one order of patches and tokens
    ],
)
def test_a_prompt_without_what_a_method_reads_is_refused(tiny: Any, name: str, gives: str, says: str) -> None:
    ids, pixels = torch.tensor([RAGGED[0].ids]), RAGGED[0].pixels
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if gives == "image alone":
        inputs["input_ids"] = torch.full((1, 9), IMAGE)
    elif gives == "embeddings":
        inputs = {"inputs_embeds": tiny.get_input_embeddings()(ids), "pixel_values": pixels}
    else:
        features = tiny.model.get_image_features(pixels)
        tiny.model.get_image_features = lambda *args, **kwargs: features  # somebody keeps them, and no tower runs
    vlmfix.patch(tiny, name, **parameters_of(name, tiny))
    with pytest.raises(vlmfix.UnsupportedFeatureError, match=says), torch.no_grad():
        tiny(**inputs)


LAYERS = {
    "adaptvis": range(32),
    "cmai": range(7, 32),
    "eah": [1],
    "hgai": range(5, 19),
    "iat": range(5, 18),
    "modality_balance": range(32),
    "vaf": range(9, 15),
    "var": range(2, 31),
    "vhr": [1, *range(18, 32)],
}
"""Of 32, as published."""


def test_default_layers_are_those_of_the_papers_and_follow_the_depth(tiny: Any) -> None:
    for name, layers in LAYERS.items():
        assert method_class(name).default_layers(32) == tuple(layers)
    assert vlmfix.IAT.default_layers(64)[0] == 10
    for name in ("adaptvis", "eah", "hgai", "iat", "modality_balance", "vaf"):
        assert all(method_class(name).default_layers(depth) for depth in range(1, 8))
    for name, layers in (("var", (2,)), ("vhr", (1, 2, 3)), ("iat", vlmfix.IAT.default_layers(4))):
        vlmfix.patch(tiny, name, **({"sink_dims": SINK_DIMS} if name == "var" else {}))
        assert vlmfix.status(tiny).layers == layers
    assert vlmfix.VHR().alpha == 2.0
