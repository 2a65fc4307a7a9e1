"""What every probe returns: a frozen result that can be written as JSON and drawn."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vlmfix.errors import VlmfixError, how_to_install
from vlmfix.methods.measured import plain


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Base of all results.

    Attributes:
        layers: Decoder layers looked at, in the order of the layer axis of every tensor.
        patch: The patch that was active, described as ``vlmfix.status`` does; ``None`` for the stock model.
    """

    layers: tuple[int, ...]
    patch: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict: tensors as nested lists, numbers to 6 digits, ``None`` for what is not finite."""
        fields = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"probe": type(self).__name__, **fields}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the result as JSON text, and write it to a file if a path is given."""
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw the result into a matplotlib axis (default: a new figure's) and return the axis."""
        raise NotImplementedError(f"{type(self).__name__} has no plot")

    def _map(self, ax: Any, values: torch.Tensor, *, xlabel: str, label: str, title: str) -> Any:
        """Draw ``[layers, columns]`` with layer numbers upwards and a colour bar; return the axis."""
        ax = new_axis(ax)
        shown = ax.imshow(values, origin="lower", aspect="auto", interpolation="nearest", cmap="viridis")
        step = max(1, len(self.layers) // 8)
        ax.set_yticks(range(0, len(self.layers), step), [str(layer) for layer in self.layers[::step]])
        ax.figure.colorbar(shown, ax=ax, label=label)
        return self._labelled(ax, xlabel, "layer", title)

    def _labelled(self, ax: Any, xlabel: str, ylabel: str, title: str) -> Any:
        """Label an axis, with the patch under the title; return it."""
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.set_title(f"{title}\n{'stock model' if self.patch is None else self.patch}")
        return ax


def new_axis(ax: Any, **figure: Any) -> Any:
    """Return an axis to draw into; ``ax`` itself if there is one.

    Raises:
        VlmfixError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ImportError as error:
        raise VlmfixError(f"plot() needs matplotlib; type: {how_to_install('plot')}") from error
    return pyplot.subplots(layout="constrained", **figure)[1]
