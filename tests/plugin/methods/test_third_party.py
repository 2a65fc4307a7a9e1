"""Methods of other packages: found by their entry points, listed, patched, saved and read like our own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families.tiny_llava import RAGGED, collate, forward

import vlmfix
from vlmfix.cli import main
from vlmfix.methods.base import Method
from vlmfix.methods.registry import method_from_dict, method_names

METHOD = """
from __future__ import annotations

from dataclasses import dataclass

from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.pai import PAI


@dataclass(frozen=True)
class {title}(PAI):
    '''PAI under another name.'''

    name = "{name}"

    gain: float = parameter(0.5, low=0, high=2, search=Range(0.1, 1.0), help="Not used.")
"""

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package with a module and its entry points, as pip lays them out."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(package: str, text: str, *entries: str) -> Path:
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n", encoding="utf-8")
        lines = "\n".join(["[vlmfix.methods]", *entries])
        (info / "entry_points.txt").write_text(f"{lines}\n", encoding="utf-8")
        module = tmp_path / f"{package}_code.py"
        module.write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module.stem, raising=False)
        return module

    return add


def test_their_method_is_listed_patched_saved_and_read(tiny: Any, tmp_path: Path, install: Install) -> None:
    assert "lantern" not in method_names()
    install("acme", METHOD.format(title="Lantern", name="lantern"), "lantern = acme_code:Lantern")
    theirs = vlmfix.list_methods()["lantern"]
    assert set(theirs.search_space) == {"alpha", "gain"} and "gain: Not used." in (theirs.__doc__ or "")

    vlmfix.patch(tiny, "lantern", alpha=0.7, gain=1)
    assert type(vlmfix.status(tiny).methods[0]) is theirs
    found = forward(tiny, collate(RAGGED)).logits
    vlmfix.patch(tiny, vlmfix.PAI(alpha=0.7))
    assert forward(tiny, collate(RAGGED)).logits.equal(found)

    path = tmp_path / "recipe.json"
    vlmfix.save_recipe(path, [theirs(alpha=0.7), vlmfix.VHR()])
    assert vlmfix.load_recipe(path) == (theirs(alpha=0.7), vlmfix.VHR())
    vlmfix.patch(tiny, path)
    assert {method.name for method in vlmfix.status(tiny).methods} == {"lantern", "vhr"}
    with pytest.raises(vlmfix.MethodError, match=r"gain must be a number between 0 and 2"):
        vlmfix.patch(tiny, "lantern", gain=3)


def test_it_is_a_word_of_the_command_line(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", METHOD.format(title="Lantern", name="lantern"), "lantern = acme_code:Lantern")
    assert main(["methods", "lantern"]) == 0
    assert "gain = 0.5: a number between 0 and 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "entry", "says"),
    [
        (
            "import nowhere_at_all\n",
            "lantern = acme_code:Lantern",
            "ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        ("1 / 0\n", "lantern = acme_code:Lantern", "ZeroDivisionError"),
        ("", "lantern = acme_code:Lantern", "AttributeError"),
        ("Lantern = 3\n", "lantern = acme_code:Lantern", "acme_code:Lantern is no subclass of vlmfix.Method"),
        (METHOD.format(title="Lantern", name="torch"), "lantern = acme_code:Lantern", "calls itself 'torch'"),
    ],
    ids=["missing module", "broken module", "no class", "no method", "another name"],
)
def test_a_broken_package_is_named_and_stops_nothing(
    tiny: Any, install: Install, text: str, entry: str, says: str
) -> None:
    install("acme", text, entry)
    with pytest.raises(vlmfix.MethodError, match=rf"'lantern' of the package acme 1\.2 cannot be used: .*{says}"):
        vlmfix.patch(tiny, "lantern")
    with pytest.warns(UserWarning, match=r"the package acme 1\.2"):
        found = vlmfix.list_methods()
    with pytest.warns(UserWarning, match=r"the package acme 1\.2"):
        assert main(["methods"]) == 0  # as vlmfix eval --method all, which runs the others
    assert "lantern" not in found and "vhr" in found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlmfix.patch(tiny, "vhr", alpha=1.2)


def test_a_name_of_ours_stays_ours_and_the_package_is_named(tiny: Any, install: Install) -> None:
    install("acme", METHOD.format(title="Lantern", name="vhr"), "vhr = acme_code:Lantern")
    with pytest.warns(UserWarning, match=r"named 'vhr' comes with the package acme 1\.2 too"):
        vlmfix.patch(tiny, "vhr")
    assert type(vlmfix.status(tiny).methods[0]) is vlmfix.VHR


def test_two_packages_with_one_name_are_both_named(tiny: Any, install: Install) -> None:
    for package in ("acme", "zenith"):
        install(package, METHOD.format(title="Lantern", name="lantern"), f"lantern = {package}_code:Lantern")
    with pytest.raises(vlmfix.MethodError, match=r"'lantern' comes with .* acme 1\.2 and .* zenith 1\.2"):
        vlmfix.patch(tiny, "lantern")


def test_a_recipe_is_not_written_if_it_could_not_be_read(tmp_path: Path, install: Install) -> None:
    path = tmp_path / "recipe.json"
    unregistered = type("Unregistered", (vlmfix.PAI,), {"name": "unregistered"})
    imposter = type("Imposter", (vlmfix.PAI,), {})  # would be read back as PAI
    for method, says in ((unregistered(), "no method 'unregistered'"), (imposter(), "would be read as PAI")):
        with pytest.raises(vlmfix.MethodError, match=says):
            vlmfix.save_recipe(path, method)
        with pytest.raises(vlmfix.MethodError, match=says):
            vlmfix.Calibration(method, {}).save(path)
        assert not path.exists()


def test_what_cannot_be_json_is_not_written(tmp_path: Path, install: Install) -> None:
    text = METHOD.format(title="Lantern", name="lantern") + "    device: object = parameter(None, help='A device.')\n"
    install("acme", text, "lantern = acme_code:Lantern")
    theirs: Any = vlmfix.list_methods()["lantern"]
    with pytest.raises(vlmfix.MethodError, match="could not be read again"):
        vlmfix.save_recipe(tmp_path / "recipe.json", theirs(device=object()))
    assert not (tmp_path / "recipe.json").exists()


def test_an_annotation_for_type_checkers_alone_is_named(install: Install) -> None:
    text = METHOD.format(title="Lantern", name="lantern") + "    size: Size = parameter(3, help='A size.')\n"
    install("acme", text, "lantern = acme_code:Lantern")
    with pytest.raises(vlmfix.MethodError, match=r"Lantern\.size: the annotation 'Size' must be known"):
        method_from_dict({"method": "lantern"})


def test_calling_the_package_of_methods_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match=r"vlmfix\.list_methods\(\)"):
        found = vlmfix.methods()  # type: ignore[operator]
    assert found == vlmfix.list_methods() and all(issubclass(each, Method) for each in found.values())
