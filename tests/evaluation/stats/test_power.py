"""Minimum detectable effects against closed forms, simulation and statsmodels; the verb ``vlmfix power``."""

import json
import math

import numpy as np
import pytest
from declared import CHAIR_STATISTICS, POPE_STATISTICS
from test_stats import chair_table, pope_table

from vlmfix.cli import main
from vlmfix.errors import DataError
from vlmfix.evals.power import (
    ASSUMED,
    Rate,
    assumed_deviations,
    detectable,
    deviation_of_interval,
    planned_lines,
    power_table,
    read_pilot,
)
from vlmfix.evals.stats.bootstrap import interval_dict


def test_closed_form():
    assert detectable(0.5, 100) == pytest.approx((1.959964 + 0.841621) * 0.05, rel=1e-6)
    assert detectable(0.5, 400) == pytest.approx(detectable(0.5, 100) / 2)
    assert detectable(0.5, 100, power=0.5) == pytest.approx(1.959964 * 0.05, rel=1e-6), "half: the interval's own width"
    assert detectable(0.5, 100, methods=5) == pytest.approx(detectable(0.5, 100, confidence=0.99))
    assert detectable(0.0, 100) == 0


def test_statsmodels_agrees():
    power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is not installed")
    for n, wanted in ((50, 0.8), (400, 0.9)):
        theirs = power.NormalIndPower().solve_power(nobs1=n, alpha=0.05, power=wanted, ratio=0, alternative="two-sided")
        assert detectable(1.0, n, power=wanted) == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("wanted", [0.8, 0.95])
def test_simulated_experiments_find_the_difference_as_often_as_promised(wanted):
    """Paired yes/no results under a true difference of the detectable size."""
    n, rate, correlation = 50_000, 0.5, 0.5
    assumed = Rate("", rate).deviation(correlation)
    own = rate - detectable(assumed, n, power=wanted)
    both = own * rate + correlation * math.sqrt(own * (1 - own) * rate * (1 - rate))
    cells = [both, own - both, rate - both, 1 - own - rate + both]
    _, only_own, only_base, _ = np.random.default_rng(0).multinomial(n, cells, size=20_000).T
    mean = (only_own - only_base) / n
    z = mean / np.sqrt(((only_own + only_base) / n - mean**2) / n)
    assert (abs(z) > 1.959964).mean() == pytest.approx(wanted, abs=0.01)


def test_assumed_variance_of_clustered_items():
    """Items of an image share a draw with probability sqrt(c): their correlation is c."""
    k, c, p, n = 6, 0.15, 0.3, 200_000
    rng = np.random.default_rng(1)
    common = rng.random((n, 1))
    items = np.where(rng.random((n, k)) < math.sqrt(c), common, rng.random((n, k))) < p
    single = items.mean(axis=1).std()
    assumed = Rate("", 1 - p, k, c).deviation(0.0)
    assert assumed == pytest.approx(math.sqrt(2) * single, rel=0.01)


def test_rates_in_closed_form():
    assert Rate("", 0.5).deviation(0.0) == pytest.approx(math.sqrt(0.5))
    one, many = (Rate("", 0.15, mentions, 1.0).deviation(0.5) for mentions in (1, 50))
    assert one == pytest.approx(many), "fully clustered items are worth one"
    assert Rate("", 0.15, 4, 0.0).deviation(0.5) == pytest.approx(one / 2)
    assert assumed_deviations() == {key: rate.deviation(0.5) for key, rate in ASSUMED.items()}


def test_deviation_from_an_interval_is_that_of_the_images():
    n = 600
    a, b = chair_table(n, 1, 0.6), chair_table(n, 2, 0.5)
    contributions = []
    for table in (a, b):
        rate = table.hallucinated.sum() / table.mentions.sum()
        contributions.append((table.hallucinated - rate * table.mentions) / table.mentions.mean())
    expected = (contributions[0] - contributions[1]).std()
    interval = CHAIR_STATISTICS["chair_i"].difference(a, b)
    assert deviation_of_interval(interval_dict(interval), 0.95) == pytest.approx(expected, rel=0.06)
    a, b = pope_table(200, 1), pope_table(200, 2)
    interval = POPE_STATISTICS["accuracy"].difference(a, b, confidence=0.9)
    expected = (a.correct.astype(float) - b.correct).reshape(200, 6).mean(axis=1).std()
    assert deviation_of_interval(interval_dict(interval), 0.9) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("ends", [(None, None), (0.0, 0.0)])
def test_no_width_gives_no_estimate(ends):
    assert deviation_of_interval({"low": ends[0], "high": ends[1], "n": 9}, 0.95) is None


