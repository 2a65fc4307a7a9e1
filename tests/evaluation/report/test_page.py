"""The page of a run: complete, self-contained, right in what it marks, and rendered by a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import assert_nothing_is_cut_off, chromium, needs_browser
from PIL import Image

from vlmfix.cli import main
from vlmfix.evals.benchmarks.chair.task import Chair
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.data.samples import Answer, Sample
from vlmfix.evals.report import text as report_text
from vlmfix.evals.report.html import galleries, html_report
from vlmfix.evals.report.summary import main_table, summarise
from vlmfix.evals.report.text import headline_columns, sentences
from vlmfix.evals.run.methods import MethodSpec
from vlmfix.evals.stats.figures import Figure, share

VOID = {"meta", "br", "img"}


class Checker(HTMLParser):
    """Collects tags and attributes, and insists that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and tag != "p":  # a paragraph may be closed by what follows
            while self.open and self.open[-1] == "p":
                self.open.pop()
            assert self.open.pop() == tag
        elif tag == "p" and self.open[-1] == "p":
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert (
        main(["eval", "--method", "vhr", "iat", "--set", "vhr.alpha=1.6", "--limit", "10", "--out", str(folder)]) == 0
    )
    return folder / "report.html"


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    checker = Checker()
    checker.feed(page.read_text(encoding="utf-8"))
    assert not checker.open
    assert checker.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in checker.sources)
    text = " ".join(checker.text)
    for expected in (
        "CHAIR_i",
        "POPE accuracy",
        "vhr/unselected",
        "CHAIR captions that iat changed most",
        "early stop",
        "p (Holm)",
        "Text quality, and CHAIR at equal length",
        "dominated by",
        "McNemar",
        "vlmfix eval --method vhr iat",
    ):
        assert expected in text
    assert "nan" not in text.lower().split()


