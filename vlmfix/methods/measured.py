"""What is measured once per model and given to a method: written as JSON, read back from a dict or a file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from vlmfix.errors import DataError, MethodError
from vlmfix.files import read_json
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Parametrised, described, parameter
from vlmfix.methods.registry import recipe_entry
from vlmfix.model.anatomy import Anatomy

if TYPE_CHECKING:
    from typing_extensions import Self


class Measured(Parametrised):
    """Base of frozen dataclasses whose fields are numbers, texts and (nested) tuples of them.

    Attributes:
        noun: What it is, for messages and file names ("ranking").
    """

    noun: ClassVar[str]

    def require(self, condition: bool, parameter: str, expected: str) -> None:
        """Raise ``MethodError`` naming the field and what is expected, unless ``condition``."""
        if not condition:
            value = getattr(self, parameter)
            found = "" if isinstance(value, (list, tuple, dict)) else f", got {value!r}"  # tables are long
            raise MethodError(f"{self.noun.capitalize()}: {parameter!r} must be {expected}{found}.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            MethodError: It is something else.
        """
        try:
            return cls(**data)
        except TypeError as error:
            fields = ", ".join(field.name for field in dataclasses.fields(cls))
            found = str(error).rpartition("() ")[2]
            raise MethodError(f"{cls.noun.capitalize()}: expected {fields}; {found}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file.

        Raises:
            MethodError: The file is missing or holds something else.
        """
        try:
            data = read_json(Path(path), what=f"{cls.noun} file", remedy="write it again, or give another")
        except DataError as error:
            raise MethodError(f"Cannot read the {cls.noun} {path}: {error}.") from error
        if not isinstance(data, dict):
            raise MethodError(f"{path} holds no {cls.noun}: expected a JSON object.")
        return cls.from_dict(data)


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibrated method, ready for ``vlmfix.patch(model, calibration)`` and ``vlmfix.save_recipe``.

    Attributes:
        method: The method, with what was learned in its parameters.
        provenance: JSON-ready: model, samples, counts, options, versions, and the scores the choice rests on
            (``scores[name][i][head]`` belongs to layer ``layers[i]``).
    """

    method: Method
    provenance: dict[str, Any] = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write a recipe file with the provenance beside the method; ``patch`` and ``load_recipe`` read it.

        Raises:
            MethodError: The method could not be read back; nothing is written.
        """
        data = {"methods": [recipe_entry(self.method)], "calibration": self.provenance}
        text = json.dumps(data, indent=1, allow_nan=False)
        # Innermost lists on one line: a newline is never part of a JSON string.
        text = re.sub(r"\[\n[^\[\]{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text)
        Path(path).write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tensors as lists, numbers to 6 digits, ``None`` for what is not finite."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


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


_RATES = "a list of finite numbers, one per decoder layer"


@dataclass(frozen=True, repr=False)
class LayerRanking(Measured):
    """Recovery rates of the blocks of every layer, see ``vlmfix.probes.causal_trace``."""

    noun = "ranking"

    model: str = field(
        metadata=described("Name of the checkpoint they were measured on (the last part of its path or hub id counts).")
    )
    rr_attn: tuple[float, ...] = field(
        metadata=described(
            "Recovery rates of the attention blocks, one per decoder layer; may be negative.", expected=_RATES
        )
    )
    rr_mlp: tuple[float, ...] = field(metadata=described("Those of the MLP blocks.", expected=_RATES))
    token: str = parameter("last", help="The group of tokens that was patched.")

    def validate(self) -> None:
        """Check that there is one rate per layer in both lists."""
        self.require(len(self.rr_attn) > 0, "rr_attn", _RATES)
        if len(self.rr_attn) != len(self.rr_mlp):
            raise MethodError(
                f"Ranking: 'rr_attn' has {len(self.rr_attn)} layers and 'rr_mlp' {len(self.rr_mlp)}; expected one rate "
                "per decoder layer in both."
            )

    def __repr__(self) -> str:
        """Without the numbers: they are many."""
        return f"LayerRanking(model={self.model!r}, {len(self.rr_attn)} layers, token={self.token!r})"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model other than the one measured.

        Raises:
            MethodError: Another depth or another checkpoint.
        """
        check_checkpoint("iri", "rankings", self.model, f"{len(self.rr_attn)} layers", anatomy, len(self.rr_attn))


_DIRECTIONS = "a table [layers][size] of finite numbers"


@dataclass(frozen=True, repr=False)
class Directions(Measured):
    """Directions in which outputs of blocks are turned, see ``vlmfix.calibration.vti``."""

    noun = "directions"

    model: str = field(
        metadata=described("Name of the checkpoint they were measured on (the last part of its path or hub id counts).")
    )
    text: tuple[tuple[float, ...], ...] = field(
        metadata=described("``[num_layers][hidden_size]`` in the decoder.", expected=_DIRECTIONS)
    )
    vision: tuple[tuple[tuple[float, ...], ...], ...] = parameter(
        (),
        expected="a table [layers][tokens or 1][width] of finite numbers",
        help="``[layers][tokens][width]`` in the vision tower; one token where all share their directions.",
    )

    def validate(self) -> None:
        """Check that all layers of the decoder have one width."""
        self.require(len({len(row) for row in self.text}) == 1, "text", _DIRECTIONS)

    def __repr__(self) -> str:
        """Without the numbers: they are many."""
        return f"Directions(model={self.model!r}, {len(self.text)} layers, {len(self.vision)} of the vision tower)"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a model other than the one measured.

        Raises:
            MethodError: Another shape or another checkpoint.
        """
        size = len(self.text[0])
        shape = f"{len(self.text)} layers of size {size}"
        same = len(self.text) if size == anatomy.hidden_size else -1
        check_checkpoint("vti", self.noun, self.model, shape, anatomy, same)


def check_checkpoint(method: str, noun: str, model: str, shape: str, anatomy: Anatomy, num_layers: int) -> None:
    """Refuse a model other than the one that something was measured on.

    Args:
        method: Whose it is.
        noun: What it is, in the plural.
        model: The checkpoint it is of.
        shape: How large that is, in words.
        anatomy: The model at hand.
        num_layers: How many layers that has.

    Raises:
        MethodError: Another depth or another checkpoint.
    """
    how, found = how_to_measure(method, anatomy), checkpoint_name(anatomy)
    if num_layers != anatomy.num_layers:
        raise MethodError(
            f"{method}: the {noun} are of {model!r} with {shape}, and this model has {anatomy.num_layers} layers of "
            f"size {anatomy.hidden_size}. {noun.capitalize()} do not carry over. {how}"
        )
    if Path(model).name != found:
        raise MethodError(
            f"{method}: the {noun} are of the checkpoint {model!r}, and this model is {found!r}. {noun.capitalize()} "
            f"do not carry over. {how} If it is the same checkpoint under another name, write that name into the file."
        )


def checkpoint_name(anatomy: Anatomy) -> str:
    """Return the last part of a model's path or hub id; empty for a model that was not loaded from one."""
    return Path(str(anatomy.model.config._name_or_path or "")).name


def how_to_measure(method: str, anatomy: Anatomy) -> str:
    """Return the line to type for what a method needs."""
    name = str(anatomy.model.config._name_or_path or "MODEL")
    return (
        f"To measure: vlmfix calibrate {method} --model {name} --data COCO_DIR --limit 50 --out {method}.json, then "
        f"vlmfix.patch(model, '{method}.json')."
    )


Table = tuple[tuple[float, ...], ...]


_TABLE = "a table [layers][heads] of finite numbers >= 0"


@dataclass(frozen=True, repr=False)
class HeadStatistics(Measured):
    """Mean attention to generated text at the tokens of real and of hallucinated objects."""

    noun = "statistics"

    real: Table = field(
        metadata=described(
            "``[num_layers][num_heads]`` over all layers and heads; layers that were not measured hold zeros.",
            low=0,
            expected=_TABLE,
        )
    )
    hallucinated: Table = field(metadata=described("The same at hallucinated objects.", low=0, expected=_TABLE))
    num_real: int = field(metadata=described("How many tokens the means are over.", low=1))
    num_hallucinated: int = field(metadata=described("The same of hallucinated objects.", low=1))
    kind: Literal["mean", "share"] = parameter(
        "mean", help='``"mean"``: attention per generated key. ``"share"``: their sum.'
    )
    model: str = parameter("", help="Name of the model.")
    prompt: str = parameter("", help="The prompt that was answered.")

    def validate(self) -> None:
        """Check that both tables have one shape."""
        shapes = {(len(table), len(row)) for table in (self.real, self.hallucinated) for row in table or ((),)}
        if len(shapes) != 1 or 0 in next(iter(shapes)):
            raise MethodError(f"Statistics: 'real' and 'hallucinated' must have one shape, found {sorted(shapes)}.")

    def __repr__(self) -> str:
        """Without the numbers: they are many."""
        layers, heads = self.shape
        return (
            f"HeadStatistics({layers} layers of {heads} heads, {self.num_real} real and {self.num_hallucinated} "
            f"hallucinated tokens, kind={self.kind!r}, model={self.model!r})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.real), len(self.real[0])

    def threshold(self, layer: int, beta: float) -> float:
        """Return ``Hal_l + beta (Real_l - Hal_l)``, sums over the heads of a layer."""
        real, hallucinated = sum(self.real[layer]), sum(self.hallucinated[layer])
        return hallucinated + beta * (real - hallucinated)

    def ratios(self, layer: int) -> list[float]:
        """Return ``M_lh``, real over hallucinated, of the heads of a layer."""
        return [real / hal for real, hal in zip(self.real[layer], self.hallucinated[layer], strict=True)]
