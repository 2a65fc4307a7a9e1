"""The plots of a run: what is drawn is what the results say, and names do not cover each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmfix.cli import main
from vlmfix.errors import DataError
from vlmfix.evals.report.drawing import NARROW, WIDE, place_labels
from vlmfix.evals.report.plots import categories, category_figure, interval_figure, write_plots
from vlmfix.evals.report.tradeoff import tradeoff_figure
from vlmfix.evals.scores.pareto import flat_front


def interval(estimate: float, low: float, high: float, p_holm: float = 0.5) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high, "p_holm": p_holm}


def method(label: str, chair_i: float, recall: float, role: str = "method", **more: Any) -> dict[str, Any]:
    invented = {"dog": int(100 * chair_i), "cup": 1}
    chair = {"summary": {"chair_i": chair_i, "recall": recall}, "seconds": 1.0, "changed": 1, "invented": invented}
    return {"label": label, "describe": label, "role": role, "chair": chair, **more}


def results() -> dict[str, Any]:
    sure, unsure = interval(-0.1, -0.15, -0.05, 0.001), interval(-0.02, -0.04, 0.01)
    return {
        "model": "m",
        "data": "c",
        "methods": [
            method("none", 0.20, 0.80, "baseline"),
            method("a", 0.10, 0.78, differences={"chair.chair_i": sure, "chair.recall": unsure}),
            method("a/all", 0.18, 0.70, "control", differences={"chair.chair_i": unsure, "chair.recall": sure}),
        ],
        "early_stop_curve": [{"bias": b, "recall": 0.8 - b / 10, "chair_i": 0.2 - b / 50} for b in range(5)],
        "controls": [],
    }


def points_of(panel: Any) -> set[tuple[float, float]]:
    found = {line.get_marker(): None for line in panel.lines}
    assert "o" in found
    marks = [line for line in panel.lines if line.get_marker() == "o"]
    return {(round(float(line.get_xdata()[0]), 6), round(float(line.get_ydata()[0]), 6)) for line in marks}


def test_intervals_are_drawn_where_they_are() -> None:
    figure = interval_figure(results())
    assert figure is not None
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title().split("\n")[0] for panel in panels] == ["CHAIR_i ↓", "CHAIR recall ↑"]
    assert points_of(panels[0]) == {(-10.0, 0.0), (-2.0, 1.0)}
    bars = [tuple(line.get_xdata()) for line in panels[0].lines if len(line.get_xdata()) == 2 and line.get_zorder() > 1]
    assert bars[:2] == [(-15.0, -5.0), (-4.0, 1.0)]
    filled = [line.get_markerfacecolor() != "#ffffff" for line in panels[0].lines if line.get_marker() == "o"]
    assert filled == [True, False], "filled: survives the correction"


def test_ticks_can_be_read() -> None:
    figure = interval_figure(results())
    assert figure is not None and all(len(panel.get_xticks()) <= 7 for panel in figure.axes)


def test_tradeoff_has_every_row_the_front_and_the_early_stop_curve() -> None:
    figure = tradeoff_figure(results())
    assert figure is not None
    (panel,) = figure.axes
    assert points_of(panel) == {(80.0, 20.0), (78.0, 10.0), (70.0, 18.0)}
    named = {line.get_label(): line for line in panel.lines}
    assert named["front in these two"].get_xdata() == pytest.approx([78, 80])
    curve = named["early stop of none"]
    assert curve.get_xdata() == pytest.approx([80, 70]) and curve.get_ydata() == pytest.approx([20, 18])
    assert {text.get_text() for text in panel.texts} >= {"none", "a", "a/all"}


REGRESSED = "captions of none that came out so short, by regression"


def test_tradeoff_has_the_lengths_of_the_staircase_and_self_verification() -> None:
    drawn = results()
    drawn["early_stop_curve"] = [
        {"bias": b, "recall": 0.8 - b / 100, "chair_i": 0.2 - b / 200, "words": 26.4 - b / 2}
        | {"of_length": {"recall": 0.8 - b / 200, "chair_i": 0.2 - b / 400}}
        for b in range(10)
    ]
    drawn["self_verification_curve"] = [{"bias": b, "recall": 0.8 - b / 50, "chair_i": 0.2 - b / 40} for b in range(5)]
    figure = tradeoff_figure(drawn)
    assert figure is not None
    (panel,) = figure.axes
    assert {"26 words", "25 words", "22 words"} <= {text.get_text() for text in panel.texts}
    named = {line.get_label(): line for line in panel.lines}
    verified, regressed = named["self-verification of none"], named[REGRESSED]
    assert verified.get_xdata() == pytest.approx([80, 78, 76, 74, 72]) and verified.get_drawstyle() == "steps-post"
    # 26.4 words and those nearest to 26, 25, 24, 23 and 22, which the biases 1, 3, 5, 7 and 9 give
    assert regressed.get_xdata() == pytest.approx([80, 79.5, 78.5, 77.5, 76.5, 75.5])
    (dots,) = (line for line in panel.lines if line.get_marker() == "o" and len(line.get_xdata()) > 1)
    assert dots.get_xdata() == pytest.approx([79, 77, 75, 73, 71])
    for point in drawn["early_stop_curve"][4:]:  # no such descriptions: the staircase goes on, the regression does not
        point["of_length"] = {"recall": None, "chair_i": None}
    figure = tradeoff_figure(drawn)
    assert figure is not None
    (panel,) = figure.axes
    named = {line.get_label(): line for line in panel.lines}
    assert named[REGRESSED].get_xdata() == pytest.approx([80, 79.5, 78.5])
    assert {"26 words", "22 words"} <= {text.get_text() for text in panel.texts}


def test_flat_front() -> None:
    assert flat_front([(0.8, 0.2), (0.8, 0.3), (0.7, 0.2), (0.6, 0.1), (0.8, 0.2)]) == [(0.6, 0.1), (0.8, 0.2)]


def test_categories_are_counted_for_the_baseline_and_methods() -> None:
    names, counts = categories(results(), 5)
    assert names == ["dog", "cup"] and counts == {"none": {"dog": 20, "cup": 1}, "a": {"dog": 10, "cup": 1}}
    assert categories(results(), 1)[0] == ["dog"]
    figure = category_figure(results())
    assert figure is not None
    (panel,) = figure.axes
    assert [text.get_text() for text in panel.texts] == ["20", "1", "10", "1"]
    assert np.asarray(panel.collections[0].get_array()).tolist() == [[0, 0], [-10, 0]]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["none", "a"]
    many = results()
    for row in many["methods"]:
        row["chair"]["invented"] = {f"thing {i}": 20 - i for i in range(20)}
    shown = [category_figure(many, width) for width in (WIDE, NARROW)]
    assert [len(figure.axes[0].get_xticks()) for figure in shown if figure] == [13, 7], "a narrow page shows fewer"
    bare = results()
    for row in bare["methods"]:
        del row["chair"]["invented"]
    assert category_figure(bare) is None


@pytest.mark.parametrize("seed", range(5))
def test_names_cover_neither_points_nor_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.uniform((100, 100), (500, 400), (14, 2))]
    labels = place_labels(points, rng.uniform(20, 90, 14).tolist(), 12.0, (0, 0, 600, 500), 5.0)
    boxes = [*labels] + [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for i, a in enumerate(boxes[:14]):
        assert a[0] >= 0 and a[1] >= 0 and a[2] <= 600 and a[3] <= 500
        for b in boxes[i + 1 :]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_the_verb_writes_pngs(tmp_path: Path, capsys: Any) -> None:
    from PIL import Image

    made = {**results(), "settings": {}, "settings_digest": "d", "command": "vlmfix eval"}
    (tmp_path / "results.json").write_text(json.dumps(made))
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "plots")]) == 0
    assert "intervals.png" in capsys.readouterr().out
    for name in ("intervals", "tradeoff", "categories"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as image:
            assert image.format == "PNG" and min(image.size) > 200
            assert len(set(image.convert("L").resize((60, 40)).tobytes())) > 10, "the plot is blank"
    assert main(["plot", str(tmp_path / "nothing")]) == 2
    assert "no such run folder" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(tmp_path)]) == 2
    assert "needs matplotlib; type: pip install 'vlmfix[eval]'" in capsys.readouterr().err


def test_nothing_to_draw(tmp_path: Path) -> None:
    alone = {"model": "m", "data": "c", "methods": [{"label": "none", "role": "baseline"}]}
    with pytest.raises(DataError, match="nothing to draw"):
        write_plots(alone, tmp_path)
