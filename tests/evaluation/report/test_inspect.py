"""``vlmfix inspect``: what it finds on the embedded model, what the page shows, and how a browser renders it."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import assert_nothing_is_cut_off, chromium, needs_browser
from test_page import Checker
from testbed_doubt import Named, measure, report

from vlmfix.cli import main
from vlmfix.evals import testbed
from vlmfix.evals.inspect import look
from vlmfix.evals.inspect.case import grid_of
from vlmfix.evals.inspect.command import InspectOptions, inspect_command
from vlmfix.evals.inspect.look import Inspection, Word, layer_groups, word_spans
from vlmfix.evals.inspect.page import inspection_page, summary, verdict
from vlmfix.observe import words as observed
from vlmfix.probes.evidence import DOUBT_THRESHOLD

EXAMPLES = {350: "cup", 227: "carrot", 122: "parking meter", 356: "frisbee"}
"""Held-out scenes and the object their stock caption invents, as documented in ``evals/testbed/EXAMPLES.md``."""


@pytest.fixture(scope="module")
def named() -> dict[int, list[Named]]:
    found: dict[int, list[Named]] = {scene: [] for scene in EXAMPLES}
    for each in measure("heldout", list(EXAMPLES)):
        found[each.scene].append(each)
    return found


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    return inspect_command(InspectOptions(scene=350, methods=("vhr",), settings=("alpha=1.6",)))


@pytest.fixture(scope="module")
def page(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "page.html"
    path.write_text(inspection_page(inspection), encoding="utf-8")
    return path


def test_answers_that_are_rewritten_are_shown_with_what_they_rest_on_in_the_stock_model() -> None:
    found = inspect_command(InspectOptions(scene=356, methods=("verify",)))
    stock, verified = found.versions
    assert "measured in the stock model" in verified.note and not stock.note
    assert "frisbee" in stock.caption and "frisbee" not in verified.caption
    assert [word.text for word in verified.words] == verified.caption.split()


# The planted cause: an object that usually stands in such a place.


@pytest.mark.parametrize("scene", EXAMPLES)
def test_the_flag_falls_on_the_invented_object_and_on_no_other(named: dict[int, list[Named]], scene: int) -> None:
    objects = named[scene]
    assert [each.name for each in objects if each.absent] == [EXAMPLES[scene]]
    assert [each.name for each in objects if each.doubt >= DOUBT_THRESHOLD] == [EXAMPLES[scene]]
    assert len(objects) >= 4


@pytest.mark.parametrize("scene", EXAMPLES)
def test_the_words_carry_it_and_not_the_picture(named: dict[int, list[Named]], scene: int) -> None:
    (invented,) = (each for each in named[scene] if each.absent)
    assert invented.without_image >= 0.9 * invented.probability, "the image-free prompt predicts it as well"
    assert invented.image_hidden >= 0.8 * invented.probability, "hiding the image does not take it away"
    assert invented.context_hidden <= 0.1 * invented.probability, "hiding what was named before does"
    present = [each for each in named[scene] if not each.absent]
    assert any(each.image_hidden < 0.5 * each.probability for each in present), (
        "negative control: the image carries one"
    )


def test_the_documented_figures_are_those_measured(named: dict[int, list[Named]]) -> None:
    text = (Path(testbed.__file__).parent / "EXAMPLES.md").read_text(encoding="utf-8")
    for scene, name in EXAMPLES.items():
        (row,) = re.findall(rf"^\| {scene} \|.*$", text, re.MULTILINE)
        (invented,) = (each for each in named[scene] if each.absent)
        assert f"| {name} |" in row
        *shares, score = re.findall(r"[\d.]+(?= %)|0\.\d\d(?= \|)", row)
        expected = [100 * value for value in (*invented[3:7], invented.asked)]
        assert [float(share) for share in shares] == pytest.approx(expected, abs=1.0)
        assert float(score) == pytest.approx(invented.doubt, abs=0.01)


def test_a_report_of_what_is_named(named: dict[int, list[Named]]) -> None:
    every = [each for objects in named.values() for each in objects]
    text = report(every)
    assert f"{len(every)} objects named, 4 of them absent." in text
    assert "| doubt | 100.0 |" in text  # in these scenes no object that is there is more doubtful
    assert re.search(rf"\| {DOUBT_THRESHOLD:.2f} \| [\d.]+ \| 100.0 \| 100.0 \| 100.0 \|", text)


# What is found.


def test_an_inspection_says_what_the_probes_say(inspection: Inspection, named: dict[int, list[Named]]) -> None:
    stock, patched = inspection.versions
    assert stock.label == "stock model" and patched.label.startswith("vhr") and "alpha=1.6" in patched.label
    assert inspection.grid == (8, 8) and inspection.objects == ("cake", "donut", "person", "sandwich", "vase")
    assert " ".join(word.text for word in stock.words) == stock.caption
    objects = {word.name: word for word in stock.words if word.name}
    for each in named[350]:
        word = objects[each.name]
        assert (word.probability, word.without_image, word.image_hidden, word.context_hidden) == pytest.approx(
            each[3:7], abs=1e-4
        )
        assert (word.mass, word.asked, word.doubt) == pytest.approx(each[7:], abs=1e-4)
        assert word.present is not each.absent
        assert word.flagged == (each.doubt >= DOUBT_THRESHOLD)
    for version in inspection.versions:
        for word in version.words:
            assert sum(word.maps[0]) == pytest.approx(word.mass, abs=1e-4)
            thirds = torch.tensor(word.maps[1:]).mean(0)
            assert torch.allclose(thirds, torch.tensor(word.maps[0]), atol=1e-5)
            assert len(word.heads) == 6 and len(word.heads[0]) == 8
    assert stock.words[0].name is None and stock.words[0].doubt is None and not stock.words[0].flagged
    assert patched.words[0].maps != stock.words[0].maps


def test_words_of_two_branches_are_read_by_the_stock_model(inspection: Inspection) -> None:
    found = inspect_command(InspectOptions(scene=350, methods=("vcd",), settings=("alpha=0.5",)))
    assert "measured in one branch" in found.versions[1].note and found.versions[1].words
    assert found.versions[0] == inspection.versions[0], "what was patched before leaves nothing behind"


def test_words_and_their_tokens() -> None:
    class Tokenizer:
        pieces = ("A", " tea", "cup", ",", " (not", " a", " cat", ")", ".")

        def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
            return "".join(self.pieces[i] for i in ids)

    ids = list(range(9))
    spans = word_spans(Tokenizer(), ids, Tokenizer().decode(ids))
    assert [(span.text, span.tokens) for span in spans] == [
        ("A", (0,)),
        ("teacup,", (1, 2)),
        ("(not", (4,)),
        ("a", (5,)),
        ("cat).", (6,)),
    ]


@pytest.mark.parametrize(
    ("trace", "note"),
    [("<think>a dog?</think>", "2 words of thinking"), ("<think>a dog? ", "It never ends"), ("", "")],
)
def test_thinking_is_no_part_of_the_answer(
    trace: str, note: str, inspection: Inspection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(tokenizer: Any, ids: Any) -> str:
        """The first token spells a trace as well; what is behind it stays where it was."""
        return trace + str(tokenizer.decode(list(ids), skip_special_tokens=True)) if len(ids) else ""

    for module in (look, observed):
        monkeypatch.setattr(module, "decode", written)
    (found,) = inspect_command(InspectOptions(scene=350)).versions
    stock = inspection.versions[0]
    assert note in found.note and bool(note) == bool(found.note)
    if note == "It never ends":
        assert note in found.note and found.caption == "" and found.words == ()
    else:
        assert found.caption == stock.caption and found.words == stock.words


def test_layers_in_groups() -> None:
    assert [list(group) for group in layer_groups(6)] == [[0, 1, 2, 3, 4, 5], [0, 1], [2, 3], [4, 5]]
    assert [len(group) for group in layer_groups(32)] == [32, 11, 10, 11]
    assert all(list(group) == [0, 1] for group in layer_groups(2))


def test_grids() -> None:
    class Model:
        class config:
            class vision_config:
                spatial_merge_size = 2

    pixels = torch.zeros(1, 3, 8, 8)
    assert grid_of(Model, {"pixel_values": pixels}, 64) == (8, 8)
    assert grid_of(Model, {"pixel_values": pixels[None]}, 64) == (8, 8)
    assert grid_of(Model, {"pixel_values": torch.zeros(4, 3, 8, 8)}, 64) is None  # tiles
    assert grid_of(Model, {"pixel_values": pixels}, 60) is None
    assert grid_of(Model, {"image_grid_thw": torch.tensor([[1, 8, 12]])}, 24) == (4, 6)
    assert grid_of(Model, {"image_grid_thw": torch.tensor([[1, 8, 12]])}, 25) is None
    assert grid_of(Model, {"image_grid_thw": torch.tensor([[1, 8, 12]] * 2)}, 24) is None


WORD = Word("cup.", (3,), "cup", False, 0.5, 0.5, 0.5, 0.01, 0.4, 0.2, 0.9, True, ((0.4,),) * 4, ((1.0,),))


def test_verdicts_in_words() -> None:
    assert verdict(WORD) == (
        "Flagged. The words alone predict it as well: 50 % without the image. Hiding the image hardly changes it. "
        "Hiding what was named before takes it away: 1 %. Asked for it, the model says no (20 % yes)."
    )
    assert "even raises it: 90 %" in verdict(replace(WORD, image_hidden=0.9))
    seen = verdict(replace(WORD, without_image=0.01, image_hidden=0.01, asked=0.9, flagged=False, context_hidden=0.5))
    assert seen == "Not flagged. The image carries it: 1 % without it instead of 50 %."
    assert verdict(replace(WORD, name=None)) == "Without the image 50 % instead of 50 %."
    assert "with 30 %, with the image 50 %" in verdict(replace(WORD, without_image=0.3))
    assert "asked" not in verdict(replace(WORD, asked=None)).lower()


def test_the_summary_counts_flags_and_absent_objects(inspection: Inspection) -> None:
    stock, _ = summary(inspection)
    assert stock == "stock model: 1 of 6 object words flagged (cup); named and not in the picture: cup."
    assert summary(replace(inspection, objects=None))[0] == "stock model: 1 of 6 object words flagged (cup)."


# The page.


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html.replace('<input type="checkbox" id="colour">', ""))  # it has no end tag
    assert not checker.open
    assert checker.sources and all(source.startswith("data:image/jpeg;base64,") for source in checker.sources)
    assert not re.search(r"https?://|@import|url\(", html)
    text = " ".join(checker.text)
    for expected in (
        "Where each word looks",
        "Sinks",
        "Heads that depend",
        "What a flag says",
        "stock model",
        "alpha=1.6",
    ):
        assert expected in text
    assert "nan" not in text.lower().split()
    assert len(html) < 1_500_000


def test_the_data_of_the_page_is_that_of_the_inspection(page: Path, inspection: Inspection) -> None:
    (text,) = re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    data = json.loads(text)
    assert data["threshold"] == DOUBT_THRESHOLD
    assert inspection.versions[0].words[data["first"]["word"]].name == "cup"
    for version, shown in zip(inspection.versions, data["versions"], strict=True):
        for word, entry in zip(version.words, shown["words"], strict=True):
            assert entry["text"] == word.text and entry["p"] == word.probability and entry["doubt"] == word.doubt
            for values, packed, top in zip(word.maps, entry["maps"], data["tops"], strict=True):
                unpacked = torch.tensor(list(base64.b64decode(packed))) * top / 255
                assert torch.allclose(unpacked, torch.tensor(values), atol=top / 255)


def test_marks_are_flags_and_truth(page: Path, inspection: Inspection) -> None:
    html = page.read_text(encoding="utf-8")
    for number, version in enumerate(inspection.versions):
        for index, word in enumerate(version.words):
            (kinds,) = re.findall(rf'class="([^"]*)" data-version="{number}" data-word="{index}"', html)
            assert ("flagged" in kinds) == word.flagged
            assert ("absent" in kinds) == (word.present is False) and ("present" in kinds) == (word.present is True)


def test_what_is_not_known_is_not_shown(inspection: Inspection) -> None:
    words = tuple(replace(word, present=None) for word in inspection.versions[0].words)
    unknown = replace(inspection, objects=None, versions=(replace(inspection.versions[0], words=words),), grid=None)
    html = inspection_page(unknown)
    assert "In the picture" not in html and "not in the picture" not in html
    assert "several tiles or views" in html and 'viewBox="0 0 64 1"' in html
    hostile = replace(unknown, title="</script><b>", prompt="<i>", facts=("<u>",))
    assert "<b>" not in inspection_page(hostile) and "<u>" not in inspection_page(hostile)


def test_an_answer_without_words_has_a_page(inspection: Inspection) -> None:
    silent = replace(inspection.versions[0], words=(), caption="")
    assert "(no words)" in inspection_page(replace(inspection, versions=(silent,)))


@needs_browser
def test_a_browser_shows_the_flagged_word_and_its_map(page: Path, inspection: Inspection) -> None:
    dom = chromium("--dump-dom", page.as_uri())
    pressed = re.findall(r'data-word="(\d+)" aria-pressed="true"', dom)
    assert [inspection.versions[n].words[int(word)].name for n, word in enumerate(pressed)] == ["cup", "cup"]
    assert dom.count("“cup.” looks at the image with") == 2
    panels = re.findall(r'<div class="card panel".*?</div></div>', dom, re.DOTALL)
    assert "Flagged." in panels[0] and "46 %" in panels[0] and "0.79" in panels[0]
    cells = re.findall(r'<rect[^>]*fill-opacity="([\d.]+)" data-at="row[^>]*fill="rgb', dom)
    assert len(cells) == 4 * 64  # two maps of the word, two of what tokens receive
    word = next(each for each in inspection.versions[0].words if each.name == "cup")
    brightest = max(range(64), key=lambda at: float(cells[at]))
    assert word.maps[0][brightest] == max(word.maps[0])


@needs_browser
@pytest.mark.parametrize("size", ["1300,2400", "420,3200"])
def test_a_browser_renders_it(page: Path, tmp_path: Path, size: str) -> None:
    from PIL import Image

    shot = tmp_path / "page.png"
    chromium(f"--window-size={size}", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        colours = image.convert("RGB").resize((112, 240)).getcolors(112 * 240)
        assert colours is not None and len(colours) > 50, "the page is blank"


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_off(page: Path, tmp_path: Path, width: int) -> None:
    assert_nothing_is_cut_off(page, tmp_path, width)


# The command.


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 120, 40)).save(tmp_path / "picture.png")
    out = tmp_path / "page.html"
    words = ["inspect", "--image", str(tmp_path / "picture.png"), "--prompt", "Describe the image.", "--objects", "dog"]
    assert main([*words, "--max-new-tokens", "12", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "stock model: " in printed and f"written: {out}" in printed
    assert "Describe the image." in out.read_text(encoding="utf-8")


def test_another_model_and_what_it_cannot_be_asked(processor_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 120, 40)).save(tmp_path / "picture.png")
    out = tmp_path / "page.html"
    words = ["inspect", "--model", str(processor_folder), "--image", str(tmp_path / "picture.png"), "--out", str(out)]
    assert main([*words, "--method", "vhr", "--max-new-tokens", "4"]) == 0
    html = out.read_text(encoding="utf-8")
    assert "picture.png" in html and "not in the picture" not in html


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "missing.png"], "no image file"),
        (["--scene", "-1"], "--scene must be at least 0"),
        (["--method", "vhr", "pai"], "one method"),
        (["--method", "vh"], "no method 'vh'"),
        (["--objects", "unicorn"], "COCO"),
        (["--out", "no/folder/page.html"], "there is no folder"),
        (["--scene", "1", "--image", "a.png"], "not both"),
        (["--model", "no/such/model/folder"], "needs a picture"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err