def test_marks_are_the_invented_and_the_real_objects(page: Path) -> None:
    """Every caption's list of invented objects is what is marked as such in it."""
    answer = r'<p class="answer">(.*?)</p>\s*(?:<small class="invented">(.*?)</small>)?'
    captions = re.findall(answer, page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(captions) >= 4
    seen = 0
    whole = re.compile(r'title="[a-z]+ [a-z]+">\w+ \w+</mark>')
    assert any(whole.search(caption) for caption, _ in captions), "names of two words are marked as a whole"
    for caption, listed in captions:
        marked = set(re.findall(r'<mark class="invented" title="([^"]+)">', caption))
        assert marked == set(filter(None, listed.removeprefix("invented: ").split(", ")))
        seen += len(marked)
    assert seen > 0


@needs_browser
def test_a_browser_renders_it(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    chromium("--window-size=1120,2400", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        assert len(set(image.convert("L").resize((112, 240)).tobytes())) > 50, "the page is blank"


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off(page: Path, tmp_path: Path, width: int) -> None:
    assert_nothing_is_cut_off(page, tmp_path, width)


def interval(estimate: float, low: float, high: float, p: float) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high, "n": 9, "p_value": p, "p_holm": min(1.0, 2 * p)}


def small_results() -> dict[str, Any]:
    """A run of two benchmarks, one of them with a name no code of the page knows better than any other's."""
    sure, lost = interval(-0.1, -0.2, -0.05, 0.002), interval(-0.1, -0.19, -0.01, 0.04)
    rows: list[dict[str, Any]] = []
    for label, role in (("none", "baseline"), ("<m>", "method"), ("n", "method")):
        chair = {"summary": {"chair_i": 0.2, "recall": 0.8}, "changed": 1, "seconds": 1.0, "invented": {"cup": 2}}
        chair |= {"counts": {"captions": 9}, "about": "CHAIR original mode, 9 captions"}
        mme = {"summary": {"score": 640.0, "accuracy": 0.9}, "changed": 1, "seconds": 1.0, "counts": {}}
        rows.append({"label": label, "describe": label, "role": role, "chair": chair, "mme": mme})
    rows[1]["differences"] = {"chair.chair_i": sure, "mme.accuracy": lost}
    rows[2]["differences"] = {"chair.chair_i": lost}
    line = {
        "control": "early stop",
        "matched": "",
        "metric": "chair.chair_i",
        "method_value": 0.1,
        "control_value": 0.2,
    }
    versions = {"vlmfix": "0.1.0", "vlmfix_source": "abcdef0123", "torch": "2.13.0", "transformers": "5.23.0"}
    prompts = {"chair": {"prompt": "Describe."}, "mme": {"prompt": "?"}}
    return {
        "model": "a <model>",
        "data": "some data",
        "batch_size": 8,
        "notes": ["nothing & nobody"],
        "command": "vlmfix eval",
        "settings": {"seed": 0, "model": {"weights": "w", "dtype": "float32"}, "versions": versions, **prompts},
        "methods": rows,
        "intervals": {"resamples": 2000},
        "corrections": {"rows": 2},
        "controls": [
            {**line, "method": "<m>", "difference": sure, "verdict": "better", "verdict_holm": "better"},
            {**line, "method": "n", "difference": lost, "verdict": "better", "verdict_holm": "same"},
        ],
    }


def small_page(results: dict[str, Any]) -> str:
    return html_report(results, [], [], {})


def test_summary_has_verdicts_and_corrected_stars() -> None:
    found = " ".join(small_page(small_results()).split())
    assert '<th class="group" colspan="2">CHAIR</th><th class="group" colspan="2">MME</th>' in found
    assert "640.0" in found and "&lt;m&gt;" in found and "<m>" not in found and "&lt;model&gt;" in found
    assert found.count('<span class="verdict better"') == 1
    assert found.count('<span class="verdict unclear"') == 1, "what does not survive Holm is no verdict"
    assert '<small title="p = 0.002, corrected 0.004">-10.0* <br>[-20.0, -5.0]</small>' in found
    assert "-10.0(*) <br>[-19.0, -1.0]" in found


def test_the_first_lines_say_what_is_certain() -> None:
    results = small_results()
    assert sentences(results) == [
        "<m>: 10.0 points fewer invented objects; ending captions earlier does worse on CHAIR_i.",
        "n: no clear difference from none.",
    ]
    checker = Checker()
    checker.feed(small_page(results))
    text = " ".join(" ".join(checker.text).split())
    assert text.index(sentences(results)[0]) < text.index("Summary")


def test_the_headlines_are_those_declared_or_the_first_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def figure(benchmark: str, name: str, headline: bool = False) -> Figure:
        return Figure(name, name, 1, share("right"), headline=headline, benchmark=benchmark)

    declared = [figure("x", "a"), figure("x", "b"), figure("y", "c"), figure("y", "d", True), figure("y", "e", True)]
    monkeypatch.setattr(report_text, "used_figures", lambda results: declared)
    assert [each.name for each in headline_columns({})] == ["a", "d", "e"]
    assert figure("x", "a").phrases == ("lower X a", "higher X a")


def test_a_wide_summary_is_several_tables_of_whole_benchmarks() -> None:
    results = small_results()
    whole = summarise(results)
    assert [name for name, _ in whole.groups] == ["CHAIR", "MME"]
    first, last = whole.parts(lambda part: len(part.columns) < 3)
    assert [[figure.benchmark for figure in part.columns] for part in (first, last)] == [["chair"] * 2, ["mme"] * 2]
    assert first.closing == () and last.closing == ("seconds", "verdict")
    assert [row.cells for row in first.rows] == [row.cells[:2] for row in whole.rows]
    narrow = main_table(whole, 60)
    assert max(map(len, narrow.splitlines())) <= 60 and narrow.count("method") == 2


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("same", "same"), "; ending captions earlier does as much"),
        (("better", "same"), "; ending captions earlier does worse on CHAIR_i"),
        (("same", "worse"), "; ending captions earlier does better on CHAIR_s"),
        (("better", "worse"), "; ending captions earlier does worse on CHAIR_i and better on CHAIR_s"),
    ],
)
def test_sentences_tell_what_needs_no_method(verdicts: tuple[str, str], expected: str) -> None:
    results = small_results()
    line = results["controls"][0]
    results["controls"] = [
        {**line, "metric": metric, "verdict_holm": verdict}
        for metric, verdict in zip(("chair.chair_i", "chair.chair_s"), verdicts, strict=True)
    ]
    for row in results["methods"]:
        row["chair"]["summary"]["chair_s"] = 0.5
    assert sentences(results)[0] == f"<m>: 10.0 points fewer invented objects{expected}."
    told = "; but its text breaks (rep-4 +5.6 points), so that its other figures mean little"
    for estimate, low, broken in ((0.056, 0.035, told), (0.056, 0.0, ""), (0.05, 0.035, "")):
        rise = {"estimate": estimate, "low": low, "high": 0.08, "p_value": 0.001}
        results["methods"][1]["chair"]["text_quality"] = {"differences": {"repetition": rise}}
        assert sentences(results)[0] == f"<m>: 10.0 points fewer invented objects{expected}{broken}."
    for row in results["methods"]:
        row["chair"]["changed"] = row["mme"]["changed"] = 0
    assert sentences(results)[0] == "<m>: no answer changed."


