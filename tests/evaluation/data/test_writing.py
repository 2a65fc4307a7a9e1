"""Where results go: nothing that is read is overwritten, and links, devices and pipes stay what they are."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from families.saved_llava import write_lines

from vlmfix.cli import main
from vlmfix.errors import VlmfixError
from vlmfix.evals.data.write import check_parent, write_bytes, write_text


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """What scores two captions."""
    write_lines(tmp_path / "captions.jsonl", [{"image_id": i, "caption": "A dog."} for i in (1, 2)])
    (tmp_path / "truth.json").write_text(json.dumps({"mode": "original", "objects": {"1": ["dog"], "2": []}}))
    given = ["--ground-truth", str(tmp_path / "truth.json"), "--mode", "original"]
    return ["score", "chair", str(tmp_path / "captions.jsonl"), *given]


@pytest.mark.parametrize("name", ["captions.jsonl", "truth.json", "./captions.jsonl", "link.json"])
def test_what_is_read_is_never_overwritten(words: list[str], name: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "truth.json")
    before = [(tmp_path / each).read_bytes() for each in ("captions.jsonl", "truth.json")]
    assert "would overwrite what is read" in refused([*words, "--out", f"{tmp_path}/{name}"])
    assert [(tmp_path / each).read_bytes() for each in ("captions.jsonl", "truth.json")] == before
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0


def test_a_run_s_own_files_are_kept(words: list[str], tmp_path: Path, refused: Any) -> None:
    for name in ("counts.json", "results.json"):
        (tmp_path / name).write_text("{}")
    for name in ("results.json", "report.md"):
        assert "a file of the run" in refused([*words, "--out", str(tmp_path / name)])
        assert "a file of the run" in refused(["compare", str(tmp_path), "--out", str(tmp_path / name)])


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == text
    assert [each.name for each in (tmp_path / "far").iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_are_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_bytes(tmp_path / "pipe", b"figures")
    reader.join(10)
    assert read == [b"figures"] and (tmp_path / "pipe").is_fifo()


def test_where_no_file_can_be_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(VlmfixError, match="is a folder"):
        check_parent(tmp_path)
    with pytest.raises(VlmfixError, match="make it first"):
        check_parent(tmp_path / "a" / "b.json")
    check_parent(tmp_path / "b.json")


def test_captions_that_name_nothing_are_no_perfect_ones(words: list[str], tmp_path: Path, refused: Any) -> None:
    for said in ("Un chien.", "I cannot describe this image.", ""):
        write_lines(tmp_path / "captions.jsonl", [{"image_id": i, "caption": said} for i in (1, 2)])
        assert "no caption names an object" in refused(words)


def test_blank_captions_and_prompts_are_told(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any
) -> None:
    write_lines(tmp_path / "captions.jsonl", [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": " "}])
    assert main(words) == 0
    assert "1 of 2 captions are blank" in capsys.readouterr().out
    asked = "Please describe this image in detail."
    rows = [{"image_id": i, "prompt": asked, "caption": f"{asked} A dog."} for i in (1, 2)]
    write_lines(tmp_path / "captions.jsonl", rows)
    assert "is the question" in refused(words)


def test_files_in_shared_memory_are_files() -> None:
    """A file under /dev is replaced like any other, not written to as a device is."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no shared memory to write to")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "results.json"
        write_text(path, "first, and longer")
        write_text(path, "second")
        assert path.read_text(encoding="utf-8") == "second"
