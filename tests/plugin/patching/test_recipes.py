"""Methods as data: names, dictionaries, JSON files; layer specifications; every wrong value has its message."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import pytest
import torch
from families.tiny_llava import RAGGED, SINK_DIMS, collate, forward

import vlmfix
from vlmfix.cli import main
from vlmfix.methods.parameters import may_be, parameter_of
from vlmfix.methods.selection import resolve_layers
from vlmfix.recipes import load_recipe, save_recipe


def _names_in(module: ModuleType) -> set[str]:
    classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, vlmfix.Method)]
    return {each.name for each in classes if each.__module__ == module.__name__}


def test_methods_lists_one_method_per_file() -> None:
    rooms = [import_module(f"vlmfix.{room}") for room in ("methods", "decoding", "verification")]
    modules = [import_module(each.name) for room in rooms for each in iter_modules(room.__path__, f"{room.__name__}.")]
    files = {name for module in modules if (name := module.__name__.rpartition(".")[2]) in _names_in(module)}
    found = vlmfix.list_methods()
    assert set(found) == files
    assert all(method.name == name and method.summary for name, method in found.items())
    assert all(getattr(vlmfix, method.__name__) is method for method in found.values())
    assert {method.__name__ for method in found.values()} <= set(vlmfix.__all__)
    core = {"none": vlmfix.NoMethod, "vhr": vlmfix.VHR, "var": vlmfix.VAR, "act": vlmfix.ACT, "mma": vlmfix.MMA}
    assert found.items() >= core.items()


@pytest.mark.parametrize("cls", vlmfix.list_methods().values(), ids=lambda cls: cls.name)
def test_every_parameter_says_what_it_is(cls: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", cls.name]) == 0
    explained = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(cls):
        meaning = cls.meaning_of(field.name, parameter_of(field))
        assert meaning.endswith(".") and f"{field.name}: {meaning}" in " ".join(cls.__doc__.split())
        assert f"{field.name} = {field.default!r}: {may_be(cls, field)}" in explained and meaning in explained


def test_a_recipe_file_patches_like_its_methods(sinky: Any, tmp_path: Path) -> None:
    chosen = [vlmfix.VAR(sink_dims=SINK_DIMS, sink_threshold=3.0, layers=":"), vlmfix.VHR(alpha=1.5)]
    save_recipe(tmp_path / "recipe.json", chosen)
    vlmfix.patch(sinky, chosen)
    expected, bound = forward(sinky, collate(RAGGED)).logits, vlmfix.status(sinky).methods
    for spec in (tmp_path / "recipe.json", str(tmp_path / "recipe.json"), [each.to_dict() for each in chosen]):
        vlmfix.patch(sinky, spec)
        assert torch.equal(forward(sinky, collate(RAGGED)).logits, expected)
    save_recipe(tmp_path / "bound.json", list(bound))
    vlmfix.patch(sinky, tmp_path / "bound.json")
    assert vlmfix.status(sinky).methods == bound


@pytest.mark.parametrize("text", ['{"method": "vhr"}', '[{"method": "vhr"}]', '{"methods": [{"method": "vhr"}]}'])
def test_the_shapes_of_a_recipe_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    assert load_recipe(tmp_path / "recipe.json") == (vlmfix.VHR(),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"vhr"',
        "{}",
        '{"methods": []}',
        '{"methods": {}}',
        '{"methods": "vhr"}',
        '[{"alpha": 2}]',
        '[{"method": null}]',
        '[{"method": "vhr", "beta": 1}]',
        '[{"method": "vhr", "alpha": "2"}]',
        '[{"method": "vhr", "alpha": NaN}]',
        '[{"method": "vhr", "layers": 3}]',
        '[{"method": "var", "sink_dims": 5}]',
        "[1]",
        '["vhr"]',
    ],
)
def test_files_that_are_no_recipes(tiny: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(vlmfix.MethodError):
        vlmfix.patch(tiny, tmp_path / "recipe.json")
    assert vlmfix.status(tiny) is None


def test_a_missing_recipe_file(tiny: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match=r"nowhere\.json"):
        vlmfix.patch(tiny, "nowhere.json")


def test_the_message_of_an_unknown_method_lists_the_known(tiny: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match=r"mma, .*none, .*var, .*vhr"):
        vlmfix.patch(tiny, "unheard_of")


def test_the_message_of_an_unknown_parameter_lists_the_known(tiny: Any) -> None:
    with pytest.raises(vlmfix.MethodError, match=r"strength.*alpha"):
        vlmfix.patch(tiny, "vhr", strength=2)


def test_parameters_need_a_method_given_by_name(tiny: Any) -> None:
    for spec in (None, vlmfix.VHR(), ["vhr"], {"method": "vhr"}):
        with pytest.raises(vlmfix.MethodError, match="alpha"):
            vlmfix.patch(tiny, spec, alpha=2.0)


@pytest.mark.parametrize(
    "spec",
    [
        3,
        "",
        "VHR",
        [],
        [[]],
        ["vhr", "vhr"],
        ["vhr", vlmfix.VHR(alpha=3)],
        {},
        {"alpha": 2},
        b"vhr",
        vlmfix.VHR,
    ],
    ids=repr,
)
def test_specifications_that_are_no_methods(tiny: Any, spec: Any) -> None:
    with pytest.raises(vlmfix.MethodError):
        vlmfix.patch(tiny, spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ([0, 31], (0, 31)),
        ([-1, 31, 0], (0, 31)),
        ("1,18:32", (1, *range(18, 32))),
        ("-2:", (30, 31)),
        (":", tuple(range(32))),
        ("0.25:0.75", tuple(range(8, 24))),
        (" 1 , 3 ", (1, 3)),
        (":0.1", (0, 1, 2)),
    ],
    ids=str,
)
def test_layer_specifications(spec: Any, expected: tuple[int, ...]) -> None:
    assert resolve_layers(spec, 32) == expected


@pytest.mark.parametrize(
    "spec",
    [
        [32],
        [-33],
        "32",
        "a",
        "",
        "1,,2",
        "5:3",
        [],
        "1-3",
        "1.2.3:4",
        "-:3",
        ".:",
    ],
    ids=str,
)
def test_layer_specifications_that_cannot_be_read(spec: Any) -> None:
    with pytest.raises(vlmfix.MethodError):
        resolve_layers(spec, 32, "vhr")


@pytest.mark.parametrize("options", [{"layers": [4]}, {"layers": [-5]}, {"layers": []}, {"layers": "7"}], ids=str)
def test_layers_outside_the_model(tiny: Any, options: dict[str, Any]) -> None:
    with pytest.raises(vlmfix.MethodError, match="layer"):
        vlmfix.patch(tiny, "vhr", **options)
    assert vlmfix.status(tiny) is None


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, vlmfix; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="nothing"):
        vlmfix.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", vlmfix.VHR()),
        ("qwen2_5_vl", vlmfix.VHR()),
        ("instructblip", vlmfix.VHR(layers="0.4375:")),
        ("mllama", vlmfix.VHR()),
        ("florence2", vlmfix.PAI(alpha=0.2)),
        ("blip2_t5", vlmfix.PAI(alpha=0.2)),
    ],
)
def test_the_default_recipe_of_a_family(family: str, method: vlmfix.Method) -> None:
    from families import available

    found = available(family)
    model = vlmfix.patch(found.build())
    (default,) = vlmfix.status(model).methods
    assert dataclasses.replace(default, layers=method.layers) == method
    inputs = found.collate([found.single()])
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert vlmfix.status(model).edited[0] > 0


def test_the_last_18_of_32_layers_are_those_of_the_paper() -> None:
    assert resolve_layers("0.4375:", 32) == tuple(range(14, 32))


def test_a_recipe_with_a_removed_parameter_opens_where_it_means_the_same(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for value in (False, True):
        path.write_text(json.dumps({"methods": [{"method": "vhr", "alpha": 1.3, "reinforce_noimg": value}]}))
        if not value:
            assert vlmfix.load_recipe(path) == (vlmfix.VHR(alpha=1.3),)
    with pytest.raises(vlmfix.MethodError, match=r"no longer has the parameter 'reinforce_noimg'.*Leave it out"):
        vlmfix.load_recipe(path)
