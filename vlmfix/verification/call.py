"""``vlmfix.verify``: the object words of a text about an image, the evidence for each, the text without the rest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vlmfix.errors import MethodError
from vlmfix.model.anatomy import analyse
from vlmfix.observe.ask import left_as_found
from vlmfix.verification.ask import Cost, Questioner
from vlmfix.verification.judge import Judge, Word, judge_texts
from vlmfix.verification.leave_out import edited_sentences
from vlmfix.verification.phrases import read_sentences
from vlmfix.verification.verify import Verify, find_processor

PROMPT = "Please describe this image in detail."


@dataclass(frozen=True)
class Verification:
    """A text that was verified; ``str`` gives it without what is doubted.

    Attributes:
        text: The text without the phrases that are doubted: grammatical sentences, and no word that was not there but
            "There is".
        original: The text as given.
        words: Its object words, with their places in ``original`` and the evidence for each.
        cost: What asking has cost.
    """

    text: str
    original: str
    words: tuple[Word, ...]
    cost: Cost

    def __str__(self) -> str:
        """The text without what is doubted."""
        return self.text

    @property
    def doubted(self) -> tuple[str, ...]:
        """The objects that are left out."""
        return tuple(word.name for word in self.words if word.is_doubted)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)


def verify(
    model: object,
    processor: Any,
    image: Any,
    text: str,
    method: Verify | None = None,
    *,
    prompt: str = PROMPT,
) -> Verification:
    """Ask a model for every object that a text names in its image, whoever wrote the text.

    >>> found = vlmfix.verify(model, processor, picture, "A dog sits on a couch.")
    >>> found.text, found.doubted, found.words[0].asked

    The stock model is asked, whatever patch is on it, and left as it was found. Objects are found in English text by
    closed word lists, without a vocabulary of objects.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor, with a chat template; ``None``: the one saved with the model.
        image: A picture that the processor takes.
        text: The text.
        method: The rule, such as ``vlmfix.Verify(lost_per_false=0.2)``; ``lost_per_false=0`` leaves nothing out.
        prompt: What the text is an answer to; it decides how likely its words were.

    Returns:
        The words, the evidence, and the edited text.

    Raises:
        MethodError: There is no processor.
        UnsupportedFeatureError: The tokenizer has no single tokens for yes and no.
        UnsupportedModelError: The model is none that can be looked at.
        DataError: The processor rejects the image.
    """
    method = method or Verify()
    if not isinstance(method, Verify):
        raise MethodError(f"verify takes a rule such as vlmfix.Verify(lost_per_false=0.2), got {method!r}.")
    anatomy = analyse(model)
    processor = find_processor(anatomy, method.processor if processor is None else processor)
    questioner = Questioner(model, processor, method.question, method.batch_size)
    judge = Judge(questioner, method.rule)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    sentences = read_sentences(text)
    if not any(phrase.is_object for sentence in sentences for phrase in sentence.phrases):
        return Verification(text, text, (), questioner.cost)
    with left_as_found(anatomy.model):
        looked = questioner.look_at([image], prompt)
        texts = judge_texts(judge, looked, [ids], [text])
    words = texts.words(0, sentences)
    doubted = {word.name for word in words if word.is_doubted} if not method.is_identity else set()
    edited = text
    if doubted:
        edited = "".join(edited_sentences(text, sentences, lambda phrase: phrase.name in doubted)).strip()
    return Verification(edited, text, words, questioner.cost)
