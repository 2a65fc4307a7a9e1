"""Where tests find real data that is not part of the project."""

import os
from pathlib import Path

import pytest

DATA = Path(
    os.environ.get("VLMFIX_TEST_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")
).resolve()


def needs_data(*names: str) -> pytest.MarkDecorator:
    """Skip unless these files or folders of the test data are there."""
    missing = [name for name in names if not (DATA / name).exists()]
    return pytest.mark.skipif(bool(missing), reason=f"test data {', '.join(missing)} not found in {DATA}")
