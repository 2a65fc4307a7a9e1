"""Start a new method: its file, its naive formula with a test case, and its line in README.

    python scripts/new_method.py my_method --place scores

The files hold a working example of the place chosen; replace its formula. ``scripts/test -k "my_method or formula"``
runs what applies to every method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

HEADER = '''"""{title}: what it stands for (authors, venue, arXiv number)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.methods.base import Method, PromptRows
from vlmfix.methods.views import Layer


@dataclass(frozen=True)
class {title}(Method):
    """{sentence}

    Attributes:
        strength: Strength, >= 0; 0 is the identity.
        layers: Default: all.
    """

    name: ClassVar[str] = "{name}"
    paper: ClassVar[str] = "arXiv ...."
    summary: ClassVar[str] = "{summary}"
    edits_{place}: ClassVar[bool] = True

    strength: float = 1.0

    def validate(self) -> None:
        """Raise ``MethodError`` for a parameter out of range."""
        self.require(0 <= self.strength < float("inf"), "strength", "a finite number >= 0 (0 switches the method off)")

    @property
    def is_identity(self) -> bool:
        """Whether ``strength`` is 0."""
        return self.strength == 0
'''

BLOCK_IMPORTS = {
    "from typing import ClassVar\n": "from typing import TYPE_CHECKING, ClassVar\n",
    "from vlmfix.methods.views import Layer\n": "\nif TYPE_CHECKING:\n"
    "    from vlmfix.model.blocks import BlockKind\n    from vlmfix.methods.views import Block\n",
    "edits_blocks: ClassVar[bool] = True": 'edits_blocks: ClassVar[tuple[BlockKind, ...]] = ("mlp",)',
}
"""What a method on the blocks of decoder layers has instead."""

ROWS = '''
    @property
    def prompt_rows(self) -> PromptRows:
        """The last, which predicts the next token."""
        return "last"
'''

EDITS = {
    "scores": '''
    def edit_scores(
        self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Edit ``[batch, num_heads, rows, keys]``; return it and which rows were edited."""
        image = layer.keys("image", scores)  # bool [batch, keys]
        edited = image.any(1)[:, None, None].expand(scores.shape[:3])
        return scores + self.strength * image[:, None, None], edited
''',
    "weights": '''
    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Edit ``[batch, num_heads, rows, keys]``; return it and which rows were edited."""
        image = layer.keys("image", attn_weights)  # bool [batch, keys]
        edited = image.any(1)[:, None, None].expand(attn_weights.shape[:3])
        raised = attn_weights * (1 + self.strength * image[:, None, None])
        return raised / raised.sum(-1, keepdim=True), edited
''',
    "heads": '''
    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Edit ``[batch, q_len, num_heads, head_dim]``, in prompts with an image only."""
        has_image = layer.forward.has_image.to(head_outputs.device)
        layer.count(has_image.sum() * head_outputs.shape[1] * head_outputs.shape[2])
        return head_outputs * (1 + self.strength * has_image[:, None, None, None]).to(head_outputs.dtype)
''',
    "blocks": '''
    def edit_block(self, states: torch.Tensor, block: Block) -> torch.Tensor:
        """Edit what the block adds to the residual stream in the rows asked for, ``[batch, rows, hidden_size]``."""
        return states * (1 + self.strength)
''',
}

NAIVE_HEADER = '''"""{title}: its formula, from the paper alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from naive.reference import Naive, State


class Naive{title}(Naive):
    def __init__(self, layers: Sequence[int], strength: float = 1.0) -> None:
        super().__init__(layers)
        self.strength = strength
'''

NAIVE_EDITS = {
    "scores": """
    def scores(
        self, sequence: State, number: int, position: int, scores: torch.Tensor, generated: bool
    ) -> torch.Tensor:
        if not sequence.is_last_row(position, generated):
            return scores
        edited = scores.clone()
        for j in sequence.image():
            edited[:, j] = scores[:, j] + self.strength
        return edited
""",
    "weights": """
    def weights(
        self, sequence: State, number: int, position: int, weights: torch.Tensor, generated: bool
    ) -> torch.Tensor:
        if not sequence.is_last_row(position, generated):
            return weights
        edited = weights.clone()
        for j in sequence.image():
            edited[:, j] = weights[:, j] * (1 + self.strength)
        return torch.stack([row / sum(row.tolist()) for row in edited])
""",
    "heads": """
    def heads(
        self,
        sequence: State,
        number: int,
        position: int,
        heads: list[torch.Tensor],
        query: torch.Tensor,
        keys: torch.Tensor,
        generated: bool,
    ) -> list[torch.Tensor]:
        return [head * (1 + self.strength) for head in heads]
""",
    "blocks": """
    def block(
        self, sequence: State, number: int, position: int, kind: str, added: torch.Tensor, generated: bool
    ) -> torch.Tensor:
        if kind != "mlp" or not sequence.is_last_row(position, generated):
            return added
        return added * (1 + self.strength)
""",
}

SUMMARIES = {
    "scores": "adds a constant to the image's scores in the row that predicts the next token",
    "weights": "multiplies the image's weights in the row that predicts the next token",
    "heads": "scales every head output of prompts with an image",
    "blocks": "scales what the MLPs add to the residual stream in the row that predicts the next token",
}


def method_files(name: str, place: str) -> dict[str, str]:
    """Return the text of the new files by their path."""
    title = "".join(part.capitalize() for part in name.split("_"))
    summary = SUMMARIES[place]
    sentence = f"{summary[0].upper()}{summary[1:]} (an example)."
    header = HEADER.format(title=title, name=name, place=place, summary=summary, sentence=sentence)
    method = header + (ROWS if place != "heads" else "") + EDITS[place]
    if place == "heads":
        method = method.replace("import Method, PromptRows", "import Method")
    if place == "blocks":
        for old, new in BLOCK_IMPORTS.items():
            method = method.replace(old, new)
    cases = f'\n\nCASES = [\n    ({{"strength": 0.5, "layers": ":"}}, Naive{title}(range(4), 0.5)),\n]\n'
    return {
        f"vlmfix/methods/{name}.py": method,
        f"tests/naive/{name}.py": NAIVE_HEADER.format(title=title) + NAIVE_EDITS[place] + cases,
    }


def add_to_readme(readme: str, name: str, summary: str) -> str:
    """Return README with one more line at the end of its table of methods."""
    lines = readme.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith("| `") and line.count("|") == 5)
    return "".join([*lines[: last + 1], f"| `{name}` | (paper) | {summary} | (cost) |\n", *lines[last + 1 :]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files; nothing is overwritten."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="short name, also the file's: my_method")
    parser.add_argument("--place", choices=sorted(EDITS), default="scores", help="what it edits (default: scores)")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.name.isidentifier() or options.name != options.name.lower() or options.name.startswith("_"):
        sys.exit(f"{options.name!r} is no name for a method: write it in lower case, such as my_method.")
    files = method_files(options.name, options.place)
    for path in files:
        if (options.root / path).exists():
            sys.exit(f"{path} exists. Choose another name.")
    readme = options.root / "README.md"
    listed = add_to_readme(readme.read_text(encoding="utf-8"), options.name, SUMMARIES[options.place])
    for path, text in files.items():
        (options.root / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    readme.write_text(listed, encoding="utf-8")
    print(f"added a line to README.md\nnow write the formulas, then: scripts/test -k '{options.name} or formula'")


if __name__ == "__main__":
    main()
