"""What is trained of ``smol``: its projector, and an adapter of the frozen language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_smol_kernels import add_adapter, speed_up
from train_smol_packing import ANSWER, CAPTION, CHAT, END, OBJECT, STOP, Batch, Packed
from transformers import LlavaForConditionalGeneration

__all__ = ["Learner", "save_atomically", "total_weight"]

WEIGHTS = {CAPTION: 0.4, OBJECT: 1.0, ANSWER: 2.0, END: 0.1, CHAT: 0.3, STOP: 0.17}
"""Weight of each kind of label in the loss, which is the weighted mean: what names an object matters most."""


class Learner:
    """The model in training.

    Args:
        model: From :func:`vlmfix.evals.testbed.smol.model.build_model`, with a started projector.
        rank: Rank of the adapter.
        dtype: Of the frozen language model; projector and adapter stay in float32.
        device: Where to train.
    """

    def __init__(self, model: LlavaForConditionalGeneration, rank: int, dtype: torch.dtype, device: str) -> None:
        self.model, self.dtype, self.device = model.to(device), dtype, device
        model.requires_grad_(False)
        core = model.model
        self.language_model = core.language_model.to(dtype)
        self.projector: nn.Module = core.multi_modal_projector.requires_grad_(True)
        self.adapter = add_adapter(self.language_model, rank)
        for module in self.adapter.values():
            module.to(device)
        if device == "cpu":
            speed_up(self.language_model)
        self._weights = torch.tensor([0.0, *(WEIGHTS[kind] for kind in sorted(WEIGHTS))], device=device)

    def groups(self, projector_rate: float, adapter_rate: float) -> list[dict[str, object]]:
        """Parameter groups for the optimizer; ``rate`` is the peak of the learning rate."""
        changes = [p for module in self.adapter.values() for p in (module.a, module.b)]
        return [
            {"params": list(self.projector.parameters()), "rate": projector_rate, "weight_decay": 0.0},
            {"params": changes, "rate": adapter_rate, "weight_decay": 0.01},
        ]

    def state(self) -> dict[str, Tensor]:
        """Projector and adapter under the names that :func:`merge_adapter` reads."""
        found = {f"projector.{key}": value.detach() for key, value in self.projector.state_dict().items()}
        for key, module in self.adapter.items():
            found |= {f"lora.{key}.a": module.a.detach(), f"lora.{key}.b": module.b.detach()}
        return {key: value.cpu().contiguous() for key, value in found.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        prefix = "projector."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.projector.load_state_dict(own)
        for key, module in self.adapter.items():
            module.a.copy_(state[f"lora.{key}.a"])
            module.b.copy_(state[f"lora.{key}.b"])

    def loss(self, features: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Loss of packed sequences.

        Args:
            features: ``[B, 64, width]`` of the vision tower.
            batch: The sequences.

        Returns:
            The loss, and for the log the mean loss of each kind of label and the share of right answers.
        """
        ids, kinds = batch.ids.to(self.device), batch.kinds.to(self.device)
        table = self.language_model.embed_tokens.weight
        image = self.projector(features.to(self.device).float()).to(self.dtype)
        text = F.embedding(ids, table)
        first, behind = batch.image_at, batch.image_at + image.shape[1]
        embeds = torch.cat([text[:, :first], image, text[:, behind:]], 1)
        hidden = self.language_model(
            inputs_embeds=embeds,
            attention_mask=batch.mask.to(self.device),
            position_ids=batch.positions.to(self.device),
            use_cache=False,
        ).last_hidden_state
        labelled = kinds > 0
        kind, label = kinds[labelled], batch.labels.to(self.device)[labelled]
        logits, weight = F.linear(hidden[labelled], table).float(), self._weights[kind]
        each = F.cross_entropy(logits, label, reduction="none")
        with torch.no_grad():
            right = (logits.argmax(-1) == label).float()
            logged = {
                name: float(values[kind == which].mean())
                for name, values, which in (
                    ("filler", each, CAPTION),
                    ("object", each, OBJECT),
                    ("answer", each, ANSWER),
                    ("right", right, ANSWER),
                    ("chat", each, CHAT),
                )
                if bool((kind == which).any())
            }
        return (each * weight).sum() / weight.sum(), logged


def total_weight(rows: list[Packed]) -> float:
    """Sum of the labels' weights in the loss."""
    return sum(WEIGHTS.get(kind, 0.0) for row in rows for kind in row.kinds)


def save_atomically(path: Path, save: Callable[[Path], None]) -> None:
    """Write beside the place and rename, so that an interruption leaves the old file."""
    partial = path.with_suffix(".partial")
    save(partial)
    partial.replace(path)
