"""The figures that ``scripts/mechanics.py`` draws, on the small embedded model; and the pictures that are on file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mechanics
import pytest
import torch
from mechanics_drawing import draw, save
from PIL import Image

import vlmfix
from vlmfix.evals import testbed
from vlmfix.evals.inspect.look import inspect_picture
from vlmfix.evals.run.methods import method_specs

FOLDER = Path(testbed.__file__).parent


@pytest.fixture(scope="module")
def case() -> Any:
    return mechanics.case_of(*testbed.load("tiny"), 350)


def test_what_sinks_lose_is_what_others_gain(case: Any) -> None:
    picture = mechanics.redistribution(case, vlmfix.ACT(beta=0.25), (), torch.zeros(6, 8))
    before, after = (sum(row[column] for row in picture.bars[2]) for column in (1, 2))
    assert before == pytest.approx(1, abs=0.01) and after == pytest.approx(1, abs=0.01), "rows still sum to 1"
    sinks = [row for row in picture.bars[2] if "sink: " in row[0] or row[0] == "other sinks"]
    others = [row for row in picture.bars[2] if row not in sinks]
    assert sinks and all(now == pytest.approx(0.25 * was, rel=1e-3) for _, was, now in sinks)
    assert all(now >= was for _, was, now in others)
    assert "keep 25 %" in picture.title
    moved = picture.heads[1]
    assert not moved[:2].any() and not moved[-1].any() and moved[2:-1].max() > 1, "ACT's layers, and no other"


def test_vhr_is_shown_with_the_heads_it_scales(case: Any) -> None:
    method = vlmfix.VHR(alpha=1.2, layers=[1, 4])
    picture = mechanics.reinforcement(case, method, (), torch.zeros(6, 8))
    chosen = picture.heads[2]
    with vlmfix.patched(case.model, method):
        case.model.generate(**case.inputs(), max_new_tokens=1, do_sample=False)
        status = vlmfix.status(case.model)
    assert status is not None
    rows = case.inputs()["input_ids"].shape[1]
    assert int(chosen.sum()) * rows == status.edited[0], "as many heads as the method counts"
    assert not chosen[[0, 2, 3, 5]].any()
    for column in (1, 2):
        assert sum(row[column] for row in picture.bars[2]) == pytest.approx(1, abs=1e-3)


def test_what_mma_opens_was_closed_before(case: Any) -> None:
    picture = mechanics.opening(case, vlmfix.MMA(gamma=1.0), (), torch.zeros(6, 8))
    title, per_patch = picture.overlays[0]
    assert per_patch.shape == (64,) and "question" in title and bool((per_patch > 0).all())
    assert [row[1] for row in picture.bars[2]] == [0.0] * len(picture.bars[2])
    assert 100 * sum(row[2] for row in picture.bars[2]) == pytest.approx(float(per_patch.mean()), rel=1e-3)
    assert not picture.heads[1][-1].any(), "the last layer is not opened"


def test_a_picture_is_drawn(case: Any, tmp_path: Path) -> None:
    method = vlmfix.ACT(beta=0.25)
    (spec,) = (spec for spec in method_specs({"act": method}) if spec.role == "method")
    versions = inspect_picture(case, [spec], title="").versions
    save(draw(mechanics.redistribution(case, method, versions, torch.eye(6, 8))), tmp_path / "act.png")
    with Image.open(tmp_path / "act.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(2**24) or ()) > 50


def test_the_page_shows_what_is_on_file() -> None:
    text = (FOLDER / "MECHANICS.md").read_text(encoding="utf-8")
    shown = re.findall(r"\]\((mechanics/\w+\.png)\)", text)
    assert shown == [f"mechanics/{name}.png" for name in mechanics.MAKERS]
    assert sum((FOLDER / each).stat().st_size for each in shown) < 600_000
