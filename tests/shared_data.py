"""Where tests find real data that is not part of the project."""

import functools
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

DATA = Path(
    os.environ.get("VLMFIX_TEST_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
).resolve()


def needs_data(*names: str) -> pytest.MarkDecorator:
    """Skip unless these files or folders of the test data are there."""
    missing = [name for name in names if not (DATA / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"test data {', '.join(missing)} not found in {DATA}")


@functools.cache
def official(name: str = "expected.json") -> Any:
    """What the official scripts print."""
    path = DATA / name
    return json.loads(gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_text())


@functools.cache
def released_ground_truth(mode: str) -> dict[int, frozenset[str]]:
    """The objects of COCO's images as CHAIR's authors release them."""
    raw = official(f"chair_gt/chair_gt_{mode}_trainval2014.json.gz")
    return {int(i): frozenset(raw["categories"][k] for k in objects) for i, objects in raw["objects"].items()}