@pytest.mark.parametrize("wrong", [{"power": 0.2}, {"power": 1.0}, {"confidence": 95}, {"methods": 0}])
def test_what_is_no_level_is_refused(wrong):
    with pytest.raises(DataError, match="power"):
        detectable(1.0, 100, **wrong)


# The verb


def pilot_folder(folder):
    interval = {"estimate": -0.01, "low": -0.03, "high": 0.01, "n": 100}
    flat = {**interval, "low": 0.0, "high": 0.0}
    keys = ("chair.chair_s", "chair.chair_i", "pope.accuracy", "pope.auc")
    methods = [
        {"label": "none"},
        {"label": "vhr", "differences": dict.fromkeys(keys, interval)},
        {"label": "var", "differences": dict.fromkeys(keys, flat)},
    ]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"methods": methods, "intervals": {"confidence": 0.95}}))
    return folder


def test_pilot(tmp_path, capsys):
    folder = pilot_folder(tmp_path / "run")
    assert read_pilot(folder).deviations["var"] == dict.fromkeys(("chair.chair_s", "chair.chair_i", "pope.accuracy"))
    assert main(["power", str(folder), "--images", "100", "400"]) == 0
    text = capsys.readouterr().out
    # Half width 2.0 points at 100 images: 2.0 * 2.8016 / 1.95996 = 2.859.
    assert "100 images (its deviations are known to about 7 %)" in text  # 1 / sqrt(2 * 99)
    table = text.split("\n\n")[1]
    assert [line.split() for line in table.splitlines()] == [
        ["images", "CHAIR_s", "CHAIR_i", "POPE", "accuracy"],
        ["vhr", "100", *["2.9"] * 3],
        ["400", *["1.4"] * 3],
        ["var", "100", *["-"] * 3],
        ["400", *["-"] * 3],
    ]
    assert main(["power", str(folder / "results.json")]) == 0


def test_assumed_rates(capsys):
    assert main(["power", "--images", "2", "200", "--methods", "3"]) == 0
    text = capsys.readouterr().out
    assert "80 % power at 95 % confidence, shared by 3 methods" in text and "CHAIR_s 0.5" in text
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert rows[0][3] == "-", "no difference is larger than 100 points"
    factor = 2.39398 + 0.841621  # z(1 - 0.05 / 6) + z(0.8)
    assert rows[1][:2] == ["200", f"{100 * factor * math.sqrt(0.25 / 200):.1f}"]
    assert main(["power"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_errors(tmp_path, capsys, refused):
    folder = pilot_folder(tmp_path / "run")
    assert main(["power", str(tmp_path)]) == 2
    assert "results.json" in (message := capsys.readouterr().err) and "vlmfix eval" in message
    assert main(["power", "--images", "1"]) == 2
    (folder / "results.json").write_text('{"methods": [{"label": "none"}], "intervals": {"confidence": 0.95}}')
    assert "compares no method" in refused(["power", str(folder)])
    (folder / "results.json").write_text("[1]")
    assert main(["power", str(folder)]) == 2


def test_figures_that_a_pilot_lacks_are_left_out():
    text = power_table({"a": {"chair.chair_s": 0.5}}, [100])
    assert "CHAIR_s" in text and "POPE" not in text


def test_lines_before_a_run(tmp_path, capsys):
    least = detectable(assumed_deviations(11.0)["pope.accuracy"], 200, methods=4)
    lines = planned_lines({"chair": 400, "pope": 200, "amber": 1000}, 11.0, methods=4)
    assert lines == (
        "a run of this size shows differences of CHAIR_s 8.3, CHAIR_i 3.1, "
        f"POPE accuracy {100 * least:.1f} points\n"
        "  (80 % power at 95 %, 4 rows by Holm; assumed: the rates of LLaVA-1.5-7B, see vlmfix power)"
    )
    assert "rows" not in planned_lines({"chair": 400}, 1.0, methods=1) and "POPE" not in planned_lines(
        {"chair": 400}, 1.0, methods=1
    )
    assert planned_lines({"amber": 400}, 1.0, methods=1) == planned_lines({"chair": 1}, 1.0, methods=1) == ""
    words = ["eval", "--method", "pai", "--limit", "4", "--no-controls", "--benchmark", "chair", "--out", str(tmp_path)]
    assert main([*words, "--max-new-tokens", "8"]) == 0
    assert "shows differences of CHAIR_s 70.0, CHAIR_i 25.7 points" in capsys.readouterr().out
    assert main([*words, "--max-new-tokens", "8"]) == 0
    assert "shows differences" not in capsys.readouterr().out, "the answers are there"
