"""ICD: Instruction Contrastive Decoding (Wang et al., Findings of ACL 2024, arXiv 2403.18715)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmfix.decoding.base import OtherTokens
from vlmfix.decoding.words import ReadsWords, place_behind_images
from vlmfix.errors import MethodError
from vlmfix.methods.parameters import parameter
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class ICD(ReadsWords):
    """Contrast the answer with that to a disturbed instruction: ``(1 + alpha) l - alpha l'``.

    The image is the same in both branches. In the other one, ``disturbance`` stands directly behind the last image,
    before the question, as in SID's release, which ran it on all of its models. ICD's own release puts it in the place
    of LLaVA's system message, and of the instruction to InstructBLIP's Q-Former. Only tokens with
    ``l >= max l + ln(beta)`` may be chosen.

    The authors report the best of five sentences.
    """

    name = "icd"
    paper = "arXiv 2403.18715"
    summary = "contrasts the answer with that to a disturbed instruction"

    disturbance: str | Sequence[int] = parameter(
        "You are a confused objects detector to provide a fuzzy overview or impression of the image.",
        expected="a text, or a list of token ids",
        help="What disturbs the instruction: text, or token ids. Default: one of the released sentences.",
    )

    def validate(self) -> None:
        """Check the disturbance."""
        super().validate()
        self.require(bool(self.disturbance), "disturbance", "a text, or a list of token ids")

    @property
    def needs_words(self) -> bool:
        """Not for token ids."""
        return isinstance(self.disturbance, str)

    def bind(self, anatomy: Anatomy) -> ICD:
        """Check the model, and load its tokenizer.

        Raises:
            MethodError: No second branch can be run, images are no tokens, or the tokenizer cannot be found.
        """
        if not anatomy.image_token_ids:
            raise MethodError(
                f"icd disturbs the text behind the image, and in {type(anatomy.model).__name__} no token of a prompt "
                "says where an image is. Choose another method; vlmfix.list_methods() lists them."
            )
        return super().bind(anatomy)

    def other_tokens(self, ids: Sequence[int], is_image: Sequence[bool]) -> OtherTokens:
        """Disturb the instruction. In a further turn without an image, it has been."""
        if not any(is_image):
            return OtherTokens(tuple(ids), tuple(range(len(ids))))
        return self.inserted(ids, place_behind_images(is_image), self.disturbance)
