"""The contract every method fulfils: a frozen dataclass that edits one or more places on the path of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vlmfix.methods.parameters import SearchSpace, is_off
from vlmfix.methods.selection import InLayers
from vlmfix.methods.sequence import rows_of
from vlmfix.methods.views import EditedRows, PromptRows

if TYPE_CHECKING:
    import torch

    from vlmfix.methods.views import Block, Layer, Prompt
    from vlmfix.model.anatomy import Anatomy, AttentionKind
    from vlmfix.model.blocks import BlockKind


@dataclass(frozen=True)
class Method(InLayers):
    """Base class of all methods: a frozen dataclass of its parameters, declared with ``parameters.parameter``.

    A method stands at one or more places on the path of attention, overrides only their hooks and declares them in
    class attributes: the mask, the scores before the softmax, the weights behind it, the outputs of the heads, and what
    the blocks of a decoder layer add to the residual stream. What does not depend on a parameter is a plain class
    attribute without an annotation (``name = "vhr"``, ``prompt_rows = "last"``), also where this class has a property.

    A method never keeps state: what it learns is returned from its hooks or stored in ``layer.learned`` (one layer) and
    ``layer.shared`` (all layers) and lives on the sequence's cache.
    """

    name: ClassVar[str] = ""
    """Its short name: that of its file."""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    search_space = SearchSpace()
    """Parameters that ``vlmfix tune`` searches, and between what: see ``parameter(search=...)``."""
    opens_mask: ClassVar[bool] = False
    edits_scores: ClassVar[bool] = False
    edits_weights: ClassVar[bool] = False
    edits_heads: ClassVar[bool] = False
    edits_blocks: ClassVar[tuple[BlockKind, ...]] = ()
    """Which outputs of a decoder layer's blocks it edits, before they are added to the residual stream; as
    ``"embedding"``, the image's tokens as they enter the first layer, whatever ``layers`` and ``prompt_rows`` are."""
    reads_mlp_input: ClassVar[bool] = False
    """Whether :meth:`edit_block` looks at ``block.input`` and ``block.early_logits`` of the MLPs it edits."""
    hides_keys: ClassVar[bool] = False
    """Whether :meth:`edit_scores` hides keys, by the lowest score there is; later edits do not see them."""
    reads_layer_input: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = False
    vision_layers: ClassVar[tuple[int, ...]] = ()
    """Layers of the vision tower whose class token's attention it reads; negative ones count from the end."""
    reorders: ClassVar[bool] = False
    """Whether what it learns differs between the beams of a prompt, so that it must follow them."""
    needs_past: ClassVar[bool] = False
    """Whether ``layer.forward.past`` must be known while decoding with a static cache too."""
    needs_ids: ClassVar[bool] = False
    """Whether generated ids are remembered, because a further turn reads the whole text again without its images."""
    needs_cache: ClassVar[bool] = True
    """Whether decoding without a cache, which reads generated tokens as a prompt, would compute something else, unless
    ``generate`` tells which tokens are generated."""
    replaces_logits: ClassVar[bool] = False
    """Whether it decides on the next token instead of editing a layer (``vlmfix.decoding``); one at a time can."""
    rewrites_logits: ClassVar[bool] = False
    """Whether :meth:`mix_logits` decides on the next token, so that no decoding method goes with it."""
    searches: ClassVar[bool] = False
    """Whether it is a search of its own in the place of ``generate``, beside which no other method acts."""
    rewrites_answers: ClassVar[bool] = False
    """Whether it edits what ``generate`` returns, instead of anything inside a forward; see :meth:`rewriter`."""
    scales_heads: ClassVar[bool] = False
    """Whether its edit of heads is a factor, which a norm of the head outputs would undo."""
    removed_parameters: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    """Parameters that earlier versions had: the value that means what is done now, and why there is no other."""
    needs_text_keys: ClassVar[bool] = True
    """Whether it weighs image keys against text keys, and so means nothing where all keys are one or the other."""

    @property
    def counts(self) -> str:
        """What ``vlmfix.status`` counts of it."""
        return "block rows" if self.edits_blocks else "head rows"

    @property
    def is_identity(self) -> bool:
        """Whether the parameters switch the method off: then nothing is computed and outputs are bitwise stock."""
        return is_off(self)

    @property
    def acts_without_image(self) -> bool:
        """Whether it edits prompts without an image too, which every method of this project leaves alone by default."""
        return False

    @property
    def edits_vision(self) -> tuple[BlockKind, ...]:
        """Which outputs of the blocks of the vision tower's layers it edits, in every image that is read."""
        return ()

    @property
    def prompt_rows(self) -> PromptRows:
        """The rows of a prompt whose scores, weights or block outputs are up for edits; or its parameter ``rows``."""
        rows: PromptRows = getattr(self, "rows", "text")
        return rows

    @property
    def edits_decode(self) -> bool:
        """Whether scores, weights or block outputs of generated tokens' rows are edited too."""
        return True

    @property
    def observed_rows(self) -> PromptRows:
        """The rows of a prompt shown to :meth:`observe` before any of them is edited; ``"none"`` switches it off."""
        return "none"

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether a prompt must come in one forward: the edit of a row depends on tokens that follow it."""
        return self.prompt_rows == "last"

    @property
    def leaves_prefix(self) -> bool:
        """Whether it leaves alone what a prompt holds up to its last image token, so that prompts can share its cache.

        By the rows it declares: those of the text behind the image, the last one, or none. A method that edits heads or
        logits, opens the mask or looks at the whole prompt beforehand is none of these.
        """
        looks = self.reads_prompt or self.needs_text_only_heads or self.vision_layers or self.opens_mask
        looks = looks or bool(self.edits_vision)
        edits = self.edits_heads or self.replaces_logits or "embedding" in self.edits_blocks
        is_behind = {"image", "all"}.isdisjoint([self.prompt_rows, self.observed_rows])
        return self.is_identity or (not (looks or edits) and is_behind)

    @property
    def minds_text_before_image(self) -> bool:
        """Whether the text before a prompt's first image is edited too, or decides on edits."""
        return self.needs_whole_prompt and "all" in (self.prompt_rows, self.observed_rows)

    @property
    def keeps_choice(self) -> bool:
        """Whether what it learned at the end of a prompt holds for the answer behind that prompt alone.

        If a cache is cropped into the prompt, the choice is lost, unless :meth:`crop` says what is left of it.
        """
        return self.needs_whole_prompt and self.edits_decode and type(self).crop is Method.crop

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention it acts in; ``vlmfix.recipes`` refuses models that have none of them.

        In ``"encoder"`` and ``"answer"`` attention every row is that of a generated token, and
        ``layer.forward.is_prefill`` is never true.
        """
        if self.opens_mask or self.reads_layer_input or self.edits_blocks:
            return ("joint",)  # image tokens must be tokens of the decoder's own stream
        if self.needs_text_keys:
            edits_attention = self.edits_scores or self.edits_weights
            needs_prompt = edits_attention and not (self.edits_decode and self.observed_rows == "none")
            return ("joint",) if needs_prompt else ("joint", "encoder")
        if self.edits_heads:  # one module per layer, so that a (layer, head) pair is one head
            return ("joint", "text", "encoder")
        return ("joint", "text", "image", "encoder", "answer")

    @property
    def needs_text_only_heads(self) -> bool:
        """Whether :meth:`edit_heads` compares with the head outputs of an image-free pass."""
        return False

    @property
    def early_layers(self) -> tuple[int, ...]:
        """Decoder layers of a bound method whose outputs, read by the model's head, :meth:`mix_logits` asks for."""
        return ()

    @property
    def early_norm(self) -> bool:
        """Whether the final norm stands between those layers and the head."""
        return False

    def fixed_factors(self, num_heads: int) -> dict[tuple[int, int], float] | None:
        """Return the factors of head outputs of a bound method, by (layer, head); ``None`` if prompts change them."""
        return {} if self.is_identity else None

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """What a user should know about this method on this model; shown by ``vlmfix.status``."""
        return ()

    def cautions(self, anatomy: Anatomy) -> tuple[str, ...]:
        """What may make this model's answers useless under this method; ``vlmfix.patch`` warns of it too."""
        return ()

    # The hooks, in the order of the path. ``layer`` gives the masks, the rows and the learned state.

    def begin(self, prompt: Prompt) -> Any:
        """See a prompt with an image before it is read, if ``reads_prompt``.

        What is returned becomes ``layer.shared``.
        """
        raise NotImplementedError

    @property
    def mask_bias(self) -> float:
        """The bias on the scores of pairs opened by :meth:`open_mask`; 0 as if they had never been closed."""
        return 0.0

    def open_mask(self, layer: Layer, start: int, stop: int) -> torch.Tensor:
        """Let the rows ``start..stop - 1`` of a prompt see keys that the causal mask hides, the same in every layer.

        Returns:
            Bool ``[batch, stop - start, q_len]``: the (query, key) pairs to open where they are closed.
        """
        raise NotImplementedError

    def edit_scores(self, scores: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> EditedRows:
        """Edit pre-softmax scores of the requested rows.

        Args:
            scores: ``[batch, num_heads, rows, keys]``, fp32, scaled and capped; hidden keys hold arbitrary values. May
                be edited in place.
            allowed: Bool, broadcastable to ``scores``: the keys each row sees. Hidden keys stay hidden.
            layer: The layer.

        Returns:
            The scores and a bool tensor ``[batch, num_heads, rows]``: the rows that were edited. Other rows must come
            back as they were.
        """
        raise NotImplementedError

    def observe(self, attn_weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """See post-softmax weights before this method edits any.

        In a prompt: all ``observed_rows``, in one or more pieces ``layer.rows``, in order; ``layer.row_mask`` tells
        which of them count. While decoding: the rows of each step.

        Args:
            attn_weights: ``[batch, num_heads, rows, keys]``, fp32; must not be changed.
            allowed: Bool, broadcastable to ``attn_weights``: the keys each row sees.
            layer: The layer.
        """
        raise NotImplementedError

    def learn(self, hidden_states: torch.Tensor, layer: Layer) -> Any:
        """See the residual stream entering a decoder layer in a prompt; what is returned becomes ``layer.learned``.

        Args:
            hidden_states: ``[batch, q_len, hidden_size]``, before the layer's input norm.
            layer: The layer; ``layer.learned`` holds what earlier parts of the same sequence taught, or ``None``.
        """
        raise NotImplementedError

    def crop(self, learned: Any, length: int) -> Any:
        """Forget what was learned of tokens behind the first ``length``: the cache was cropped into the prompt."""
        return learned

    def reorder(self, learned: Any, beams: torch.Tensor) -> Any:
        """Follow a reordering of the batch: row ``i`` continues row ``beams[i]``."""
        return rows_of(learned, beams, len(beams)) if self.reorders else learned

    def settle(self, learned: Mapping[int, Any]) -> None:
        """See everything learned in a prompt (by site index) once it is over: the one place that may synchronise."""

    def observes_at(self, layer: Layer) -> bool:
        """Whether :meth:`observe` is wanted here, in a layer of a method with ``observed_rows``."""
        return True

    def acts_at(self, layer: Layer) -> bool:
        """Whether :meth:`edit_weights` has anything to do; ``False`` leaves the layer to the base kernel."""
        return True

    def edit_weights(self, attn_weights: torch.Tensor, layer: Layer) -> EditedRows:
        """Edit post-softmax weights of the requested rows.

        Args:
            attn_weights: ``[batch, num_heads, rows, keys]``, fp32, owned by the caller (may be edited in place).
            layer: The layer.

        Returns:
            The edited weights and a bool tensor ``[batch, num_heads, rows]``: the rows that were edited. Other rows
            must come back as they were. In a prompt they keep what the base kernel computed, and so do rows that are
            not up for edits (``layer.row_mask``).
        """
        raise NotImplementedError

    def edit_heads(self, head_outputs: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Edit head outputs ``[batch, q_len, num_heads, head_dim]`` before the output projection."""
        raise NotImplementedError

    def edit_block(self, states: torch.Tensor, block: Block) -> torch.Tensor:
        """Edit what a block of a decoder layer adds to the residual stream.

        Args:
            states: The rows of a forward from the first one that is up for edits to the last,
                ``[batch, rows, hidden_size]``, in the model's dtype; must not be changed in place.
            block: The block.

        Returns:
            The edited states, in any dtype. Rows that are not up for edits come back as they were, whatever is
            returned for them.
        """
        raise NotImplementedError

    def edit_vision(self, states: torch.Tensor, kind: BlockKind, layer_idx: int) -> torch.Tensor:
        """Edit what a block of a layer of the vision tower adds to its residual stream, in all tokens.

        The tower may read images before a prompt's forward begins, so there is no forward to look at.

        Args:
            states: ``[..., tokens, width]``, in the model's dtype; must not be changed in place. Towers that read
                images of any size give the tokens of all images in one row.
            kind: ``"attention"`` or ``"mlp"``.
            layer_idx: The layer's number.

        Returns:
            The edited states, in any dtype.
        """
        raise NotImplementedError

    def mix_logits(self, logits: torch.Tensor, early: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mix the logits of a forward with those of early layers, in the rows that predict new tokens.

        Args:
            logits: fp32 ``[batch, rows, vocab]``.
            early: The same of each of ``early_layers``.
        """
        raise NotImplementedError

    def rewriter(self, stock: Any, index: int, counters: Any) -> Any:
        """Return what stands in for ``generate`` of a bound method's model, if ``rewrites_answers``.

        Args:
            stock: What generates without it.
            index: The method's number in its patch, under which ``counters`` count what it edits.
            counters: Those of the patch.

        Returns:
            A callable with the arguments of ``generate``, an attribute ``stock`` and a method ``note()``: a line for
            ``vlmfix.status``, or nothing.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict ``{"method": name, **parameters}``; ``vlmfix.recipes`` reads it back."""
        return {"method": self.name, **super().to_dict()}
