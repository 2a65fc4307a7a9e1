"""Shared fixtures of the plugin's tests: nothing is fetched, one thread, tiny models built once."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import pytest

gc.disable()  # while modules are imported and tests collected


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Let the garbage collector leave out what was imported and collected, which it would look through in vain."""
    gc.freeze()
    gc.set_threshold(5000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _stock_models() -> dict[tuple[Any, ...], Any]:
    return {}


@pytest.fixture
def build(_stock_models: dict[tuple[Any, ...], Any]) -> Callable[..., Any]:
    """Return a fresh copy of a tiny LLaVA; equal arguments give equal weights."""
    from families.copies import Mould
    from families.tiny_llava import tiny_llava

    def make(kind: str = "llama", **options: Any) -> Any:
        key = (kind, *sorted(options.items()))
        if key not in _stock_models:
            _stock_models[key] = Mould(tiny_llava(kind, **options))
        return _stock_models[key].cast()

    return make


@pytest.fixture
def tiny(build: Callable[..., Any]) -> Any:
    """A LLaVA on Llama with grouped queries, without sinks."""
    return build()


@pytest.fixture
def sinky(build: Callable[..., Any]) -> Any:
    """A LLaVA on Llama with injected sinks."""
    return build(sinks=True)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Leave no compiled code to other tests, nor find any of theirs."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Type a command that must be refused, and return what is said of it."""
    from vlmfix.cli import main

    def say(words: list[str]) -> str:
        capsys.readouterr()
        assert main(words) == 2
        return capsys.readouterr().err

    return say


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``vlmfix score`` in a folder of the test's own."""
    from scoring import Scorer

    return Scorer(tmp_path, capsys)


@pytest.fixture
def nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nltk find its data in the test data, and nowhere else."""
    from shared_data import DATA

    nltk = pytest.importorskip("nltk")
    if not (DATA / "nltk_data").exists():
        pytest.skip(f"test data nltk_data not found in {DATA}")
    monkeypatch.setattr(nltk.data, "path", [str(DATA / "nltk_data")])


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny LLaVA with its processor."""
    from families.saved_llava import build_tiny_llava

    return build_tiny_llava(tmp_path_factory.mktemp("llava"), layers=3, hidden_size=32, kv_heads=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what does not hold on older versions of transformers, with the reason."""
    from old_versions import reason_to_skip

    for item in items:
        reason = reason_to_skip(item.nodeid)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
