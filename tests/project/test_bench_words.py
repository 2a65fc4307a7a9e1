"""``scripts/bench_words.py``: words that the finder of verification finds, beside CHAIR's, WordNet's and a scene's."""

from __future__ import annotations

from pathlib import Path

import bench_words
import pytest
from shared_data import DATA, needs_data

CAPTIONS = "chair_captions/opera/llava-1.5_greedy.jsonl"

INDEX = """  1 licence
dog n 1 1 @ 1 1 00000004
light n 2 1 @ 2 2 00000006 00000004
safety n 1 1 @ 1 1 00000007
"""
DATA_NOUN = """  1 licence
00000001 03 n 01 entity 0 000 | all there is
00000002 03 n 01 physical_entity 0 001 @ 00000001 n 0000 | what takes up room
00000003 03 n 02 abstraction 0 abstract_entity 0 001 @ 00000001 n 0000 | what does not
00000004 03 n 02 dog 0 domestic_dog 0 002 ~ 00000007 n 0000 @ 00000002 n 0000 | barks
00000005 03 n 01 process 0 001 @ 00000002 n 0000 | goes on
00000006 03 n 01 light 0 001 @ 00000005 n 0000 | shines
00000007 03 n 01 safety 0 001 @ 00000003 n 0000 | no danger
"""


@pytest.fixture
def wordnet(tmp_path: Path) -> bench_words.WordNet:
    (tmp_path / "index.noun").write_text(INDEX)
    (tmp_path / "data.noun").write_text(DATA_NOUN)
    return bench_words.WordNet(tmp_path)


def test_a_word_is_a_thing_by_any_sense_or_by_its_first(wordnet: bench_words.WordNet) -> None:
    for name, expected in {
        "dog": (True, True),
        "hot dogs": (True, True),
        "traffic light": (True, False),
        "safety": (False, False),
        "navigate": (False, False),
    }.items():
        assert wordnet.is_thing(name) == expected, name


def test_words_are_counted_once_a_caption(wordnet: bench_words.WordNet) -> None:
    found = bench_words.find(["A dog, a dog and a cat lie near a quux.", "A sign."], wordnet)
    assert dict(found.counts) == {
        **{"captions": 2, "objects": 2, "found": 2, "names": 4, "known": 2},
        **{"never": 3, "first": 3},
    }
    assert dict(+found.nothing) == {"cat": 1, "quux": 1, "sign": 1}


@needs_data(CAPTIONS)
def test_nearly_all_of_chairs_objects_are_found_in_real_captions() -> None:
    """Measured: 98.7 % of 1,596 objects, 6.7 words a caption; a tagger of 15 MB finds 96.2 % with 11.1."""
    counts = bench_words.find(bench_words.read_captions(DATA / CAPTIONS), None).counts
    assert counts["captions"] == 500 and counts["objects"] > 1500
    assert counts["found"] / counts["objects"] > 0.98
    assert counts["names"] / counts["captions"] < 7


def test_doubted_words_are_told_apart_by_the_scenes() -> None:
    found = bench_words.judged("tiny", 32, 32, ["dog", "cat"])
    assert found.counts["true", False] > 5 * found.counts["true", True]
    assert found.counts["invented", True] > 0 == found.counts["no object", True] == len(+found.lost)
    assert found.asked == 16 > found.denied > 0
