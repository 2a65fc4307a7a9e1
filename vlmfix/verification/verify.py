"""Self-verification: the model is asked for every object it named, and phrases that it denies are left out (ours)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmfix.errors import MethodError, UnsupportedFeatureError, VlmfixError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import Range, parameter
from vlmfix.methods.selection import DefaultLayers
from vlmfix.model.refusals import check_next_token
from vlmfix.prefix import check_shares_prefix
from vlmfix.verification.ask import QUESTION, Questioner
from vlmfix.verification.generate import GenerateVerified
from vlmfix.verification.judge import Judge, Rule

if TYPE_CHECKING:
    from vlmfix.engine.status import Counters
    from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class Verify(Method):
    """Ask the model for every object that its answer names, and leave out the phrases that it does not stand by.

    For each object word, the stock model is asked "Is there a dog in the image?" behind its one reading of the image,
    and how likely it was to say the word where it did is looked up. The log odds that the word is true are
    ``bias + asked_weight ln(P(yes) / P(no)) + said_weight ln(p / (1 - p))``. Where they are below
    ``ln(lost_per_false)``, every phrase with that word is left out of the answer, and what stays are grammatical
    sentences. No word is put in its place: forcing the decoder to say something else invents as much
    (measured on the embedded model), and going back ends answers early.

    ``generate`` goes on as ever, also in batches, pipelines, with beams and sampling; a streamer gets whole sentences,
    each once it has been judged. The tokens that come back are those of the edited text; an answer with nothing to
    leave out comes back as it was, token by token. What goes with the tokens that the model chose (scores, logits,
    attentions, hidden states) is refused, and a cache that comes back is cut where the text was edited.

    This costs the tokens of a short question per different word. The image and the answer are read once more beside
    another method and in a stream, the answer also with beams or drafts, the image where no cache of plain keys and
    values is left.
    """

    name = "verify"
    paper = "ours"
    summary = "asks the model for every object it named, and leaves out the phrases that it does not stand by"
    counts = "phrases"
    rewrites_answers = True
    needs_cache = False
    leaves_prefix = False  # a call that goes on from a prefix brings no image to ask about
    default_layers = DefaultLayers("none, and none can be given: it acts on answers", lambda num_layers: ())

    lost_per_false: float = parameter(
        0.7,
        low=0,
        off=0,
        search=Range(0.05, 4.0, log=True),
        help="How many true words may be lost for each false one that is left out.",
    )
    asked_weight: float = parameter(1.0, low=0, help="Weight of the answer to the question; ``calibrate`` fits it.")
    said_weight: float = parameter(0.25, low=0, help="Weight of how likely the word was when it was said.")
    bias: float = parameter(0.0, help="Log odds that a word is true whose evidence is even.")
    question: str = parameter(QUESTION, help="What is asked, with ``{article}`` and ``{name}``.")
    batch_size: int = parameter(32, low=1, help="Questions per forward.")
    processor: str | object | None = parameter(
        None,
        expected="a processor, or its folder or hub id",
        help="The model's processor, or its folder or hub id. Default: the one saved with the model.",
    )

    def validate(self) -> None:
        """Refuse layers, and a question without a place for the object."""
        self.require(self.layers is None, "layers", "left out: the method acts on answers, not in layers")
        self.require("{name}" in self.question, "question", "a text with {name} in it")

    @property
    def rule(self) -> Rule:
        """The rule by which words are judged."""
        return Rule(self.asked_weight, self.said_weight, self.bias, math.log(self.lost_per_false or 1e-300))

    def bind(self, anatomy: Anatomy) -> Verify:
        """Check that questions can go on from one reading of an image, and load the processor.

        Raises:
            MethodError: They cannot, or there is no processor.
        """
        check_next_token(self.name, anatomy.model)
        try:
            check_shares_prefix(anatomy)
        except UnsupportedFeatureError as error:
            raise MethodError(
                f"verify asks several questions behind one reading of an image. {error} Give finished answers to "
                "vlmfix.verify(model, processor, image, text) instead, which reads the image for each."
            ) from error
        bound = dataclasses.replace(self)
        if not self.is_identity:
            processor = find_processor(anatomy, self.processor)
            try:
                questioner = Questioner(anatomy.model, processor, self.question, self.batch_size, blind=False)
            except VlmfixError as error:
                raise MethodError(f"verify cannot ask {type(anatomy.model).__name__}: {error}") from error
            object.__setattr__(bound, "_judge", Judge(questioner, self.rule))
        return bound

    def rewriter(self, stock: Any, index: int, counters: Counters) -> GenerateVerified:
        """Return what stands in for ``generate`` of a bound method's model."""
        judge: Judge = self._judge  # type: ignore[attr-defined]
        return GenerateVerified(stock, judge, index, counters)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict; of a processor, its folder or hub id, if it has one."""
        found = super().to_dict()
        del found["layers"]
        if not isinstance(self.processor, str | None):
            found["processor"] = getattr(getattr(self.processor, "tokenizer", None), "name_or_path", None) or None
        return found


def find_processor(anatomy: Anatomy, given: Any) -> Any:
    """Return a model's processor.

    Args:
        anatomy: The model.
        given: A processor, its folder or hub id; ``None``: the one saved with the model.

    Raises:
        MethodError: None is found.
    """
    if given is not None and not isinstance(given, str):
        if getattr(given, "tokenizer", None) is None:
            raise MethodError(
                f"verify needs a processor with a tokenizer, got {type(given).__name__}. Pass "
                "processor=transformers.AutoProcessor.from_pretrained(...)."
            )
        return given
    from transformers import AutoProcessor

    where = given or anatomy.model.name_or_path
    try:
        if not where:
            raise OSError("the model does not say where it was loaded from")
        return AutoProcessor.from_pretrained(where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MethodError(
            f"verify reads and writes text and finds no processor for it ({reason}). Name it: "
            "vlmfix.patch(model, 'verify', processor='FOLDER_OR_HUB_ID')."
        ) from error