@pytest.mark.parametrize(
    ("found", "unparsed", "expected"),
    [
        (
            interval(-0.03, -0.05, -0.01, 0.002),
            7,
            "costs ability: MMSTAR accuracy -3.0 [-5.0, -1.0], 7 unreadable answers",
        ),
        (interval(-0.01, -0.03, 0.01, 0.4), 2, "has no clear cost in ability: MMSTAR accuracy -1.0 [-3.0, +1.0]."),
        (interval(0.03, 0.01, 0.05, 0.002), 2, "gains ability: MMSTAR accuracy +3.0 [+1.0, +5.0]."),
    ],
)
def test_sentences_tell_what_a_method_costs_in_ability(found: Any, unparsed: int, expected: str) -> None:
    results = small_results()
    for row, count in zip(results["methods"], (2, unparsed, 2), strict=True):
        row["mmstar"] = {"summary": {"accuracy": 0.4}, "changed": 1, "seconds": 1.0, "counts": {"unparsed": count}}
    results["methods"][1]["differences"]["mmstar.accuracy"] = found
    results["controls"] = []
    assert sentences(results)[0].startswith(f"<m>: 10.0 points fewer invented objects; {expected}")
    assert "ability" not in sentences(results)[1], "nothing is known of it"


def test_one_invention_for_another_is_a_change(tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(image)
    samples = tuple(Sample("chair", i, image, "Describe.", 9, "gaps") for i in (1, 2))
    task = Chair(samples, {1: frozenset({"cat"}), 2: frozenset({"cat"})}, ChairMatcher(), 9)
    said = {"none": ("a cat", "a cat and a dog"), "m": ("a big cat", "a cat and a cup")}
    answers = {
        label: {s.key: Answer(text, (), False, (), None, 0.0) for s, text in zip(samples, texts, strict=True)}
        for label, texts in said.items()
    }
    specs = [MethodSpec("none", {"method": "none"}, "baseline"), MethodSpec("m", {"method": "m"}, "method")]
    (found,) = galleries(
        [*specs, MethodSpec("same", {"method": "same"}, "method")], task, {**answers, "same": answers["none"]}
    )
    assert [pair.image_id for pair in found.pairs] == [2, 1], "the dog that became a cup comes before a mere wording"


def test_a_figure_without_any_difference_has_a_panel() -> None:
    results = small_results()
    for row in results["methods"][1:]:
        row["differences"] = {key: interval(0.0, 0.0, 0.0, 1.0) for key in row["differences"]}
    assert small_page(results).count("<title>&lt;m&gt; 0.0 [0.0, 0.0]</title>") == 2


def test_plots_of_the_page_say_what_they_show_and_follow_its_colours() -> None:
    page = small_page(small_results())
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    text = " ".join(checker.text)
    for expected in ("MME accuracy ↑", "<m> -10.0 [-20.0, -5.0]", "n: 20.0 % at recall 80.0 %", "cup"):
        assert expected in text
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 3 + 2 + 2, "a panel per figure with a better side, two plots in two sizes"
    assert all("currentColor" in drawing and "#222222" not in drawing for drawing in drawings)
    named = re.findall(r'\bid="([^"]+)"', page)
    assert len(named) == len(set(named)), "an id stands once"
