#!/usr/bin/env python
"""Shows VAR's mechanism on the testbed with an injected, SYNTHETIC attention sink.

    python scripts/synthetic_sink.py

The testbed has no sinks of its own, so VAR edits nothing there. Here one image patch is given an extreme value in one
hidden dimension, as massive activations do in 7B models: in the dimension, of all, that draws most attention to the
patch. The table compares where the rows behind the image look, without and with VAR. It shows that the redistribution
does what its formula says, and nothing about hallucination.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmfix
from vlmfix.evals.data.coco import CocoData, load_image
from vlmfix.evals.testbed import MODEL_DIR, PROMPTS, prepare

PATCH = 27  # a patch near the middle of the image
SIZE = 60.0  # against a residual stream whose entries are of order 1
THRESHOLD = 8.0  # below sqrt(hidden size) = 11.3, the most that phi can be here


class Injection:
    """Adds a constant to one dimension of one image token before the first layer."""

    def __init__(self, model: nn.Module, image_token_id: int) -> None:
        self.position, self.dim, self.image_token_id = 0, 0, image_token_id
        model.model.language_model.register_forward_pre_hook(self.inject, with_kwargs=True)  # type: ignore[union-attr]

    def inject(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Plant the sink in prompts."""
        embeds = kwargs["inputs_embeds"]
        if embeds.shape[1] > self.position:
            embeds = embeds.clone()
            embeds[:, self.position, self.dim] += SIZE
            kwargs = {**kwargs, "inputs_embeds": embeds}
        return args, kwargs


@torch.no_grad()
def attention(model: Any, inputs: Any, position: int, image: torch.Tensor) -> torch.Tensor:
    """Mean attention per layer of the rows behind the image: on the sink, the rest of the image, everything else."""
    behind = int(image.nonzero().max()) + 1
    rest = image.clone()
    rest[position] = False
    rows = [layer[:, :, behind:].mean((0, 1, 2)) for layer in model(**inputs, output_attentions=True).attentions]
    return torch.stack([torch.stack([row[position], row[rest].sum(), row[~image].sum()]) for row in rows])


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=16, help="held-out scenes (default: 16)")
    args = parser.parse_args(argv)
    # Eager attention returns its weights, the edited ones included.
    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=torch.float32, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    data = CocoData.load(prepare("heldout", args.limit))
    images = [load_image(data.image(image_id).path) for image_id in data.image_ids]
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS["describe"]}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt")
    image = inputs["input_ids"][0] == model.config.image_token_id
    injection = Injection(model, model.config.image_token_id)
    injection.position = int(image.nonzero()[PATCH])
    drawn = []
    for injection.dim in range(model.config.text_config.hidden_size):
        drawn.append(attention(model, inputs, injection.position, image)[2:-1, 0].mean())
    injection.dim = int(torch.stack(drawn).argmax())
    print(f"SYNTHETIC sink: +{SIZE:g} in dimension {injection.dim} of image patch {PATCH}, {len(images)} scenes")
    before = attention(model, inputs, injection.position, image)
    vlmfix.patch(model, "var", sink_dims=[injection.dim], sink_threshold=THRESHOLD)
    after = attention(model, inputs, injection.position, image)
    columns = f"{'sink':>6} {'rest of image':>14} {'other':>6}"
    print(f"{'layer':>5} | {columns} | with VAR {columns}")
    for layer, (stock, edited) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        print(
            f"{layer:>5} | {stock[0]:6.3f} {stock[1]:14.3f} {stock[2]:6.3f} |          "
            f"{edited[0]:6.3f} {edited[1]:14.3f} {edited[2]:6.3f}"
        )
    print(vlmfix.status(model))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
