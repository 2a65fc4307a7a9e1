"""What every tiny family is made of: its config, its prompts, its batches.

A family gives the configuration of one tiny model, the ids that one image takes in a prompt, and how pictures become
inputs of the model. Classes of transformers are imported inside the builders, so that a family an older version lacks
is skipped with a reason.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from families.tiny_llava import Sample, position_ids
from families.weights import PAD, for_tests, strengthen, vocab_size

BOS, EOS, IMAGE, VIDEO = 1, 2, 3, 70
FIRST_WORD, LAST_WORD = 4, 63
START, END, BREAK, TAG = 64, 65, 66, 67
"""Ids that wrap, break or label images in a prompt; ids from 64 on are never words."""
MEDIA = {"image_token_id": IMAGE, "video_token_id": VIDEO}
"""As most configs call them."""
VOCAB_SIZE = 96
PICTURE = (3, 24, 24)

Pictures = Sequence[Sequence[torch.Tensor]]
"""Per sample, its pictures."""
Inputs = dict[str, torch.Tensor]
Encoder = Callable[[Pictures], Inputs]
Annotator = Callable[[torch.Tensor, torch.Tensor, Pictures], Inputs]


@dataclass(frozen=True)
class Family:
    """One tiny family.

    Attributes:
        name: Short name, also on the command line.
        title: Its name in the capability matrix.
        architecture: The class in transformers.
        config: Makes the config.
        block: The ids of one image, separators included.
        picture: Shape of one picture as the model takes it.
        encode: Turns pictures into inputs.
        annotate: Further inputs, from ids, attention mask and pictures.
        attention: How many text attention modules there are, those of an encoder left out.
        visual_ids: Ids whose embedding is replaced by visual features: what a patch has to find.
        max_images: Most images per prompt.
        text_only: Whether a prompt may have no image.
        image_first: Whether images stand before all text.
        side: Where prompts are padded: encoders count positions from the left.
        text_positions: Whether a padded forward wants ``position_ids`` (false: the model counts by itself).
        requires: Modules beside torch and transformers.
        needs_transformers: Least version, for the reader; what counts is whether the class exists.
        notes: What is peculiar.
    """

    name: str
    title: str
    architecture: str
    config: Callable[[], Any]
    block: tuple[int, ...] = (IMAGE,) * 9
    picture: tuple[int, ...] = PICTURE
    encode: Encoder = dataclasses.field(default_factory=lambda: stacked())
    annotate: Annotator | None = None
    attention: int = 4
    visual_ids: tuple[int, ...] = (IMAGE,)
    max_images: int = 2
    text_only: bool = True
    image_first: bool = False
    side: str = "left"
    text_positions: bool = True
    requires: tuple[str, ...] = ()
    needs_transformers: str | None = None
    notes: str = ""

    def unavailable(self) -> str | None:
        """Why the family cannot be built here, or ``None``."""
        import transformers

        missing = [name for name in self.requires if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}"
        needed = tuple(int(part) for part in (self.needs_transformers or "0").split("."))
        if tuple(int(part) for part in transformers.__version__.split(".")[: len(needed)]) < needed:
            return f"needs transformers {self.needs_transformers}"
        if not hasattr(transformers, self.architecture):
            return f"transformers {transformers.__version__} has no {self.architecture}"
        return None

    def build(self, seed: int = 0) -> Any:
        """The model with random, strong weights, ready for tests."""
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = self.config()
            if not getattr(config, "is_encoder_decoder", False):
                config.tie_word_embeddings = False  # tied random models repeat the last word
            model = getattr(transformers, self.architecture)(config).eval()
            strengthen(model)
        return for_tests(model, {PAD, *self.visual_ids, *range(LAST_WORD + 1, vocab_size(model))})

    def sample(self, before: int = 3, images: int = 1, after: int = 6, *, seed: int = 0, between: int = 2) -> Sample:
        """A prompt: first token, text, pictures with text between them, question."""
        pictures = [self.pixels(seed * 10 + index) for index in range(images)]
        inside: list[int] = []
        for index in range(images):
            inside += [*words(between if index else 0, seed + 50 + index), *self.block]
        text = words(before, seed)
        ids = [*inside, BOS, *text] if self.image_first else [BOS, *text, *inside]
        return Sample(tuple([*ids, *words(after, seed + 99)]), torch.stack(pictures) if images else None)

    def pixels(self, seed: int) -> torch.Tensor:
        """One random picture."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(self.picture, generator=generator) * 2

    def single(self) -> Sample:
        """One prompt with one image."""
        return self.sample(seed=7)

    def even(self) -> tuple[Sample, ...]:
        """Prompts of unequal length with one image each."""
        return (self.sample(3, 1, 6, seed=1), self.sample(7, 1, 5, seed=2), self.sample(1, 1, 9, seed=4))

    def ragged(self) -> tuple[Sample, ...]:
        """Prompts of unequal length with one, two, no and one picture, where the family allows it."""
        return (
            self.sample(3, 1, 6, seed=1),
            self.sample(7, self.max_images, 5, seed=2),
            self.sample(9, 0 if self.text_only else 1, 4, seed=3),
            self.sample(1, 1, 9, seed=4),
        )

    def text(self) -> Sample:
        """A prompt without an image."""
        if not self.text_only:
            raise ValueError(f"{self.name} always takes an image")
        return self.sample(5, 0, 6, seed=5)

    def collate(
        self, samples: Sequence[Sample], *, side: str | None = None, pad_to: int = 0
    ) -> dict[str, torch.Tensor]:
        """Pad prompts to one length and add everything the model takes."""
        length = max(pad_to, *(len(each.ids) for each in samples), 0)
        ids = torch.full((len(samples), length), PAD)
        mask = torch.zeros(len(samples), length, dtype=torch.long)
        for row, each in enumerate(samples):
            first = length - len(each.ids) if (side or self.side) == "left" else 0
            where = slice(first, first + len(each.ids))
            ids[row, where] = torch.tensor(each.ids)
            mask[row, where] = 1
        pictures = [list(each.pixels) if each.pixels is not None else [] for each in samples]
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(pictures):
            inputs |= self.encode(pictures)
        if self.annotate is not None:
            known = self._parameters()  # older versions take fewer annotations
            annotations = self.annotate(ids, mask, pictures)
            inputs |= {name: value for name, value in annotations.items() if name in known}
        return inputs

    def _parameters(self) -> set[str]:
        import transformers

        return set(inspect.signature(getattr(transformers, self.architecture).forward).parameters)

    def visual_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Where visual features stand: bool like ``ids``."""
        return torch.isin(ids, torch.tensor(self.visual_ids, dtype=ids.dtype))

    @torch.no_grad()
    def forward(self, model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        """A bare forward with the positions of padded prompts."""
        if self.text_positions and "position_ids" in self._parameters():
            options.setdefault("position_ids", position_ids(inputs["attention_mask"]))
        return model(**inputs, **options)


def family(name: str, architecture: str, *, title: str = "", **fields: Any) -> Family:
    """Declare a family; its title is its name unless it says more."""
    return Family(name=name, title=title or name, architecture=architecture, **fields)


def variant(base: Family, name: str, title: str, **changes: Any) -> Family:
    """A family that differs from another one in some fields."""
    return dataclasses.replace(base, name=name, title=title, **changes)


# Prompts and pictures.


def words(num: int, seed: int = 0) -> list[int]:
    """Random text ids."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.randint(FIRST_WORD, LAST_WORD + 1, (num,), generator=generator).tolist()


