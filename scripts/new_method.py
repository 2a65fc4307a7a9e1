"""Start a new method: its file, its naive formula with a test case, its lines in the table and in ``__init__.pyi``.

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

import torch

from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.views import {view}


@dataclass(frozen=True)
class {title}(Method):
    """{sentence}"""

    name = "{name}"
    paper = "arXiv ...."
    summary = "{summary}"
{place}

    strength: float = parameter(1.0, low=0, off=0, search=Range(0.1, 2.0), help="Strength.")
'''

PLACES = {
    "scores": '    edits_scores = True\n    prompt_rows = "last"  # the row that predicts the next token',
    "weights": '    edits_weights = True\n    prompt_rows = "last"  # the row that predicts the next token',
    "heads": "    edits_heads = True",
    "blocks": '    edits_blocks = ("mlp",)\n    prompt_rows = "last"  # the row that predicts the next token',
}
"""How a method declares the place it edits, and the rows of a prompt."""

EDITS = {
    "scores": '''
    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Edit ``[batch, num_heads, rows, keys]``; return it and which rows were edited."""
        image = layer.keys("image", scores)  # bool [batch, keys]
        edited = image.any(1)[:, None, None].expand(scores.shape[:3])
        return scores + self.strength * image[:, None, None], edited
''',
    "weights": '''
    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
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
from naive.reference import Naive, Row


class Naive{title}(Naive):
    def __init__(self, layers: Sequence[int], strength: float = 1.0) -> None:
        super().__init__(layers)
        self.strength = strength
'''

NAIVE_EDITS = {
    "scores": """
    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        if not row.predicts:
            return scores
        edited = scores.clone()
        for j in row.sequence.image():
            edited[:, j] = scores[:, j] + self.strength
        return edited
""",
    "weights": """
    def weights(self, row: Row, weights: torch.Tensor) -> torch.Tensor:
        if not row.predicts:
            return weights
        edited = weights.clone()
        for j in row.sequence.image():
            edited[:, j] = weights[:, j] * (1 + self.strength)
        return torch.stack([each / sum(each.tolist()) for each in edited])
""",
    "heads": """
    def heads(self, row: Row, heads: list[torch.Tensor]) -> list[torch.Tensor]:
        return [head * (1 + self.strength) for head in heads]
""",
    "blocks": """
    def block(self, row: Row, kind: str, added: torch.Tensor) -> torch.Tensor:
        if kind != "mlp" or not row.predicts:
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
    title, summary = class_name(name), SUMMARIES[place]
    header = HEADER.format(
        title=title,
        name=name,
        place=PLACES[place],
        view={"blocks": "Block", "heads": "Layer"}.get(place, "EditedRows, Layer"),
        summary=summary,
        sentence=f"{summary[0].upper()}{summary[1:]} (an example).",
    )
    cases = f'\n\nCASES = [\n    ({{"strength": 0.5, "layers": ":"}}, Naive{title}(range(4), 0.5)),\n]\n'
    return {
        f"vlmfix/methods/{name}.py": header + EDITS[place],
        f"tests/naive/{name}.py": NAIVE_HEADER.format(title=title) + NAIVE_EDITS[place] + cases,
    }


def class_name(name: str) -> str:
    """Return the name of a method's class."""
    return "".join(part.capitalize() for part in name.split("_"))


def add_to_public_names(stub: str, name: str) -> str:
    """Return ``__init__.pyi`` with a line for the method, in its place among those of the methods."""
    line = f"from vlmfix.methods.{name} import {class_name(name)} as {class_name(name)}"
    lines = stub.splitlines()
    first = next(i for i, each in enumerate(lines) if each.startswith("from vlmfix.methods.") and each > line)
    return "\n".join([*lines[:first], line, *lines[first:]]) + "\n"


def add_to_readme(readme: str, name: str, summary: str) -> str:
    """Return the room's README with one more line at the end of its table of methods."""
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
    readme, stub = options.root / "vlmfix/methods/README.md", options.root / "vlmfix/__init__.pyi"
    listed = add_to_readme(readme.read_text(encoding="utf-8"), options.name, SUMMARIES[options.place])
    named = add_to_public_names(stub.read_text(encoding="utf-8"), options.name)
    for path, text in files.items():
        (options.root / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    readme.write_text(listed, encoding="utf-8")
    stub.write_text(named, encoding="utf-8")
    print("added a line to vlmfix/methods/README.md and to vlmfix/__init__.pyi")
    print(f"now write the formulas, then: scripts/test -k '{options.name} or formula'")


if __name__ == "__main__":
    main()
