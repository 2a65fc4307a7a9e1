"""Published lists of attention heads, and the models they belong to."""

from __future__ import annotations

from typing import NamedTuple

from vlmfix.anatomy import Anatomy

Heads = tuple[tuple[int, int], ...]


class Shape(NamedTuple):
    """What tells a checkpoint's architecture from others, as far as a config can."""

    model_type: str
    text_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    image_size: int


def shape_of(anatomy: Anatomy) -> Shape:
    """Return a model's shape; parts its config does not know are 0."""
    config, text = anatomy.model.config, anatomy.text_config
    size = getattr(getattr(config, "vision_config", None), "image_size", 0)
    return Shape(
        model_type=config.model_type,
        text_type=text.model_type,
        hidden_size=anatomy.hidden_size,
        num_layers=anatomy.num_layers,
        num_heads=anatomy.num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or anatomy.num_heads,
        image_size=size if isinstance(size, int) else 0,  # some have one per side
    )


HALLUCINATION_HEADS: dict[Shape, tuple[str, Heads]] = {
    Shape("llava", "llama", 4096, 32, 32, 32, 336): (
        "LLaVA-1.5-7B",
        (
            *((16, 29), (26, 9), (13, 31), (15, 10), (20, 12), (30, 9), (19, 18), (17, 0), (18, 9), (26, 28)),
            *((19, 27), (18, 26), (15, 25), (14, 16), (31, 26), (15, 24), (31, 3), (22, 20), (27, 29), (17, 28)),
        ),
    ),
    Shape("llava", "llama", 5120, 40, 40, 40, 336): (
        "LLaVA-1.5-13B",
        (
            *((0, 8), (29, 27), (23, 18), (20, 11), (36, 26), (19, 37), (22, 16), (22, 34), (21, 31), (20, 34)),
            *((37, 11), (17, 25), (35, 10), (17, 5), (15, 26), (0, 22), (19, 5), (19, 0), (14, 1), (23, 20)),
            *((21, 6), (30, 24), (26, 27), (21, 32), (15, 28), (15, 31), (19, 30), (20, 8), (19, 14), (14, 9)),
            *((39, 26), (25, 1), (18, 32), (17, 27), (39, 32)),
        ),
    ),
    Shape("llava_next", "llama", 7168, 60, 56, 8, 336): (
        "LLaVA-1.6-34B",
        ((45, 34), (43, 4), (43, 48), (44, 29), (35, 47), (40, 27), (54, 34), (37, 48), (43, 2), (41, 34)),
    ),
}
"""The hallucination heads of AD-HH (Yang, Li, Cao and Xu, ICLR 2025), most harmful first, by the shape of the model
they were found in. A checkpoint fine-tuned from one of these models has the same shape."""