def stacked(key: str = "pixel_values", *, joined: bool = False, **per_picture: Any) -> Encoder:
    """All pictures of the batch in one tensor (``joined``: along their own first axis), and constants per picture."""

    def encode(pictures: Pictures) -> dict[str, torch.Tensor]:
        every = [picture for sample in pictures for picture in sample]
        inputs = {key: torch.cat(every) if joined else torch.stack(every)}
        for name, value in per_picture.items():
            inputs[name] = torch.tensor([value] * len(every))
        return inputs

    return encode


def nested(key: str = "pixel_values", **per_picture: Any) -> Encoder:
    """Pictures per sample, ``[batch, most pictures, ...]``, missing ones zero."""

    def encode(pictures: Pictures) -> dict[str, torch.Tensor]:
        most = max(len(sample) for sample in pictures)
        like = next(picture for sample in pictures for picture in sample)
        pixels = like.new_zeros(len(pictures), most, *like.shape)
        inputs = {key: pixels}
        for name, value in per_picture.items():
            one = torch.as_tensor(value)
            inputs[name] = one.new_zeros(len(pictures), most, *one.shape)
        for row, sample in enumerate(pictures):
            for column, picture in enumerate(sample):
                pixels[row, column] = picture
                for name, value in per_picture.items():
                    inputs[name][row, column] = torch.as_tensor(value)
        return inputs

    return encode


