"""A language model and the places a method may edit: one sample, no padding, one loop iteration per head and row.

Written from the papers' formulas only. A small language model of the Llama kind (Llama, Mistral, Qwen2, Gemma2) is run
layer by layer out of its own submodules; attention, its edits and the cache are spelt out here. Slow on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class Naive:
    """A method's formula, spelt out for one sample; one subclass per method, in ``tests/naive``.

    A method overrides the places it edits. It sees plain lists and one layer at a time. But for ``enter``, nothing is
    called for prompts without an image.

    Attributes:
        layers: The layers to edit.
        needs_sinks: Whether it has something to do only in a model with massive activations.
        acts_without_image: Whether it acts in prompts without an image.
    """

    needs_sinks = False
    acts_without_image = False

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)

    def begin(self, sequence: State, reference: Reference) -> None:
        """See a prompt before it is read; its tokens are already in ``sequence``."""

    def features(self, reference: Reference, picture: torch.Tensor) -> torch.Tensor | None:
        """The features ``[tokens, hidden_size]`` of a picture, where the method changes how the tower reads it."""
        return None

    def enter(self, row: Row) -> None:
        """See what enters a layer in a row, also in prompts without an image."""

    def opens(self, sequence: State, row: int, key: int) -> float | None:
        """The bias on a pair the causal mask hides, or ``None`` to leave it hidden."""
        return None

    def scores(self, row: Row, scores: torch.Tensor) -> torch.Tensor:
        """Edit the scores of a row, fp32 ``[num_heads, keys]``; hidden keys hold minus infinity."""
        return scores

    def maps(self, rows: Sequence[Row], maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Edit the weights of all rows of a forward at once: per row ``[num_heads, keys]``."""
        return [self.weights(row, weights) for row, weights in zip(rows, maps, strict=True)]

    def weights(self, row: Row, weights: torch.Tensor) -> torch.Tensor:
        """Edit the weights of a row, fp32 ``[num_heads, keys]``."""
        return weights

    def outputs(self, rows: Sequence[Row], outputs: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Edit the head outputs of all rows of a forward at once."""
        return [self.heads(row, heads) for row, heads in zip(rows, outputs, strict=True)]

    def heads(self, row: Row, heads: list[torch.Tensor]) -> list[torch.Tensor]:
        """Edit the head outputs of a row."""
        return heads

    def mlps(self, rows: Sequence[Row], entered: list[torch.Tensor], added: list[torch.Tensor]) -> list[torch.Tensor]:
        """Edit what the MLPs of all rows of a forward add; ``entered`` is what the MLPs were given."""
        return [self.block(row, "mlp", each) for row, each in zip(rows, added, strict=True)]

    def block(self, row: Row, kind: str, added: torch.Tensor) -> torch.Tensor:
        """Edit what a row's ``"attention"`` or ``"mlp"`` block adds to the residual stream, ``[hidden_size]``."""
        return added

    def logits(
        self, sequence: State, reference: Reference, stream: Sequence[torch.Tensor], logits: torch.Tensor
    ) -> torch.Tensor:
        """Edit the logits of a row that predicts a new token; ``stream`` is what left each layer in that row."""
        return logits


@dataclass
class State:
    """One sequence: its tokens and pictures so far, and what every layer remembers of them."""

    ids: list[int] = field(default_factory=list)
    is_image: list[bool] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)
    embeds: list[torch.Tensor] = field(default_factory=list)
    keys: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    values: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    turn: int = 0
    """Where the last prompt begins."""
    prompt_length: int = 0
    """Where it ends."""
    notes: dict[Any, Any] = field(default_factory=dict)
    """Whatever a ``Naive`` wants to remember of the sequence."""

    def image(self) -> list[int]:
        """Positions of image tokens."""
        return [i for i, image in enumerate(self.is_image) if image]


