"""Pages as a browser lays them out."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")

#: Tells the page around it how wide this one is, and what in it has to be scrolled sideways.
_MEASURE = """<script>addEventListener("load", () => {
  const cut = [...document.querySelectorAll("body *")].filter((each) => each.scrollWidth > each.clientWidth + 1
    && getComputedStyle(each).overflowX !== "visible" && each.tagName !== "svg");
  const told = cut.map((each) => each.className + ": " + each.textContent.trim().slice(0, 40));
  parent.postMessage([document.documentElement.scrollWidth, ...told].join(" | "), "*");
});</script>"""

_AROUND = """<iframe src="measured.html" style="width:{width}px;height:2000px;border:0"></iframe>
<script>addEventListener("message", (event) => {{ document.documentElement.dataset.found = event.data; }});</script>"""


def chromium(*words: str) -> str:
    """Run the browser without a window and return what it prints."""
    with tempfile.TemporaryDirectory() as profile:
        fixed = f"--headless --no-sandbox --disable-gpu --virtual-time-budget=2000 --user-data-dir={profile}"
        done = subprocess.run(
            ["chromium", *fixed.split(), *words], check=True, capture_output=True, timeout=120, text=True
        )
    return done.stdout


def assert_nothing_is_cut_off(page: Path, folder: Path, width: int) -> None:
    """The page is no wider than the window, and nothing in it has to be scrolled sideways."""
    text = page.read_text(encoding="utf-8").replace("</body>", f"{_MEASURE}</body>")
    (folder / "measured.html").write_text(text, encoding="utf-8")
    around = folder / "around.html"  # a window cannot be as narrow as a telephone
    around.write_text(_AROUND.format(width=width), encoding="utf-8")
    dom = chromium("--hide-scrollbars", "--window-size=1400,2100", "--dump-dom", around.as_uri())
    assert re.findall(r'data-found="([^"]*)"', dom) == [str(width)]
