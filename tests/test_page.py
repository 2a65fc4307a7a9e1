"""The page of a run: complete, self-contained, right in what it marks, and rendered by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vlmfix.cli import main

VOID = {"meta", "br", "img", "line", "circle", "rect"}


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
        "recall of objects",
        "vhr/unselected",
        "Captions that iat changed most",
    ):
        assert expected in text
    assert "nan" not in text.lower().split()


def test_marks_are_the_invented_and_the_real_objects(page: Path) -> None:
    """Every caption's list of invented objects is what is marked as such in it."""
    captions = re.findall(r"<p>((?:(?!</p>).)*<mark.*?)</p>", page.read_text(encoding="utf-8"))
    captions = [caption for caption in captions if "Invented</mark>" not in caption]
    assert len(captions) >= 4
    seen = 0
    for caption in captions:
        marked = set(re.findall(r'<mark title="([^"]+)">', caption))
        (listed,) = re.findall(r"invented: ([^<]+)", caption) or [""]
        assert marked == set(filter(None, listed.split(", ")))
        seen += len(marked)
    assert seen > 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_renders_it(page: Path, tmp_path: Path) -> None:
    from PIL import Image

    shot = tmp_path / "page.png"
    options = "--headless --no-sandbox --disable-gpu --window-size=1120,2400".split()
    subprocess.run(
        ["chromium", *options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120
    )
    with Image.open(shot) as image:
        assert len(set(image.convert("RGB").resize((112, 240)).getdata())) > 50, "the page is blank"
