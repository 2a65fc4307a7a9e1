"""Naive references of VHR and VAR: one sample, no padding, one loop iteration per head and query row.

Written from the papers' formulas only. A small language model of the Llama kind (Llama, Mistral, Qwen2, Gemma2) is run
layer by layer out of its own submodules; attention, its edits and the cache are spelt out here. Slow on purpose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Naive:
    """A method's formula, spelt out for one sample; one subclass per method, in ``tests/naive``.

    A reference overrides the places its method edits. It sees plain lists and one layer at a time: ``sequence`` (what
    the sequence is made of), the layer's ``number``, the ``position`` of a row, and whether that row is ``generated``.
    Nothing is called for prompts without an image.

    Attributes:
        layers: The layers to edit.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)

    def begin(self, sequence: State, reference: Reference) -> None:
        """See a prompt before it is read; its tokens are already in ``sequence``."""

    def opens(self, sequence: State, row: int, key: int) -> float | None:
        """The bias on a pair the causal mask hides, or ``None`` to leave it hidden."""
        return None

    def scores(
        self, sequence: State, number: int, position: int, scores: torch.Tensor, generated: bool
    ) -> torch.Tensor:
        """Edit the scores of a row, fp32 ``[num_heads, keys]``; hidden keys hold minus infinity."""
        return scores

    def maps(
        self, sequence: State, number: int, past: int, maps: list[torch.Tensor], generated: bool
    ) -> list[torch.Tensor]:
        """Edit the weights of all rows of a forward at once: per row ``[num_heads, keys]``."""
        return [self.weights(sequence, number, past + i, row, generated) for i, row in enumerate(maps)]

    def weights(
        self, sequence: State, number: int, position: int, weights: torch.Tensor, generated: bool
    ) -> torch.Tensor:
        """Edit the weights of a row, fp32 ``[num_heads, keys]``."""
        return weights

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
        """Edit the head outputs of a row; ``query`` ``[num_heads, d]``, ``keys`` ``[num_keys, num_kv_heads, d]``."""
        return heads

    def block(
        self, sequence: State, number: int, position: int, kind: str, added: torch.Tensor, generated: bool
    ) -> torch.Tensor:
        """Edit what a row's ``"attention"`` or ``"mlp"`` block adds to the residual stream, ``[hidden_size]``."""
        return added

    def logits(
        self, sequence: State, reference: Reference, stream: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        """Edit the logits of a row that predicts a new token; ``stream`` is what left each layer in that row."""
        return logits


@dataclass(frozen=True)
class VarSpec:
    """VAR, in the paper's notation: D_sink, tau, rho, least image mass, w, layers."""

    sink_dims: Sequence[int]
    tau: float = 20.0
    rho: float = 0.5
    image_mass: float = 0.2
    recycle: float = 0.6
    layers: Sequence[int] = ()


@dataclass(frozen=True)
class VhrSpec:
    """VHR: alpha, layers, outlier rule, and the head controls."""

    alpha: float = 2.0
    layers: Sequence[int] = ()
    outliers: bool = True
    select: str = "divergent"


@dataclass
class State:
    """One sequence: its tokens so far and what every layer remembers of them."""

    ids: list[int] = field(default_factory=list)
    is_image: list[bool] = field(default_factory=list)
    embeds: list[torch.Tensor] = field(default_factory=list)
    keys: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    values: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    sinks: dict[int, list[bool]] = field(default_factory=dict)
    heads: dict[int, list[bool]] = field(default_factory=dict)
    weights: dict[int, dict[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    selected: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    prompt_length: int = 0
    notes: dict[Any, Any] = field(default_factory=dict)
    """Whatever a ``Naive`` wants to remember of the sequence."""

    def image(self) -> list[int]:
        """Positions of image tokens."""
        return [i for i, image in enumerate(self.is_image) if image]

    def is_last_row(self, position: int, generated: bool) -> bool:
        """Whether a row predicts a new token: the prompt's last, or a generated one."""
        return generated or position == self.prompt_length - 1


# The formulas.


def sink_value(x: torch.Tensor, sink_dims: Sequence[int]) -> float:
    """phi(x) = max_d |x_d| / sqrt(mean x^2 + 1e-6)."""
    x = x.double()
    rms = math.sqrt(float((x * x).mean()) + 1e-6)
    return max(abs(float(x[d])) for d in sink_dims) / rms


def redistribute(
    row: torch.Tensor, is_image: Sequence[bool], is_sink: Sequence[bool], spec: VarSpec
) -> tuple[torch.Tensor, bool]:
    """Steps 3 and 4 of VAR on one attention row ``[keys]``: the edited row, and whether it was selected."""
    if not any(sink and image for sink, image in zip(is_sink, is_image, strict=True)):
        return row, False
    keys, weights = range(len(row)), row.tolist()
    visual_sinks = [j for j in keys if is_sink[j] and is_image[j]]
    image_mass = sum(weights[j] for j in keys if is_image[j])
    sink_mass = sum(weights[j] for j in visual_sinks)
    if image_mass <= 0 or image_mass < spec.image_mass or 1 - sink_mass / image_mass < spec.rho:
        return row, False
    rest = [j for j in keys if is_image[j] and not is_sink[j]]
    rest_mass = sum(weights[j] for j in rest)
    if rest_mass <= 0:
        return row, False
    omega = spec.recycle * sum(weights[j] for j in keys if is_sink[j])
    edited = list(weights)
    for j in keys:
        if is_sink[j]:
            edited[j] = (1 - spec.recycle) * weights[j]
    for j in rest:
        edited[j] = weights[j] + omega * weights[j] / rest_mass
    return torch.tensor(edited, dtype=row.dtype), True


def choose_heads(
    with_image: Sequence[torch.Tensor], without_image: Sequence[torch.Tensor], outliers: bool | str
) -> list[bool]:
    """Eqs. 4, 6 and 7 of VHR: which heads lie above the layer's median divergence; or the official code's, by ports."""
    count = len(with_image)
    vhd = [math.dist(x.tolist(), y.tolist()) for x, y in zip(with_image, without_image, strict=True)]
    if outliers == "released":
        vhd = [value**2 for value in vhd]
        outliers = count > 1 and _mean_plus_std(vhd) - sum(vhd) / count > 1
    if outliers and count > 1:
        surge = [sum(b**2 for b in y.tolist()) for y in without_image]
        limit_vhd, limit_surge = _mean_plus_std(vhd), _mean_plus_std(surge)
        vhd = [0.0 if vhd[i] > limit_vhd and surge[i] > limit_surge else vhd[i] for i in range(count)]
    ranked = sorted(vhd)
    median = ranked[(count - 1) // 2] if count % 2 else (ranked[count // 2 - 1] + ranked[count // 2]) / 2
    return [value > median for value in vhd]


def _mean_plus_std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return mean + math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


class Reference:
    """A language model of the Llama kind, layer by layer, with VAR and VHR spelt out.

    Args:
        model: A stock vision-language model; it is copied.
        var: VAR or none.
        vhr: VHR or none.
        image_id: The placeholder's id.
        naive: Other methods, in the order of the path.
    """

    def __init__(
        self,
        model: Any,
        var: VarSpec | None = None,
        vhr: VhrSpec | None = None,
        image_id: int = 3,
        naive: Sequence[Naive] = (),
    ) -> None:
        self.naive = tuple(naive)
        self.model = copy.deepcopy(model)
        self.language_model = self.model.model.language_model
        self.config = self.language_model.config
        self.var = var
        self.vhr = vhr
        self.image_id = image_id

    # Reading and decoding.

    def prompt(self, ids: Sequence[int], pixels: torch.Tensor | None, known: State | None = None) -> tuple:
        """Read a prompt (or a further turn): the sequence and the logits of every new position."""
        sequence = known or State()
        logits = self._step(sequence, list(ids), pixels, generated=False)
        return sequence, logits

    def decode(self, sequence: State, token: int) -> torch.Tensor:
        """Read one generated token: its logits ``[vocab]``."""
        return self._step(sequence, [token], None, generated=True)[-1]

    def generate(
        self, ids: Sequence[int], pixels: torch.Tensor | None, tokens: int, suppress: Sequence[int] = ()
    ) -> tuple[list[int], torch.Tensor]:
        """Greedy ids and the logits of every step."""
        sequence, logits = self.prompt(ids, pixels)
        step, steps, out = logits[-1], [], []
        for _ in range(tokens):
            steps.append(step)
            allowed = step.clone()
            allowed[list(suppress)] = -torch.inf
            out.append(int(allowed.argmax()))
            step = self.decode(sequence, out[-1])
        return out, torch.stack(steps)

    # One forward.

    @torch.no_grad()
    def _step(self, sequence: State, ids: list[int], pixels: torch.Tensor | None, *, generated: bool) -> torch.Tensor:
        past = len(sequence.ids)
        new = list(self._embed(ids, pixels))
        sequence.ids += ids
        sequence.embeds += new
        sequence.is_image += [token == self.image_id and not generated for token in ids]
        if not generated:
            sequence.prompt_length = len(sequence.ids)
        has_image = any(sequence.is_image)
        if has_image and not generated:
            for method in self.naive:
                method.begin(sequence, self)
        states = new
        streams: list[list[torch.Tensor]] = []
        text_states: list[torch.Tensor] = []
        compares = self.vhr is not None and self.vhr.select != "all" and has_image and not generated
        if compares:
            keep = [i for i in range(len(sequence.ids)) if not sequence.is_image[i]]
            text_states = [self._embed([sequence.ids[i]], None)[0] for i in keep]
        for number, layer in enumerate(self.language_model.layers):
            self._detect_sinks(sequence, number, states, generated)
            heads = self._attention(sequence, number, states, past, generated)
            text_heads = self._text_attention(number, text_states) if compares else []
            if self.vhr is not None and number in self.vhr.layers and has_image:
                if not generated:
                    sequence.heads[number] = self._select(heads[-1], text_heads[-1] if compares else None)
                chosen = sequence.heads[number]
                heads = [self._reinforce(row, chosen) for row in heads]
            edits = self.naive if has_image else ()
            states = [
                self._leave(layer, x, row, [(each, sequence, number, past + i, generated) for each in edits])
                for i, (x, row) in enumerate(zip(states, heads, strict=True))
            ]
            streams.append(states)
            if compares:
                text_states = [self._leave(layer, x, row) for x, row in zip(text_states, text_heads, strict=True)]
        rows = [self.read(self.language_model.norm(x[None])[0]) for x in states]
        for i, logits in enumerate(rows):
            if has_image and sequence.is_last_row(past + i, generated):
                for method in self.naive:
                    rows[i] = logits = method.logits(sequence, self, [each[i] for each in streams], logits)
        return torch.stack(rows)

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """The head on one vector: logits ``[vocab]``."""
        logits: torch.Tensor = self.model.lm_head(state[None])[0]
        return logits

    def stream(self, embeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What leaves each layer at the last of some positions, counted from 0, without edits and without a cache."""
        states, last = list(embeds), []
        for number, layer in enumerate(self.language_model.layers):
            heads = self._text_attention(number, states)
            states = [self._leave(layer, x, row) for x, row in zip(states, heads, strict=True)]
            last.append(states[-1])
        return last

    def _embed(self, ids: list[int], pixels: torch.Tensor | None) -> torch.Tensor:
        """What enters the first layer: embeddings, placeholders replaced by image features."""
        embedding = self.model.get_input_embeddings()
        embeds = embedding(torch.tensor([ids]))[0]
        if pixels is not None:
            features = self.model.get_image_features(pixel_values=pixels)
            features = getattr(features, "pooler_output", features)  # transformers 4 returns the list itself
            embeds = embeds.clone()
            embeds[[i for i, token in enumerate(ids) if token == self.image_id]] = torch.cat(list(features))
        if self.config.model_type == "gemma2" and not hasattr(embedding, "scalar_embed_scale"):
            embeds = embeds * self.config.hidden_size**0.5  # in transformers 4 the model scales, not the embedding
        return embeds

    def _detect_sinks(self, sequence: State, number: int, states: list[torch.Tensor], generated: bool) -> None:
        if self.var is None:
            return
        known = sequence.sinks.setdefault(number, [])
        for x in states:
            known.append(not generated and sink_value(x, self.var.sink_dims) >= self.var.tau)

    def _select(self, last: list[torch.Tensor], text_last: list[torch.Tensor] | None) -> list[bool]:
        assert self.vhr is not None
        if text_last is None:
            return [True] * len(last)
        divergent = choose_heads(last, text_last, self.vhr.outliers)
        return divergent if self.vhr.select == "divergent" else [not each for each in divergent]

    def _reinforce(self, row: list[torch.Tensor], chosen: list[bool]) -> list[torch.Tensor]:
        assert self.vhr is not None
        return [self.vhr.alpha * head if take else head for head, take in zip(row, chosen, strict=True)]

    # Attention.

    def _attention(
        self, sequence: State, number: int, states: list[torch.Tensor], past: int, generated: bool
    ) -> list[list[torch.Tensor]]:
        """Head outputs per row and head, after VAR."""
        keys, values = sequence.keys.setdefault(number, []), sequence.values.setdefault(number, [])
        queries = []
        for offset, x in enumerate(states):
            query, key, value = self._project(number, x, past + offset)
            queries.append(query)
            keys.append(key)
            values.append(value)
        last_image = max((i for i, image in enumerate(sequence.is_image) if image), default=None)
        written = sequence.weights[number] = {}
        selected = sequence.selected[number] = set()
        all_keys, all_values = torch.stack(keys), torch.stack(values)
        naive = [method for method in self.naive if number in method.layers] if last_image is not None else []
        maps = []
        for offset, query in enumerate(queries):
            scores = self._scores(number, query, all_keys, past + offset)
            for method in naive:
                for key in range(past + offset + 1, len(all_keys)):
                    bias = method.opens(sequence, past + offset, key)
                    if bias is not None:
                        scores[:, key] = self._raw_scores(number, query, all_keys)[:, key] + bias
            for method in naive:
                scores = method.scores(sequence, number, past + offset, scores, generated)
            maps.append(torch.softmax(scores, dim=1))
        for method in naive:
            maps = method.maps(sequence, number, past, maps, generated)
        outputs = []
        for offset, weights in enumerate(maps):
            position = past + offset
            edits = (
                self.var is not None
                and number in self.var.layers
                and last_image is not None
                and (generated or position > last_image)
            )
            row_outputs = []
            for head in range(self.config.num_attention_heads):
                row = weights[head]
                if edits:
                    assert self.var is not None
                    seen = range(len(row))
                    row, hit = redistribute(
                        row,
                        [sequence.is_image[j] for j in seen],
                        [sequence.sinks[number][j] for j in seen],
                        self.var,
                    )
                    if hit:
                        selected.add((head, position))
                written[head, position] = row[: position + 1]
                row_outputs.append(self._weigh(row, all_values, head))
            for method in naive:
                row_outputs = method.heads(
                    sequence, number, position, row_outputs, queries[offset], all_keys, generated
                )
            outputs.append(row_outputs)
        return outputs

    def _text_attention(self, number: int, states: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Head outputs of the image-free stream; it has no cache and no edits of attention weights."""
        projected = [self._project(number, x, position) for position, x in enumerate(states)]
        keys, values = torch.stack([key for _, key, _ in projected]), torch.stack([value for _, _, value in projected])
        return [
            [
                self._weigh(self._row(number, query, keys, head, position), values, head)
                for head in range(self.config.num_attention_heads)
            ]
            for position, (query, _, _) in enumerate(projected)
        ]

    def _project(self, number: int, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = self.language_model.layers[number]
        x = layer.input_layernorm(x[None])[0]
        size = layer.self_attn.head_dim
        cos, sin = self.language_model.rotary_emb(x[None, None], torch.tensor([[position]]))
        query = layer.self_attn.q_proj(x).view(-1, size)
        key = layer.self_attn.k_proj(x).view(-1, size)
        value = layer.self_attn.v_proj(x).view(-1, size)
        return _rotate(query, cos[0, 0], sin[0, 0]), _rotate(key, cos[0, 0], sin[0, 0]), value

    def _row(self, number: int, query: torch.Tensor, keys: torch.Tensor, head: int, position: int) -> torch.Tensor:
        """Post-softmax weights of one row of one head over keys ``0..position``."""
        return torch.softmax(self._scores(number, query, keys, position)[head, : position + 1], dim=0)

    def _raw_scores(self, number: int, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Scaled and capped scores of one row, fp32 ``[num_heads, keys]``, nothing hidden."""
        module = self.language_model.layers[number].self_attn
        share = self.config.num_attention_heads // self.config.num_key_value_heads
        rows = [(keys[:, head // share].float() @ query[head].float()) * module.scaling for head in range(len(query))]
        scores = torch.stack(rows)
        cap = getattr(self.config, "attn_logit_softcapping", None)
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def _scores(self, number: int, query: torch.Tensor, keys: torch.Tensor, position: int) -> torch.Tensor:
        """Scores of one row, fp32 ``[num_heads, keys]``, minus infinity where the model's mask hides the key."""
        scores = self._raw_scores(number, query, keys)
        window = self._window(number)
        scores[:, position + 1 :] = -torch.inf
        if window is not None:
            scores[:, : max(position - window + 1, 0)] = -torch.inf
        return scores

    def _weigh(self, row: torch.Tensor, values: torch.Tensor, head: int) -> torch.Tensor:
        group = head // (self.config.num_attention_heads // self.config.num_key_value_heads)
        return row.to(values.dtype) @ values[: len(row), group]

    def _window(self, number: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[number] == "full_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def _leave(
        self, layer: Any, x: torch.Tensor, heads: list[torch.Tensor], edits: Sequence[tuple[Any, ...]] = ()
    ) -> torch.Tensor:
        """Output projection, residual, MLP; methods edit what is added."""
        has_norms_behind = hasattr(layer, "pre_feedforward_layernorm")  # Gemma2
        added = layer.self_attn.o_proj(torch.cat(heads))
        if has_norms_behind:
            added = layer.post_attention_layernorm(added[None])[0]
        x = x + _edited(added, "attention", edits)
        norm = layer.pre_feedforward_layernorm if has_norms_behind else layer.post_attention_layernorm
        added = layer.mlp(norm(x[None]))[0]
        if has_norms_behind:
            added = layer.post_feedforward_layernorm(added[None])[0]
        return x + _edited(added, "mlp", edits)


def _edited(added: torch.Tensor, kind: str, edits: Sequence[tuple[Any, ...]]) -> torch.Tensor:
    for method, sequence, number, position, generated in edits:
        if number in method.layers:
            added = method.block(sequence, number, position, kind, added, generated)
    return added


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
