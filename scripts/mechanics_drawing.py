"""The pictures of ``mechanics.py``: a scene with what a method did to patches, heads and tokens, and both captions."""

from __future__ import annotations

import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from vlmfix.evals.inspect.look import Version
from vlmfix.evals.report.drawing import FAINT, INK, PAPER, empty_figure, hide_spines

BEFORE, AFTER, GREEN, RED, CHANGED, FRAME = "#9498a0", "#4269d0", "#2e7d32", "#c62828", "#fff1b8", "#ff725c"


@dataclass
class Picture:
    """What is drawn of one method.

    Attributes:
        title: Method and scene.
        scene: The scene's pixels.
        overlays: Titles, and a value per image token; of two signs where it may rise and fall.
        heads: Title, values ``[layers, heads]``, and which are framed.
        bars: Title, the two names of the legend, and rows of a label with two shares.
        versions: Stock and patched answer.
        one_scale: Whether both overlays have the same scale.
    """

    title: str
    scene: Any
    overlays: list[tuple[str, torch.Tensor]]
    heads: tuple[str, torch.Tensor, torch.Tensor]
    bars: tuple[str, tuple[str, str], list[tuple[str, float, float]]]
    versions: tuple[Version, ...]
    one_scale: bool = False


def draw(picture: Picture) -> Any:
    """One figure: the scene, two overlays, the heads, the bars; the captions below."""
    made, (panel,) = empty_figure(12.6, 6.6)
    made.set_layout_engine("none")
    panel.remove()
    made.text(0.015, 0.985, picture.title, fontsize=11.5, fontweight="bold", color=INK, va="top")
    top, tall, size = 0.505, 0.37, 0.172
    scene = made.add_axes((0.015, top, size, tall))
    scene.imshow(picture.scene, interpolation="nearest")
    scene.set_title("the scene\n(96 pixels, 64 patches)", fontsize=8.5, color=INK)
    scene.set(xticks=[], yticks=[])
    tops = [float(values.abs().max()) for _, values in picture.overlays]
    tops = [max(tops) if picture.one_scale else top or 1.0 for top in tops]
    for number, ((title, values), most) in enumerate(zip(picture.overlays, tops, strict=True), 1):
        left = 0.015 + number * (size + 0.012)
        bar = made.add_axes((left, top - 0.025, size, 0.016))
        _overlay(made.add_axes((left, top, size, tall)), bar, picture.scene, title, values, most)
    title, values, framed = picture.heads
    heads = made.add_axes((0.605, top - 0.01, 0.12, tall + 0.01))
    shown = heads.imshow(values, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
    for layer, head in framed.nonzero().tolist():
        heads.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=FRAME, linewidth=1.1))
    heads.set_xlabel("head", fontsize=8, color=INK)
    heads.set_ylabel("layer", fontsize=8, color=INK)
    heads.set_title(title, fontsize=8.5, color=INK)
    heads.tick_params(labelsize=7)
    made.colorbar(shown, cax=made.add_axes((0.73, top - 0.01, 0.007, tall + 0.01))).ax.tick_params(labelsize=7)
    _bars(made.add_axes((0.865, top - 0.01, 0.125, tall + 0.01)), picture.bars)
    _captions(made.add_axes((0, 0, 1, 0.43)), picture.versions)
    return made


def _overlay(panel: Any, bar: Any, scene: Any, title: str, values: torch.Tensor, top: float) -> None:
    """A value per patch over the greyed scene; what is near 0 lets it through."""
    side = round(len(values) ** 0.5)
    signed = bool((values < -1e-6).any())
    span = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if signed else {"cmap": "YlOrRd", "vmin": 0, "vmax": top}
    strength = (0.1 + 0.75 * values.abs() / top).view(side, side).numpy()
    box = (0, side, side, 0)
    panel.imshow(scene.convert("L"), extent=box, cmap="gray", vmin=-120, vmax=280)
    panel.imshow(values.view(side, side), extent=box, alpha=strength, **span)
    panel.set(xticks=[], yticks=[])
    panel.set_title(title, fontsize=8.5, color=INK)
    scale = panel.figure.colorbar(
        ScalarMappable(Normalize(span["vmin"], top), span["cmap"]), bar, orientation="horizontal"
    )
    scale.ax.tick_params(labelsize=7, length=2)
    scale.outline.set_visible(False)


