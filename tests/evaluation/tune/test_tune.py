"""``vlmfix tune``: the rule, the search, the split of the images, and a whole run on the embedded model."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

pytest.importorskip("optuna")

import vlmfix
from vlmfix.cli import main
from vlmfix.errors import DataError, MethodError, VlmfixError
from vlmfix.evals.benchmarks.chair.text_quality import broken_text
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.tune.search import Goal, Search, admitted, choose, goal_of, space_of
from vlmfix.evals.tune.splits import make_splits
from vlmfix.methods.parameters import Choice, Range
from vlmfix.methods.registry import list_methods, method_from_dict


def goal(hallucination, recall, accuracy=0.9, **rates):
    text = {"repetition": 0.03, "looping": 0.0, "truncation": 0.0, **rates}
    return Goal("CHAIR_i", hallucination, {"CHAIR recall": recall, "POPE accuracy": accuracy}, text)


NONE = goal(0.15, 0.80)


# The rule.


@pytest.mark.parametrize(
    ("goals", "best"),
    [
        ([goal(0.10, 0.70), goal(0.12, 0.795), goal(0.13, 0.80)], 1),  # the lowest of those that keep recall
        ([goal(0.12, 0.79), goal(0.12, 0.80)], 0),  # of equals the first
        ([goal(0.15, 0.80), goal(0.16, 0.90)], None),  # not better than none
        ([goal(0.10, 0.70)], None),
        ([goal(0.10, 0.80, accuracy=0.88)], None),  # every guard counts
        ([goal(0.10, 0.79, accuracy=0.89)], 0),  # the margin itself is admitted
        ([goal(0.10, 0.80, repetition=0.09)], None),  # broken text is no merit, whatever it invents
        ([goal(0.10, 0.80, truncation=0.06), goal(0.12, 0.80, repetition=0.07)], 1),
        ([], None),
    ],
)
def test_the_rule_takes_the_lowest_hallucination_within_the_margin(goals, best):
    assert choose(goals, NONE, 0.01) == best


def test_a_wider_margin_admits_what_a_narrow_one_refuses():
    assert not admitted(goal(0.1, 0.75), NONE, 0.01) and admitted(goal(0.1, 0.75), NONE, 0.05)


def test_what_breaks_the_text_is_named():
    rises = goal(0.1, 0.8, repetition=0.086, truncation=0.05).rises(NONE)
    assert broken_text(rises) == ["rep-4 +5.6"], "the margin itself is admitted"
    assert broken_text(goal(0.1, 0.8, truncation=0.2).rises(NONE)) == ["cut off +20.0"]


def test_goals_are_read_off_the_results():
    pope = {"all": {"counts": {"TP": 30, "FN": 10, "FP": 6, "TN": 34}, "summary": {"accuracy": 0.8, "recall": 0.75}}}
    rates = {"repetition": 0.03, "looping": 0.0, "truncation": 0.01}
    quality = {"text_quality": {"summary": {**rates, "unfinished": 0.2}}}
    chair = {"summary": {"chair_i": 0.2, "recall": 0.6}, **quality}
    assert goal_of({"pope": pope}) == Goal("POPE false yes", 6 / 40, {"POPE recall": 0.75})
    assert goal_of({"chair": chair}) == Goal("CHAIR_i", 0.2, {"CHAIR recall": 0.6}, rates)
    assert goal_of({"chair": chair, "pope": pope}).guards == {"CHAIR recall": 0.6, "POPE accuracy": 0.8}
    with pytest.raises(VlmfixError, match="more images"):
        goal_of({"chair": {"summary": {"chair_i": None, "recall": 0.6}, **quality}})


# The space.


@pytest.mark.parametrize("name", sorted(list_methods()))
def test_a_declared_space_is_one_the_method_takes(name):
    method = list_methods()[name]
    known = {field.name: field.default for field in dataclasses.fields(method)}
    if name != "none":
        assert method.search_space, "a method without a search space cannot be tuned"
    needs = {"experimental": True} if "experimental" in known else {}
    for key, space in method.search_space.items():
        ends = (space.low, space.high) if isinstance(space, Range) else space.values
        for value in ends:
            assert method_from_dict({"method": name, **needs, key: value}).to_dict()[key] == value
        default = known[key]
        if isinstance(space, Choice):
            assert default in space.values
        else:
            assert default is None or space.low <= default <= space.high


def test_what_is_fixed_is_not_searched_and_the_users_range_replaces_the_declared_one():
    start = vlmfix.VHR()
    assert set(space_of(start, ["layers"], [])) == {"alpha"}
    space = space_of(start, [], ["alpha=1.1:1.3", "outliers=true,false", "layers=null,0:"])
    assert space == {"alpha": Range(1.1, 1.3), "outliers": Choice((True, False)), "layers": Choice((None, "0:"))}


@pytest.mark.parametrize(
    ("fixed", "ranges", "message"),
    [
        ([], ["beta=0:1"], "expected PARAMETER"),
        ([], ["alpha"], "expected PARAMETER"),
        ([], ["alpha=2:1"], "smaller and a larger"),
        ([], ["alpha=a:b"], "smaller and a larger"),
        ([], ["alpha=1:inf"], "smaller and a larger"),
        (["alpha"], ["alpha=1:2"], "--set fixes alpha"),
        (["alpha", "layers"], [], "nothing is left"),
    ],
)
def test_a_space_that_is_none_is_refused(fixed, ranges, message):
    with pytest.raises(MethodError, match=message):
        space_of(vlmfix.VHR(), fixed, ranges)


# The search.


def walk(seed, budget=12, space=None, margin=0.0):
    """Search a known landscape: less hallucination with more alpha, recall lost beyond 2."""
    search = Search(vlmfix.VHR(alpha=1.5), space or {"alpha": Range(1.05, 3.0)}, seed=seed)
    tried = []
    for method in search.settings(budget):
        found = goal(0.3 - 0.1 * method.alpha, 0.8 - max(0.0, method.alpha - 2.0))
        tried.append((method, found))
        search.tell(method, found, goal(0.3, 0.8), margin)
    return tried


def test_a_search_repeats_itself_from_its_seed_and_begins_with_the_start():
    first, again, other = walk(3), walk(3), walk(4)
    assert first == again and first != other
    assert first[0][0] == vlmfix.VHR(alpha=1.5)
    assert len(first) == 12 and len({method for method, _ in first}) == 12
    assert all(1.05 <= method.alpha <= 3.0 for method, _ in first)


def test_a_search_comes_nearer_to_the_best_admitted_setting():
    tried = walk(0, budget=30)
    best = choose([found for _, found in tried], goal(0.3, 0.8), 0.0)
    assert 1.85 < tried[best][0].alpha <= 2.0
    # Even draws would lie .49 off on average.
    assert sum(abs(method.alpha - 2.0) for method, _ in tried[15:]) / 15 < 0.35
    free = [method.alpha for method, _ in walk(0, budget=30, margin=5.0)[15:]]
    assert sum(free) / 15 > 2.5, "without a guard, more is better here"


def test_an_exhausted_space_ends_the_search():
    tried = walk(0, budget=9, space={"outliers": Choice((True, False))})
    assert [method.outliers for method, _ in tried] == [True, False]


def test_a_range_beyond_what_the_method_takes_is_an_error_of_the_method():
    with pytest.raises(MethodError, match="alpha"):
        walk(0, space={"alpha": Range(-3.0, -1.0)})


# The images.


def test_the_two_files_of_ids_share_no_image(tmp_path):
    on, off = tmp_path / "on.txt", tmp_path / "off.txt"
    on.write_text("1 2 3")
    off.write_text("3 4")
    options = EvalOptions(data=tmp_path, ids=on)
    with pytest.raises(DataError, match=r"1 images \(first: 3\)"):
        make_splits(options, None, off, tmp_path)
    with pytest.raises(DataError, match="give both"):
        make_splits(options, None, None, tmp_path)
    off.write_text("4 5")
    assert make_splits(options, None, off, tmp_path) == (options, dataclasses.replace(options, ids=off))
    with pytest.raises(DataError, match="--data"):
        make_splits(EvalOptions(ids=on), None, off, tmp_path)


def test_drawn_images_are_disjoint_and_depend_on_the_seed_alone(tmp_path):
    from vlmfix.evals.testbed import prepare

    data = prepare("calibration", 30)
    drawn = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        on, off = make_splits(EvalOptions(data=data, limit=8, seed=seed), 5, None, tmp_path / name)
        drawn[name] = [json.loads(options.ids.read_text()) for options in (on, off)]
        assert len(drawn[name][0]) == 8 and len(drawn[name][1]) == 5
        assert not set(drawn[name][0]) & set(drawn[name][1])
    assert drawn["a"] == drawn["b"] != drawn["c"]
    with pytest.raises(DataError, match="fewer with --limit"):
        make_splits(EvalOptions(data=data, limit=10**6), 5, None, tmp_path)


# The command.


def run(folder, *more):
    # A margin of 100 points admits everything, so that a handful of scenes is enough to choose from.
    arguments = ["tune", "--method", "vhr", "--limit", "20", "--confirm", "6", "--budget", "3", "--margin", "100"]
    arguments += ["--range", "alpha=1.1:1.6", "--max-new-tokens", "40", "--seed", "2"]
    return main([*arguments, "--folder", str(folder / "run"), "--out", str(folder / "vhr.json"), *more])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    assert run(folder) == 0
    return folder


def test_a_run_writes_a_recipe_that_patch_loads(tuned):
    recipe = json.loads((tuned / "vhr.json").read_text())
    (method,) = vlmfix.load_recipe(tuned / "vhr.json")
    rows = recipe["grid"]
    assert [row["method"] for row in rows] == ["none", "vhr", "vhr", "vhr"] and recipe["settings_tried"] == 3
    best = min(rows[1:], key=lambda row: row["chair.chair_i"])
    assert method.alpha == best["alpha"] and best["chair.chair_i"] < rows[0]["chair.chair_i"]
    assert recipe["calibration"]["figures"]["chair.chair_i"]["value"] == best["chair.chair_i"]
    assert "calibration" in recipe["calibration"]["data"] and "heldout" in recipe["heldout"]["data"]


def test_both_sides_are_runs_anybody_can_read(tuned):
    recipe = json.loads((tuned / "vhr.json").read_text())
    for side in ("calibration", "heldout"):
        results = json.loads((tuned / "run" / side / "results.json").read_text())
        assert results["command"].startswith("vlmfix tune --method vhr")
        assert (tuned / "run" / side / "report.html").is_file()
    row = next(row for row in results["methods"] if row["label"] == "chosen")
    found = recipe["heldout"]["figures"]["chair.recall"]
    assert found["value"] == row["chair"]["summary"]["recall"]
    assert found["difference"] == row["differences"]["chair.recall"]
    assert math.isclose(found["difference"]["estimate"], found["value"] - found["none"], abs_tol=1e-12)


def test_a_second_run_generates_nothing_and_chooses_the_same(tuned, capsys):
    answers = [tuned / "run" / side / "answers.jsonl" for side in ("calibration", "heldout")]
    before, recipe = [path.read_bytes() for path in answers], (tuned / "vhr.json").read_text()
    assert run(tuned) == 0
    assert [path.read_bytes() for path in answers] == before
    assert (tuned / "vhr.json").read_text() == recipe
    shown = capsys.readouterr().out
    assert "calibration" in shown and "held out" in shown and "95 %" in shown


def test_nothing_is_written_when_no_setting_helps(tuned, tmp_path, capsys):
    # With factor 1 the method is the identity: nothing can be lower than none.
    options = ["--method", "vhr", "--limit", "8", "--confirm", "6", "--budget", "2", "--max-new-tokens", "24"]
    options += ["--set", "alpha=1.0", "--range", "outliers=true,false", "--folder", str(tmp_path / "run")]
    code = main(["tune", *options, "--out", str(tmp_path / "vhr.json")])
    assert code != 0 and not (tmp_path / "vhr.json").exists()
    assert "none of 2 settings lowers CHAIR_i" in capsys.readouterr().err


def test_settings_that_break_the_text_are_told_and_not_chosen(tmp_path, capsys):
    options = ["--method", "vhr", "--limit", "4", "--confirm", "4", "--budget", "2", "--max-new-tokens", "60"]
    options += ["--set", "alpha=8", "--range", "outliers=true,false", "--folder", str(tmp_path / "run")]
    assert main(["tune", *options, "--out", str(tmp_path / "vhr.json")]) != 0
    shown = capsys.readouterr()
    assert shown.out.count("(its text breaks: rep-4 +") == 2
    assert "keeps its text whole: nothing was written" in shown.err and not (tmp_path / "vhr.json").exists()


def test_a_folder_of_another_search_is_refused(tuned, capsys):
    assert run(tuned, "--prompt", "What is here?") != 0
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "1"], "--budget must be at least 2"),
        (["--margin", "-1"], "--margin is in points"),
        (["--confirm", "0"], "--confirm must be at least 1"),
        (["--set", "alpha"], "--set expects key=value"),
        (["--out", "nowhere/vhr.json"], "there is no folder nowhere"),
        (["--method", "vrh"], "There is no method 'vrh'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(tmp_path, capsys, more, message):
    assert main(["tune", "--method", "vhr", "--folder", str(tmp_path / "run"), *more]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