@dataclass(frozen=True)
class Row:
    """A row of a layer: where it stands, and what the layer knows.

    Attributes:
        reference: The model.
        sequence: The sequence, with all tokens of this forward.
        layer: The layer's number.
        position: The row's place in the sequence.
        generated: Whether its token was generated.
        state: What enters the layer, ``[hidden_size]``.
        query: ``[num_heads, head_dim]``.
        keys: ``[num_keys, num_kv_heads, head_dim]``.
    """

    reference: Reference
    sequence: State
    layer: int
    position: int
    generated: bool
    state: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor

    @property
    def predicts(self) -> bool:
        """Whether it predicts a new token: the prompt's last row, or a generated one."""
        return self.generated or self.position == self.sequence.prompt_length - 1

    @property
    def is_behind_the_image(self) -> bool:
        """Whether it comes behind the last image token."""
        return self.generated or self.position > max(self.sequence.image(), default=-1)


class Reference:
    """A language model of the Llama kind, layer by layer, with methods spelt out.

    Args:
        model: A stock vision-language model; it is copied.
        naive: The methods, in the order of the path.
        image_id: The placeholder's id.
    """

    def __init__(self, model: Any, naive: Sequence[Naive] = (), image_id: int = 3) -> None:
        self.naive = tuple(naive)
        self.model = copy.deepcopy(model)
        self.language_model = self.model.model.language_model
        self.config = self.language_model.config
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
        sequence.pictures += [] if pixels is None else list(pixels)
        sequence.is_image += [token == self.image_id and not generated for token in ids]
        if not generated:
            sequence.turn, sequence.prompt_length = past, len(sequence.ids)
        naive = [each for each in self.naive if each.acts_without_image or any(sequence.is_image)]
        if not generated:
            for method in naive:
                method.begin(sequence, self)
        states = new
        streams: list[list[torch.Tensor]] = []
        for number in range(len(self.language_model.layers)):
            rows = self._project_all(sequence, number, states, past, generated)
            acting = [method for method in naive if number in method.layers]
            heads = self._attention(rows, acting)
            states = self._leave(rows, heads, acting)
            streams.append(states)
        logits = [self.read(self.language_model.norm(x[None])[0]) for x in states]
        for i, row in enumerate(rows):
            if row.predicts:
                for method in naive:
                    logits[i] = method.logits(sequence, self, [each[i] for each in streams], logits[i])
        return torch.stack(logits)

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """The head on one vector: logits ``[vocab]``."""
        logits: torch.Tensor = self.model.lm_head(state[None])[0]
        return logits

    @torch.no_grad()
    def stream(self, embeds: Sequence[torch.Tensor]) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        """The head outputs of each layer and what leaves it, at the last of some positions, counted from 0.

        Nothing is edited, and there is no cache.
        """
        states, last, sequence = list(embeds), [], State()
        for number in range(len(self.language_model.layers)):
            rows = self._project_all(sequence, number, states, 0, False)
            heads = self._attention(rows, ())
            states = self._leave(rows, heads, ())
            last.append((heads[-1], states[-1]))
        return last

    def _embed(self, ids: list[int], pixels: torch.Tensor | None) -> torch.Tensor:
        """What enters the first layer: embeddings, placeholders replaced by image features."""
        embedding = self.model.get_input_embeddings()
        embeds = embedding(torch.tensor([ids]))[0]
        if pixels is not None:
            features = self.model.get_image_features(pixel_values=pixels)
            features = getattr(features, "pooler_output", features)  # transformers 4 returns the list itself
            for method in self.naive:
                edited = [method.features(self, picture) for picture in pixels]
                features = features if edited[0] is None else edited
            embeds = embeds.clone()
            embeds[[i for i, token in enumerate(ids) if token == self.image_id]] = torch.cat(list(features))
        if self.config.model_type == "gemma2" and not hasattr(embedding, "scalar_embed_scale"):
            embeds = embeds * self.config.hidden_size**0.5  # in transformers 4 the model scales, not the embedding
        return embeds

    # Attention.

    def _project_all(
        self, sequence: State, number: int, states: list[torch.Tensor], past: int, generated: bool
    ) -> list[Row]:
        """Put the keys and values of new positions into the cache; return their rows."""
        keys, values = sequence.keys.setdefault(number, []), sequence.values.setdefault(number, [])
        queries = []
        for position, x in enumerate(states, past):
            query, key, value = self._project(number, x, position)
            queries.append(query)
            keys.append(key)
            values.append(value)
        known = torch.stack(keys)
        rows = [
            Row(self, sequence, number, position, generated, x, query, known)
            for position, (x, query) in enumerate(zip(states, queries, strict=True), past)
        ]
        for method in self.naive:
            for row in rows if number in method.layers else ():
                method.enter(row)
        return rows

    def _attention(self, rows: Sequence[Row], naive: Sequence[Naive]) -> list[list[torch.Tensor]]:
        """Head outputs per row and head."""
        maps = []
        for row in rows:
            scores = self.scores(row)
            for method in naive:
                for key in range(row.position + 1, len(row.keys)):
                    bias = method.opens(row.sequence, row.position, key)
                    if bias is not None:
                        scores[:, key] = self._raw_scores(row)[:, key] + bias
            for method in naive:
                scores = method.scores(row, scores)
            maps.append(torch.softmax(scores, dim=1))
        for method in naive:
            maps = method.maps(rows, maps)
        values = torch.stack(rows[0].sequence.values[rows[0].layer])
        outputs = [[self._weigh(weights[head], values, head) for head in range(len(weights))] for weights in maps]
        for method in naive:
            outputs = method.outputs(rows, outputs)
        return outputs

    def _project(self, number: int, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = self.language_model.layers[number]
        x = layer.input_layernorm(x[None])[0]
        size = layer.self_attn.head_dim
        cos, sin = self.language_model.rotary_emb(x[None, None], torch.tensor([[position]]))
        query = layer.self_attn.q_proj(x).view(-1, size)
        key = layer.self_attn.k_proj(x).view(-1, size)
        value = layer.self_attn.v_proj(x).view(-1, size)
        return _rotate(query, cos[0, 0], sin[0, 0]), _rotate(key, cos[0, 0], sin[0, 0]), value

    def _raw_scores(self, row: Row) -> torch.Tensor:
        """Scaled and capped scores of one row, fp32 ``[num_heads, keys]``, nothing hidden."""
        module = self.language_model.layers[row.layer].self_attn
        share = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = range(len(row.query))
        scores = [(row.keys[:, head // share].float() @ row.query[head].float()) * module.scaling for head in heads]
        cap = getattr(self.config, "attn_logit_softcapping", None)
        return torch.stack(scores) if cap is None else cap * torch.tanh(torch.stack(scores) / cap)

    def scores(self, row: Row) -> torch.Tensor:
        """Scores of one row, fp32 ``[num_heads, keys]``, minus infinity where the model's mask hides the key."""
        scores = self._raw_scores(row)
        scores[:, row.position + 1 :] = -torch.inf
        scores[:, : self.first_key(row)] = -torch.inf
        return scores

    def first_key(self, row: Row) -> int:
        """The first key in a row's window."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if window is None or (kinds is not None and kinds[row.layer] == "full_attention"):
            return 0
        return max(row.position - window + 1, 0)

    def _weigh(self, row: torch.Tensor, values: torch.Tensor, head: int) -> torch.Tensor:
        group = head // (self.config.num_attention_heads // self.config.num_key_value_heads)
        return row.to(values.dtype) @ values[: len(row), group]

    def _leave(
        self, rows: Sequence[Row], heads: Sequence[list[torch.Tensor]], naive: Sequence[Naive]
    ) -> list[torch.Tensor]:
        """Output projection, residual, MLP; methods edit what is added."""
        layer = self.language_model.layers[rows[0].layer]
        has_norms_behind = hasattr(layer, "pre_feedforward_layernorm")  # Gemma2
        norm = layer.pre_feedforward_layernorm if has_norms_behind else layer.post_attention_layernorm
        states, entered, outputs = [], [], []
        for row, each in zip(rows, heads, strict=True):
            added = layer.self_attn.o_proj(torch.cat(each))
            if has_norms_behind:
                added = layer.post_attention_layernorm(added[None])[0]
            for method in naive:
                added = method.block(row, "attention", added)
            states.append(row.state + added)
            entered.append(norm(states[-1][None])[0])
            added = layer.mlp(entered[-1][None])[0]
            if has_norms_behind:
                added = layer.post_feedforward_layernorm(added[None])[0]
            outputs.append(added)
        for method in naive:
            outputs = method.mlps(rows, entered, outputs)
        return [x + added for x, added in zip(states, outputs, strict=True)]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