def _bars(panel: Any, bars: tuple[str, tuple[str, str], list[tuple[str, float, float]]]) -> None:
    title, names, rows = bars
    alone = not any(before for _, before, _ in rows)
    drawn = [(0.0, names[1], 2, AFTER)] if alone else [(-0.2, names[0], 1, BEFORE), (0.2, names[1], 2, AFTER)]
    for offset, name, column, colour in drawn:
        values = [100 * row[column] for row in rows]
        shown = panel.barh(np.arange(len(rows)) + offset, values, 0.6 if alone else 0.38, color=colour, label=name)
        panel.bar_label(shown, fmt="%.1f", fontsize=6.5, padding=2, color=INK)
    panel.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=7.5)
    panel.margins(x=0.18)
    panel.invert_yaxis()
    panel.set_xlabel("% of attention", fontsize=8, color=INK)
    panel.set_title(title, fontsize=8.5, color=INK, loc="right")
    if not alone:
        panel.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.35, -0.13), ncols=2)
    hide_spines(panel, ("top", "right"))
    panel.tick_params(labelsize=7.5)


def _captions(panel: Any, versions: Sequence[Version]) -> None:
    """Both captions, word by word: objects in colour with their evidence below, changed words shaded."""
    panel.axis("off")
    panel.set(xlim=(0, 1), ylim=(0, 1))
    texts = [[word.text for word in version.words] for version in versions]
    same = difflib.SequenceMatcher(a=texts[0], b=texts[1], autojunk=False).get_matching_blocks()
    kept = [{block[side] + n for block in same for n in range(block.size)} for side in (0, 1)]
    width_of = _Widths(panel)
    y = 0.97
    for side, version in enumerate(versions):
        panel.text(0.015, y, version.label, fontsize=9, fontweight="bold", color=INK, va="top")
        x, y = 0.015, y - 0.085
        for number, word in enumerate(version.words):
            width = width_of(word.text)
            if x + width > 0.985:
                x, y = 0.015, y - 0.125
            if number not in kept[side]:
                panel.add_patch(Rectangle((x - 0.002, y - 0.056), width + 0.004, 0.066, color=CHANGED, linewidth=0))
            colour = INK if word.name is None else GREEN if word.present else RED
            panel.text(x, y, word.text, fontsize=9, color=colour, va="top")
            if word.name is not None:
                note = f"{100 * word.probability:.0f} | {100 * word.without_image:.0f}"
                panel.text(x, y - 0.058, note, fontsize=6.5, color=FAINT, va="top")
            x += width + width_of(" ")
        y -= 0.15
    key = "green: in the picture; red: invented; shaded: not in the other caption; below an object: its probability "
    key += "with | without the image, %"
    panel.text(0.015, y, key, fontsize=7.5, color=FAINT, va="top")


class _Widths:
    """How wide a word is, as a share of the figure."""

    def __init__(self, panel: Any) -> None:
        self._panel = panel
        self._known: dict[str, float] = {}

    def __call__(self, word: str) -> float:
        if word not in self._known:
            canvas = self._panel.figure.canvas
            probe = self._panel.text(0, 0, f"x{word}x", fontsize=9)
            empty = self._panel.text(0, 0, "xx", fontsize=9)
            boxes = [each.get_window_extent(canvas.get_renderer()) for each in (probe, empty)]
            self._known[word] = (boxes[0].width - boxes[1].width) / self._panel.figure.bbox.width
            probe.remove()
            empty.remove()
        return self._known[word]


def save(made: Any, path: Path) -> None:
    """Write a compact PNG without empty margins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    made.savefig(drawn, dpi=105, facecolor=PAPER)
    with Image.open(drawn) as image:
        *_, bottom = ImageOps.invert(image.convert("L")).getbbox() or image.size
        cut = image.convert("RGB").crop((0, 0, image.width, min(image.height, bottom + 12)))
    cut.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
