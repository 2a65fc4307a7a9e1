"""Early logits: what a model's head reads from the output of early layers, mixed into its logits."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlmfix.engine.base_output import is_measured
from vlmfix.engine.forwards import EditedForward
from vlmfix.engine.status import Counters
from vlmfix.errors import UnsupportedModelError
from vlmfix.methods.base import Method
from vlmfix.methods.forward import squared_move
from vlmfix.model.anatomy import Anatomy
from vlmfix.model.blocks import final_norm
from vlmfix.model.devices import weights_device


class EarlyHead:
    """The head of a model, for states of early layers, which some of a patch's bound methods read.

    Raises:
        UnsupportedModelError: A method reads them, and the model has no language-model head.
        UnsupportedFeatureError: A method wants the final norm, and it was not found.
    """

    def __init__(self, anatomy: Anatomy, methods: Sequence[Method], counters: Counters) -> None:
        self._counters = counters
        self.mixing = tuple(
            (index, each) for index, each in enumerate(methods) if each.early_layers and not each.is_identity
        )
        inside = [each for each in methods if each.reads_mlp_input and not each.is_identity]
        is_read = bool(self.mixing or inside)
        self._model = anatomy.language_model
        head = self._head if is_read else None
        if is_read and not isinstance(head, nn.Module):
            raise UnsupportedModelError(
                f"{type(anatomy.language_model).__name__} has no language-model head to read early layers with. "
                "Patch the model that generates, or choose a method that reads no early logits."
            )
        self._loss_function: Any = getattr(anatomy.language_model, "loss_function", None)
        is_normed = bool(inside) or any(each.early_norm for _, each in self.mixing)
        self._norm = final_norm(anatomy) if is_normed else None
        self._softcap = self._scale = self._divisor = None
        if isinstance(head, nn.Module):
            self._softcap, self._scale, self._divisor = _behind_head(anatomy, head)

    @property
    def _head(self) -> Any:
        """The head as it is now: a model whose vocabulary is resized gets another one."""
        return self._model.get_output_embeddings()

    def mix(self, forward: EditedForward, output: Any, inputs: dict[str, Any]) -> Any:
        """Return a forward's output with mixed logits in the rows that predict new tokens of prompts with an image.

        It is what the model with the head returned, an object with ``logits`` or a tuple.
        """
        has_loss = inputs.get("labels") is not None
        is_tuple = isinstance(output, tuple)  # the loss comes first
        logits = (output[1] if has_loss else output[0]) if is_tuple else output.logits
        changed = {"logits": self._mixed(forward, logits, inputs)}
        if has_loss:
            stock, mixed = (self._loss(each, inputs) for each in (logits, changed["logits"]))
            changed = {"loss": (output[0] if is_tuple else output.loss) + mixed - stock, **changed}
        if is_tuple:
            return (*changed.values(), *output[len(changed) :])
        return dataclasses.replace(output, **changed)

    def _loss(self, logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Compute the model's loss of ``[batch, q_len, vocab]``, without auxiliary terms."""
        options = {name: inputs[name] for name in ("labels", "shift_labels", "num_items_in_batch") if name in inputs}
        loss: torch.Tensor = self._loss_function(logits=logits, vocab_size=logits.shape[-1], **options)
        return loss

    def _mixed(self, forward: EditedForward, logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Mix ``[batch, kept, vocab]``."""
        rows, wanted = forward.rows("last"), inputs.get("logits_to_keep")
        if rows.start >= rows.stop:
            return logits
        num_rows = rows.stop - rows.start
        # Logits exist for the rows that were asked for, by number from the end or by position. Early states exist for
        # the rows that predict new tokens. What both have is mixed.
        if isinstance(wanted, torch.Tensor):
            place = wanted.to(logits.device) % forward.q_len - rows.start  # negative ones count from the end
            inside = (place >= 0) & (place < num_rows)
            start, chosen = 0, place.clamp(0, num_rows - 1)
        else:
            first = forward.q_len - logits.shape[1]
            start, skipped = max(rows.start - first, 0), max(first - rows.start, 0)
            chosen = torch.arange(skipped, num_rows, device=logits.device)
            inside = torch.ones_like(chosen, dtype=torch.bool)
        batch = forward.state.image_mask.shape[0]
        mask = inside.expand(batch, -1)
        if rows.mask is not None:
            mask = mask & rows.mask.to(logits.device)[:, chosen]
        before = logits[:batch, start:]
        after = before.float()
        for _, method in self.mixing:
            states = [forward.early[layer][:, chosen.to(forward.early[layer].device)] for layer in method.early_layers]
            early = [self.read(each, normed=method.early_norm).to(logits.device) for each in states]
            after = method.mix_logits(after, early)
        mixed = torch.where(mask[..., None], after.to(logits.dtype), before)
        if is_measured(forward):
            move = squared_move(before.float().softmax(-1), mixed.float().softmax(-1), mask[..., None])
            for index, _ in self.mixing:
                self._counters.move(index, move)
        if start > 0:
            mixed = torch.cat([logits[:batch, :start], mixed], dim=1)
        return mixed if batch == logits.shape[0] else torch.cat([mixed, logits[batch:]])

    def read(self, states: torch.Tensor, *, normed: bool) -> torch.Tensor:
        """Return logits of ``[batch, rows, hidden_size]``, fp32."""
        head = self._head
        if normed:
            assert self._norm is not None
            states = self._norm()(states)
        device = weights_device(head)
        if device is not None:  # where weights are offloaded, accelerate's own hook moves the states
            states = states.to(device)
        logits: torch.Tensor = head(states).float()
        logits = logits * (self._scale or 1) / (self._divisor or 1)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


def _behind_head(anatomy: Anatomy, head: nn.Module) -> tuple[float | None, float | None, float | None]:
    """Return what a model does to the logits of its head: the cap, factor and divisor of its config.

    A composite model may leave out what the language model's config names, so its forward is asked by name.
    """
    # Some configs carry a factor that the code of their model does not apply, so the code that calls the head decides.
    owners = [module for module in anatomy.model.modules() if any(child is head for child in module.children())]
    codes = [inspect.unwrap(type(owner).forward).__code__ for owner in owners]
    names = {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    found: list[float | None] = []
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(anatomy.text_config, field, None)
        found.append(float(value) if value and field in names else None)
    return found[0], found[1], found[2]
