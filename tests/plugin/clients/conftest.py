"""A model for clients, whose answers are never empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny LLaVA with its processor; it never ends an answer by itself."""
    from families.saved_llava import build_tiny_llava

    folder = build_tiny_llava(tmp_path_factory.mktemp("llava"), layers=3, hidden_size=32, kv_heads=2)
    config = json.loads((folder / "generation_config.json").read_text())
    config["suppress_tokens"] = [0, 1, 2, 3, 4]
    (folder / "generation_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("abcdef")  # by which transformers finds out how stop strings are spelt
    tokenizer.save_pretrained(folder)
    return folder