def tiled(*, mask: str = "") -> Encoder:
    """The tiles of all pictures of a sample in one row, missing ones zero; ``mask`` names which are there."""

    def encode(pictures: Pictures) -> dict[str, torch.Tensor]:
        like = next(picture for sample in pictures for picture in sample)
        rows = [torch.cat([like[:0], *sample]) for sample in pictures]
        most = max(len(row) for row in rows)
        tiles = [torch.cat([row, row.new_zeros(most - len(row), *row.shape[1:])]) for row in rows]
        real = [[column < len(row) for column in range(most)] for row in rows]
        return {"pixel_values": torch.stack(tiles), **({mask: torch.tensor(real)} if mask else {})}

    return encode


def token_types(*names: str, image: int = IMAGE) -> Annotator:
    """Inputs that are 1 at image tokens and 0 elsewhere."""

    def annotate(ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
        return {name: (ids == image).long() for name in names}

    return annotate


def decoder_start(*ids: int) -> Annotator:
    """The first ids of the answer of an encoder-decoder model."""

    def annotate(input_ids: torch.Tensor, mask: torch.Tensor, pictures: Pictures) -> dict[str, torch.Tensor]:
        return {"decoder_input_ids": torch.tensor([ids] * len(input_ids))}

    return annotate


# Configs.


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A config without what its class does not know."""
    return {name: value for name, value in values.items() if name not in names}


def parts(name: str, text: Any = None, vision: Any = None, **others: Any) -> Callable[[], Any]:
    """Make a config of transformers by its name, from those of the language model and the tower, and other values.

    Values may be functions, called when the config is made: what they need may not exist in an older version.
    """
    named = {"text_config": text, "vision_config": vision}
    values = {**{key: value for key, value in named.items() if value is not None}, **others}

    def config() -> Any:
        import transformers

        made = {key: value() if callable(value) else copy.deepcopy(value) for key, value in values.items()}
        return getattr(transformers, name)(**made)

    return config


def text(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    """A tiny language model: 4 layers, 4 query heads over 2 key heads."""
    return {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **changes,
    }


def gemma2_text() -> dict[str, Any]:
    """A tiny Gemma 2: softcap, and every other layer slides."""
    return text("gemma2", head_dim=8, query_pre_attn_scalar=16, sliding_window=12, attn_logit_softcapping=2.0)


def vision(model_type: str | None = None, **changes: Any) -> dict[str, Any]:
    """A tiny vision tower: 24 x 24 pixels, patches of 8, 2 layers."""
    kind = {} if model_type is None else {"model_type": model_type}
    return {
        **kind,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        **changes,
    }


def sam_tower(model_type: str | None = None, **changes: Any) -> dict[str, Any]:
    """A tiny vision tower of Segment Anything."""
    common = {"image_size": 32, "patch_size": 4, "output_channels": 16, "mlp_dim": 32, "window_size": 4}
    return without(vision(model_type, **{**common, "global_attn_indexes": [1], **changes}), "intermediate_size")


def rope(**parameters: Any) -> dict[str, Any]:
    """Rotary parameters under the name this version of transformers reads."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **parameters}}
    theta = parameters.pop("rope_theta", 1e4)
    partial = {"partial_rotary_factor": parameters.pop("partial_rotary_factor", None)}
    extra = {name: value for name, value in partial.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "default", **parameters}, **extra}
