"""VTI, section (a): every MLP output, of the decoder and of the vision tower, is turned in a fixed direction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

from naive.fia import MASKS
from naive.reference import Naive, Reference, Row
from naive.vista import length, unit

TEXT = [[math.sin(7 * layer + d) for d in range(32)] for layer in range(4)]
ONE_FOR_ALL = [[[math.cos(5 * layer + d) for d in range(16)]] for layer in range(2)]
PER_TOKEN = [[[math.cos(layer + 3 * token + d) for d in range(16)] for token in range(10)] for layer in range(2)]


class NaiveVti(Naive):
    def __init__(
        self, text: float, image: float, vision: list[list[list[float]]], layers: Sequence[int] = range(4)
    ) -> None:
        super().__init__(layers)
        self.text, self.image, self.vision = text, image, vision

    def block(self, row: Row, kind: str, added: torch.Tensor) -> torch.Tensor:
        return turned(added, TEXT[row.layer], 0.1 * self.text) if kind == "mlp" else added

    @torch.no_grad()
    def features(self, reference: Reference, picture: torch.Tensor) -> torch.Tensor | None:
        """A tower of the CLIP kind, layer by layer."""
        model = reference.model.model
        tower = getattr(model.vision_tower, "vision_model", model.vision_tower)  # transformers 4
        states = [tower.pre_layrnorm(tower.embeddings(picture[None]))]
        for number, layer in enumerate(tower.encoder.layers):
            masks = dict.fromkeys(inspect.signature(layer.self_attn.forward).parameters.keys() & MASKS)
            x = states[-1] + layer.self_attn(hidden_states=layer.layer_norm1(states[-1]), **masks)[0]
            outputs = layer.mlp(layer.layer_norm2(x))[0]
            directions = self.vision[number]
            each = [
                turned(output, directions[token % len(directions)], 0.1 * self.image)
                for token, output in enumerate(outputs)
            ]
            states.append(x + torch.stack(each)[None])
        chosen = states[model.config.vision_feature_layer][:, 1:]  # without the class token
        found: torch.Tensor = model.multi_modal_projector(chosen)[0]
        return found


def turned(vector: torch.Tensor, direction: Sequence[float], step: float) -> torch.Tensor:
    x = vector.tolist()
    moved = unit([a + step * b for a, b in zip(unit(x), unit(direction), strict=True)])
    return torch.tensor([length(x) * each for each in moved], dtype=vector.dtype)


def case(
    text: float, image: float, vision: list[list[list[float]]] = ONE_FOR_ALL, **options: Any
) -> tuple[dict[str, Any], NaiveVti]:
    directions = {"model": "", "text": TEXT, "vision": vision}
    layers = [1, 2] if options else range(4)
    return {"alpha_text": text, "alpha_image": image, "directions": directions, **options}, NaiveVti(
        text, image, vision, layers
    )


CASES = [case(2.0, 3.0), case(4.0, 0.0, layers="1:3"), case(0.0, 5.0), case(-2.0, 2.0, PER_TOKEN)]
