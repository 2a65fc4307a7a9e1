"""Builds ``atlas.png`` and ``atlas.json``: pictures of the 80 COCO categories, at most 64 px high and wide.

Only this build step needs a font (Noto Color Emoji, SIL Open Font License 1.1; Debian package
``fonts-noto-color-emoji``); everything else reads the finished atlas. To rebuild:
``python scripts/testbed_atlas.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmfix.evals.testbed.vocabulary import CATEGORIES

__all__ = ["CELL", "build_atlas"]

CELL = 64
"""Side of one atlas cell in pixels."""

_COLUMNS = 16
_CANVAS = 136
_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_FONT_SIZE = 109  # the only bitmap size in the font

_EMOJI: dict[str, str] = {
    "person": "🧍🚶🏃", "bicycle": "🚲", "car": "🚗🚙🚕", "motorcycle": "🏍", "airplane": "✈🛩", "bus": "🚌🚍",
    "train": "🚆🚂", "truck": "🚚🚛", "boat": "⛵🚤", "traffic light": "🚦", "stop sign": "🛑", "bird": "🐦🦆",
    "cat": "🐈🐱", "dog": "🐕🐶", "horse": "🐎🐴", "sheep": "🐑", "cow": "🐄🐮", "elephant": "🐘", "bear": "🐻",
    "zebra": "🦓", "giraffe": "🦒", "backpack": "🎒", "umbrella": "☂⛱", "handbag": "👜", "tie": "👔", "suitcase": "🧳",
    "frisbee": "🥏", "skis": "🎿", "sports ball": "⚽🏀", "kite": "🪁", "skateboard": "🛹", "tennis racket": "🎾",
    "bottle": "🍾", "wine glass": "🍷", "cup": "☕", "knife": "🔪", "spoon": "🥄", "bowl": "🥣", "banana": "🍌",
    "apple": "🍎", "sandwich": "🥪", "orange": "🍊", "broccoli": "🥦", "carrot": "🥕", "hot dog": "🌭", "pizza": "🍕",
    "donut": "🍩", "cake": "🎂🍰", "chair": "🪑", "couch": "🛋", "potted plant": "🪴", "bed": "🛏", "toilet": "🚽",
    "tv": "📺", "laptop": "💻", "mouse": "🖱", "keyboard": "⌨", "cell phone": "📱", "book": "📖📕", "clock": "⏰🕰",
    "vase": "🏺", "scissors": "✂", "teddy bear": "🧸", "toothbrush": "🪥",
}  # fmt: skip


def _dining_table(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(22, 38), (114, 38), (134, 68), (2, 68)], fill=(156, 98, 52))
    d.rectangle((2, 68, 134, 78), fill=(112, 68, 34))
    for x, bottom in ((8, 128), (118, 128), (34, 110), (94, 110)):
        d.rectangle((x, 78, x + 9, bottom), fill=(96, 58, 28))


def _fork(d: ImageDraw.ImageDraw) -> None:
    d.rounded_rectangle((60, 56, 74, 134), 5, fill=(168, 174, 184))
    d.rectangle((44, 42, 90, 62), fill=(178, 184, 194))
    for x in (44, 57, 69, 82):
        d.rectangle((x, 4, x + 7, 46), fill=(192, 198, 206))


def _bench(d: ImageDraw.ImageDraw) -> None:
    for y in (38, 53, 68):
        d.rectangle((4, y, 132, y + 9), fill=(164, 112, 60))
    d.rectangle((0, 86, 136, 96), fill=(142, 96, 50))
    for x in (14, 112):
        d.rectangle((x, 38, x + 8, 128), fill=(68, 70, 76))


def _fire_hydrant(d: ImageDraw.ImageDraw) -> None:
    d.ellipse((40, 4, 96, 54), fill=(216, 42, 36))
    d.rectangle((40, 30, 96, 116), fill=(216, 42, 36))
    d.rectangle((30, 112, 106, 132), fill=(168, 26, 26))
    for x in (14, 88):
        d.ellipse((x, 52, x + 34, 86), fill=(188, 32, 30))
    d.ellipse((54, 54, 82, 82), fill=(242, 202, 60))


def _parking_meter(d: ImageDraw.ImageDraw) -> None:
    d.rectangle((60, 66, 74, 136), fill=(92, 98, 106))
    d.pieslice((36, 2, 98, 64), 180, 360, fill=(74, 104, 138))
    d.rounded_rectangle((36, 30, 98, 82), 8, fill=(74, 104, 138))
    d.rectangle((46, 18, 88, 40), fill=(214, 232, 206))
    d.line((67, 38, 80, 22), fill=(190, 30, 30), width=4)
    d.rectangle((62, 50, 72, 72), fill=(28, 34, 42))


def _baseball_bat(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(58, 4), (80, 4), (86, 58), (76, 120), (62, 120), (52, 58)], fill=(206, 152, 86))
    d.rectangle((62, 96, 76, 118), fill=(60, 42, 32))
    d.ellipse((58, 114, 80, 131), fill=(122, 72, 32))


def _baseball_glove(d: ImageDraw.ImageDraw) -> None:
    leather, seam = (158, 86, 40), (96, 48, 20)
    for x, top in ((44, 12), (66, 4), (88, 10), (108, 26)):
        d.rounded_rectangle((x, top, x + 22, 92), 11, fill=leather, outline=seam, width=3)
    d.rounded_rectangle((6, 46, 34, 100), 13, fill=leather, outline=seam, width=3)
    d.ellipse((18, 56, 130, 134), fill=leather, outline=seam, width=3)
    d.ellipse((50, 62, 96, 104), fill=(246, 244, 238))
    d.arc((36, 62, 70, 104), 300, 60, fill=(206, 40, 40), width=3)


def _snowboard(d: ImageDraw.ImageDraw) -> None:
    d.rounded_rectangle((48, 0, 88, 136), 20, fill=(122, 62, 202))
    for y in (34, 90):
        d.rectangle((44, y, 92, y + 12), fill=(30, 30, 32))
    d.ellipse((57, 56, 79, 80), fill=(250, 222, 70))


def _surfboard(d: ImageDraw.ImageDraw) -> None:
    d.ellipse((40, 0, 96, 136), fill=(60, 190, 220))
    d.rectangle((66, 3, 70, 133), fill=(250, 250, 250))
    d.ellipse((52, 90, 84, 120), fill=(250, 122, 60))


def _remote(d: ImageDraw.ImageDraw) -> None:
    d.rounded_rectangle((46, 2, 90, 134), 9, fill=(42, 42, 47))
    d.ellipse((60, 9, 77, 26), fill=(232, 40, 40))
    for y in range(38, 122, 18):
        for x in (53, 64, 75):
            d.rectangle((x, y, x + 8, y + 9), fill=(212, 212, 217))


def _microwave(d: ImageDraw.ImageDraw) -> None:
    d.rectangle((0, 28, 136, 110), fill=(192, 192, 197))
    d.rectangle((10, 38, 92, 100), fill=(36, 46, 56))
    d.rectangle((102, 38, 128, 54), fill=(60, 220, 122))
    for y in (62, 74, 86):
        d.rectangle((102, y, 128, y + 6), fill=(90, 90, 96))


def _oven(d: ImageDraw.ImageDraw) -> None:
    d.rectangle((14, 6, 122, 132), fill=(226, 226, 226))
    d.rectangle((14, 6, 122, 30), fill=(122, 122, 127))
    for x in (24, 48, 72, 96):
        d.ellipse((x, 10, x + 15, 26), fill=(30, 30, 30))
    d.rectangle((28, 37, 108, 44), fill=(90, 90, 96))
    d.rectangle((28, 50, 108, 114), fill=(60, 36, 26))
    d.rectangle((40, 84, 96, 104), fill=(242, 142, 40))


def _toaster(d: ImageDraw.ImageDraw) -> None:
    d.rectangle((28, 18, 108, 50), fill=(226, 176, 102))
    d.rounded_rectangle((8, 44, 128, 122), 18, fill=(200, 80, 70))
    d.rectangle((20, 42, 116, 50), fill=(60, 32, 30))
    d.rectangle((113, 70, 135, 80), fill=(42, 42, 42))


def _sink(d: ImageDraw.ImageDraw) -> None:
    d.pieslice((6, 10, 130, 126), 0, 180, fill=(216, 230, 240))
    d.ellipse((6, 54, 130, 82), fill=(150, 186, 206))
    d.rectangle((62, 14, 72, 60), fill=(130, 140, 150))
    d.rectangle((62, 14, 100, 22), fill=(130, 140, 150))
    d.rectangle((92, 14, 100, 34), fill=(130, 140, 150))


def _refrigerator(d: ImageDraw.ImageDraw) -> None:
    d.rounded_rectangle((30, 0, 106, 136), 6, fill=(206, 216, 226))
    d.rectangle((30, 47, 106, 52), fill=(120, 130, 140))
    d.rectangle((39, 14, 46, 42), fill=(90, 100, 110))
    d.rectangle((39, 60, 46, 104), fill=(90, 100, 110))


def _hair_drier(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(40, 66), (72, 66), (62, 132), (34, 132)], fill=(176, 36, 104))
    d.rounded_rectangle((14, 14, 96, 78), 26, fill=(226, 66, 142))
    d.polygon([(88, 22), (132, 12), (132, 80), (88, 70)], fill=(52, 52, 60))
    d.ellipse((26, 28, 62, 64), fill=(120, 24, 72))
    d.rectangle((46, 88, 56, 104), fill=(250, 250, 250))


_DRAWN: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "dining table": _dining_table,
    "fork": _fork,
    "bench": _bench,
    "fire hydrant": _fire_hydrant,
    "parking meter": _parking_meter,
    "baseball bat": _baseball_bat,
    "baseball glove": _baseball_glove,
    "snowboard": _snowboard,
    "surfboard": _surfboard,
    "remote": _remote,
    "microwave": _microwave,
    "oven": _oven,
    "toaster": _toaster,
    "sink": _sink,
    "refrigerator": _refrigerator,
    "hair drier": _hair_drier,
}


def _fit(image: Image.Image) -> Image.Image:
    """Crops to the opaque part and scales the longer side to ``CELL`` pixels."""
    box = image.getchannel("A").point(lambda value: 255 if value > 16 else 0).getbbox()
    image = image.crop(box)
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _pictures(name: str, font: ImageFont.FreeTypeFont) -> list[Image.Image]:
    if name in _DRAWN:
        canvas = Image.new("RGBA", (_CANVAS, _CANVAS), (0, 0, 0, 0))
        _DRAWN[name](ImageDraw.Draw(canvas))
        return [_fit(canvas)]
    pictures = []
    for character in _EMOJI[name]:
        canvas = Image.new("RGBA", (150, 150), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((5, 5), character, font=font, embedded_color=True)
        pictures.append(_fit(canvas))
    return pictures


def build_atlas(out_dir: Path, font_path: Path = _FONT) -> None:
    """Writes ``atlas.png`` (RGBA) and ``atlas.json`` (name -> list of ``[x, y, width, height]``) into ``out_dir``.

    Args:
        out_dir: Existing folder.
        font_path: The Noto Color Emoji font file (CBDT bitmap version).
    """
    font = ImageFont.truetype(str(font_path), _FONT_SIZE)
    pictures = [(name, picture) for _, name, _ in CATEGORIES for picture in _pictures(name, font)]
    rows = (len(pictures) + _COLUMNS - 1) // _COLUMNS
    sheet = Image.new("RGBA", (_COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    index: dict[str, list[list[int]]] = {}
    for position, (name, picture) in enumerate(pictures):
        x, y = position % _COLUMNS * CELL, position // _COLUMNS * CELL
        sheet.paste(picture, (x, y))
        index.setdefault(name, []).append([x, y, picture.width, picture.height])
    sheet.save(out_dir / "atlas.png", optimize=True)
    (out_dir / "atlas.json").write_text(json.dumps(index, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--font", type=Path, default=_FONT)
    build_atlas(Path(__file__).parent, parser.parse_args().font)
