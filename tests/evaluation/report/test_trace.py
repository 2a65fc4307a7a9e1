"""``vlmfix trace``: what it finds on the embedded model is what the probes say, and the page shows it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import assert_nothing_is_cut_off, needs_browser
from test_page import Checker

from vlmfix import probes
from vlmfix.cli import main
from vlmfix.evals.inspect.command import load_case, shown_picture
from vlmfix.evals.inspect.trace import (
    Traced,
    TraceOptions,
    knockout_rows,
    summary,
    trace_answer,
    trace_command,
    trace_page,
    trace_rows,
)
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.observe.words import yes_no_tokens


@pytest.fixture(scope="module")
def traced() -> Traced:
    return trace_command(TraceOptions(scene=350))


@pytest.fixture(scope="module")
def page(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "page.html"
    path.write_text(trace_page(traced), encoding="utf-8")
    return path


def test_a_trace_is_what_the_probes_say(traced: Traced) -> None:
    """The same figures from the probes, called by hand with the scene's own annotations."""
    scene = make_scene(image_id("heldout", 350))
    largest = max(scene.instances, key=lambda each: each.area)
    assert traced.question.startswith(f"Is there a {largest.name} in the image?") and traced.answer == "Yes"
    options = TraceOptions(scene=350)
    case, _, _ = load_case(options, shown_picture(options), traced.question)
    inputs, places = case.inputs(), [each.bbox for each in scene.instances if each.name == largest.name]
    boxes = [(x / 96, y / 96, (x + width) / 96, (y + height) / 96) for x, y, width, height in places]
    assert traced.boxes == tuple(boxes) and len(boxes) == 3
    answers = yes_no_tokens(case.processor.tokenizer)
    assert answers is not None and set(traced.trace.answer) == set(answers.yes)
    cells = {
        (row // 12) * 8 + column // 12  # a cell is 12 pixels wide
        for x, y, width, height in places
        for row in range(y, y + height)
        for column in range(x, x + width)
    }
    word = case.processor.tokenizer.convert_tokens_to_ids(largest.name)
    place = probes.ObjectPlace(sorted(cells), [inputs["input_ids"][0].tolist().index(word)])
    expected = probes.causal_trace(
        case.model, inputs, answers.yes, groups=("image_object", "text_object", "last"), places=[place]
    )
    assert torch.equal(traced.trace.recovery, expected.recovery)
    assert traced.trace.p_clean > 2 * traced.trace.p_corrupted
    assert traced.window == 2, "nine of 32 are two of six"
    question = probes.text_span(case.processor.tokenizer, inputs, [traced.question])
    cut = probes.knockout(case.model, inputs, ["object->question"], window=2, boxes=[boxes], question=question)
    at = traced.knocked.pairs.index("object->question")
    assert torch.allclose(traced.knocked.change[at], cut.change[0], atol=1e-4)


def test_the_summary_names_the_largest(traced: Traced) -> None:
    first, second, third = summary(traced)
    assert f"{100 * float(traced.trace.p_clean[0]):.0f} %" in first
    rate = float(traced.trace.recovery.max())
    assert f"brings back {100 * rate:.0f} %" in second
    assert f"by {float(traced.knocked.change.min()):.0f} %" in third
    assert max(row[-1] for row in trace_rows(traced)) == rate
    assert len(trace_rows(traced)) == 6 and len(knockout_rows(traced)) == 6


def test_the_page_needs_no_other_and_says_what_was_found(page: Path, traced: Traced) -> None:
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=.http", html)
    checker = Checker()
    checker.feed(html)
    text = " ".join(" ".join(checker.text).split())
    for line in (*summary(traced), "the object's patches", "the word for it", "object → question", "Framed:"):
        assert line in text
    assert html.count('class="box"') == 6 and "nan" not in text.lower().split()
    hostile = replace(traced, title="</script><b>", question="<i>", facts=("<u>",))
    assert "<b>" not in trace_page(hostile) and "<u>" not in trace_page(hostile)


def test_where_nobody_knows_the_object_all_of_the_image_is_traced(traced: Traced) -> None:
    options = TraceOptions(scene=350)
    case, _, _ = load_case(options, shown_picture(options), traced.question)
    found = trace_answer(case, "", (), None, title="t")
    assert found.trace.groups == ("image_object", "text_before", "last") and found.whole_image
    assert found.group_name("image_object") == "the image" and len(found.knocked.pairs) == 4
    assert "Nobody said where the object is" in trace_page(found)


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off(page: Path, tmp_path: Path, width: int) -> None:
    assert_nothing_is_cut_off(page, tmp_path, width)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--object", "elephant"], "there is no elephant in scene 350 of heldout, only"),
        (["--image", "a.png"], "needs a question about --image"),
        (["--box", "0", "0", "1", "1"], "a scene has boxes of its own"),
        (["--window", "0"], "--window must be at least 1"),
        (["--out", "no/folder/page.html"], "there is no folder"),
        (["--model", "no/such/model/folder"], "needs a picture"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), (200, 120, 40)).save("a.png")
    assert main(["trace", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))
