"""In the place of a model's ``generate``: answers are judged when they are finished, streamed ones by the sentence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList

from vlmfix.errors import UnsupportedFeatureError
from vlmfix.model.anatomy import FORWARD_KWARG
from vlmfix.observe.ask import end_token_ids
from vlmfix.observe.words import decode, token_ends
from vlmfix.patching import find_patch
from vlmfix.prefix import prefix_left_behind
from vlmfix.verification.judge import Judge, Texts
from vlmfix.verification.phrases import Sentence, read_sentences
from vlmfix.verification.said import PROCESSORS, Heard, LogsFirst, SaidLog

if TYPE_CHECKING:
    from vlmfix.engine.status import Counters

PER_TOKEN = ("scores", "logits", "attentions", "hidden_states")
"""What ``generate`` can return for every token that the model chose."""


class GenerateVerified:
    """Stands in for a model's ``generate``.

    Args:
        stock: What generates without it.
        judge: Judges the answers.
        index: Number of the method in its patch.
        counters: Counts the phrases that are left out.
    """

    def __init__(self, stock: Any, judge: Judge, index: int, counters: Counters) -> None:
        self.stock = stock
        self._judge = judge
        self._index = index
        self._counters = counters
        model = judge.questioner.anatomy.model
        collects = getattr(model, PROCESSORS, None)
        self.stand_ins = {**({PROCESSORS: LogsFirst(collects)} if collects else {}), "generate": self}
        """What stands in for methods of the model."""

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own ``generate``."""
        return inspect.signature(self.stock)

    def note(self) -> str:
        """Return what was done so far."""
        return f"verify: {self._judge.totals}" if self._judge.totals.asked else ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, and leave out what is doubted; prompts without an image get the model's own answer.

        Raises:
            UnsupportedFeatureError: Something is asked for that goes with the tokens the model chose, or the pictures
                or tokens of the prompt are not given.
        """
        if kwargs.get(FORWARD_KWARG, self) is None:
            return self.stock(*args, **kwargs)
        input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        anatomy = self._judge.questioner.anatomy
        if input_ids is None:
            raise UnsupportedFeatureError("verify needs the prompt's tokens to find the image. Pass input_ids.")
        has_image = anatomy.is_image(input_ids).any(1)
        if not bool(has_image.any()):
            return self.stock(*args, **kwargs)
        self._check(kwargs)
        images = _image_inputs(kwargs, input_ids, has_image)
        answers = _Answers(self._judge, images, has_image, input_ids.shape[1])
        is_tensor = not self._option(kwargs, "return_dict_in_generate")
        if kwargs.get("past_key_values") is None and self._is_alone:  # the cache holds the stock model's prompt
            answers.reads_cache = kwargs["return_dict_in_generate"] = True
        streamer = kwargs.get("streamer")
        if streamer is not None:
            kwargs["streamer"] = VerifyingStreamer(streamer, answers)
        elif answers.reads_cache:
            answers.log = SaidLog()
            kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or ()), answers.log])
        before = self._judge.totals.left_out
        out = self.stock(*args, **kwargs)
        found = answers.edited(out)
        self._counters.count(self._index, torch.tensor(self._judge.totals.left_out - before))
        return found.sequences if is_tensor and not isinstance(found, torch.Tensor) else found

    @property
    def _is_alone(self) -> bool:
        """Whether no other method of the patch acts."""
        patch = find_patch(self._judge.questioner.anatomy.model)
        return patch is not None and all(each.rewrites_answers or each.is_identity for each in patch.methods)

    def _option(self, kwargs: Mapping[str, Any], name: str) -> Any:
        config = kwargs.get("generation_config") or self._judge.questioner.anatomy.model.generation_config
        return kwargs.get(name, getattr(config, name, False))

    def _check(self, kwargs: Mapping[str, Any]) -> None:
        wanted = [f"output_{name}" for name in PER_TOKEN if self._option(kwargs, f"output_{name}")]
        if wanted and self._option(kwargs, "return_dict_in_generate"):
            raise UnsupportedFeatureError(
                f"verify leaves words out of an answer, and {wanted[0]} goes with the tokens that the model chose. "
                f"Leave it out, or ask the stock model: model.generate(..., vlmfix=None, {wanted[0]}=True)."
            )


def _image_inputs(kwargs: Mapping[str, Any], input_ids: torch.Tensor, has_image: torch.Tensor) -> dict[str, Any]:
    """Return the inputs of the prompts that show an image."""
    mask = kwargs.get("attention_mask")
    found = {"input_ids": input_ids[has_image]}
    found["attention_mask"] = torch.ones_like(found["input_ids"]) if mask is None else mask[has_image]
    pictures = {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, torch.Tensor)
        and name not in ("input_ids", "inputs", "attention_mask", "position_ids")
        and ("pixel" in name or "image" in name)
    }
    if not pictures:
        raise UnsupportedFeatureError(
            "verify asks about the image, and this call of generate brings none (a further turn on a cache?). Pass "
            "what the processor gave, pixel_values too, or take this answer from the stock model: "
            "model.generate(..., vlmfix=None)."
        )
    types = kwargs.get("token_type_ids")
    if isinstance(types, torch.Tensor) and types.shape == input_ids.shape:
        found["token_type_ids"] = types[has_image]
    return {**found, **pictures}


class _Answers:
    """The answers of one call of ``generate``.

    Args:
        judge: Judges.
        inputs: The inputs of the prompts with an image.
        has_image: Which prompts of the call these are, bool ``[batch]``.
        prompt_length: Columns of the prompts.
    """

    def __init__(self, judge: Judge, inputs: dict[str, Any], has_image: torch.Tensor, prompt_length: int) -> None:
        self.judge = judge
        self._inputs = inputs
        self._rows = has_image.nonzero().flatten().tolist()
        self._batch = len(has_image)
        self.prompt_length = prompt_length
        self.ends = end_token_ids(judge.questioner.anatomy.model)
        self.streamed: list[int] | None = None
        self.reads_cache = False
        self.log: SaidLog | None = None

    def texts(self, per_prompt: int = 1, cache: Any = None, logs: Sequence[Sequence[float]] | None = None) -> Texts:
        """Read the images, or find them read in a cache, and return what judges answers: several for each prompt."""
        questioner, prefix = self.judge.questioner, None
        if cache is not None and self.reads_cache:
            prefix = prefix_left_behind(questioner.anatomy, self._inputs, cache, self._rows, self._batch)
        looked: Any = questioner.look(self._inputs, prefix)
        looked = looked if per_prompt == 1 else Repeated(looked, per_prompt)
        return Texts(self.judge, Heard(looked, logs) if logs else looked, per_prompt * len(self._rows))

    def edited(self, out: Any) -> Any:
        """Return the result of ``generate`` with edited sequences; untouched where nothing is doubted."""
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        per_prompt = len(sequences) // self._batch
        rows = [row * per_prompt + n for row in self._rows for n in range(per_prompt)]
        if self.streamed is not None:
            answer = sequences[rows[0], self.prompt_length :].tolist()
            return out if self.streamed == answer else self._with(out, sequences, {rows[0]: self.streamed})
        given = {row: self.cut(sequences[row, self.prompt_length :].tolist()) for row in rows}
        tokenizer = self.judge.tokenizer
        read = {row: read_sentences(decode(tokenizer, ids)) for row, (ids, _) in given.items()}
        if not any(phrase.is_object for each in read.values() for sentence in each for phrase in sentence.phrases):
            return out
        noted = self.log.of(sequences[:, self.prompt_length :], sequences) if self.log else None
        logs = noted and [noted[row] for row in rows]
        texts = self.texts(per_prompt, getattr(out, "past_key_values", None), logs)
        texts.judge([given[row][0] for row in rows], [read[row] for row in rows])
        changed: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if not texts.has_doubts(place):
                continue
            ids, rest = given[row]
            kept: list[int] = []
            pieces = Pieces(tokenizer, ids, read[row], kept)
            for number in range(len(read[row])):
                kept += pieces.edited(texts, place, number, is_last=number == len(read[row]) - 1)
            if kept != ids:
                changed[row] = [*kept, *rest]
        if not changed:
            return out
        return self._with(out, sequences, changed)

    def cut(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split an answer into its text and the token that ends it, without padding."""
        stop = next((at for at, token in enumerate(ids) if token in self.ends), len(ids))
        return ids[:stop], ids[stop : stop + 1]

    def _with(self, out: Any, sequences: torch.Tensor, changed: Mapping[int, list[int]]) -> Any:
        prompts, answers = sequences[:, : self.prompt_length], sequences[:, self.prompt_length :].tolist()
        filler = next((row[-1] for row in answers if row and row[-1] not in self.ends), 0)
        config = self.judge.questioner.anatomy.model.generation_config
        filler = config.pad_token_id if isinstance(config.pad_token_id, int) else filler
        kept = [changed.get(row, [*self.cut(ids)[0], *self.cut(ids)[1]]) for row, ids in enumerate(answers)]
        length = max(map(len, kept))
        padded = [ids + [filler] * (length - len(ids)) for ids in kept]
        new = torch.cat([prompts, torch.tensor(padded, dtype=sequences.dtype, device=sequences.device)], dim=1)
        if isinstance(out, torch.Tensor):
            return new
        cache = getattr(out, "past_key_values", None)
        if cache is not None:
            same = [_common(ids, before) for ids, before in zip(kept, answers, strict=True)]
            surplus = cache.get_seq_length() - (self.prompt_length + min(same))
            if surplus > 0 and hasattr(cache, "crop"):
                cache.crop(-surplus)
            elif surplus > 0:
                out["past_key_values"] = None
        out["sequences"] = new
        return out


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


class Repeated:
    """Images that several answers each are about, one behind the other."""

    def __init__(self, looked: Any, times: int) -> None:
        self._looked = looked
        self._times = times

    def ask(self, names: Sequence[Sequence[str]]) -> Any:
        """Ask for the words of all answers about an image together."""
        times = self._times
        merged = [
            [name for each in names[start : start + times] for name in each] for start in range(0, len(names), times)
        ]
        found = self._looked.ask(merged)
        return [{name: found[row // times][name] for name in each} for row, each in enumerate(names)]

    def said(self, answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score each answer behind its prompt."""
        by_number = [self._looked.said(answers[n :: self._times]) for n in range(self._times)]
        return [by_number[row % self._times][row // self._times] for row in range(len(answers))]


class Pieces:
    """The tokens of an answer, sentence by sentence.

    Args:
        tokenizer: The tokenizer.
        ids: The answer's tokens.
        sentences: Its sentences.
        written: The tokens of the edited answer so far; whoever asks for more appends them.
    """

    def __init__(
        self, tokenizer: Any, ids: Sequence[int], sentences: Sequence[Sentence], written: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(ids)
        self._text = decode(tokenizer, ids)
        self._sentences = sentences
        self._ends = token_ends(tokenizer, ids, self._text)
        self._written = written

    def edited(self, texts: Texts, row: int, number: int, *, is_last: bool) -> list[int]:
        """Return the tokens of a judged sentence as they are after the edit; sentences must come in their order."""
        sentence = self._sentences[number]
        before = self._sentences[number - 1].end if number else -1
        stop = len(self._text) if is_last else sentence.end
        own = [token for token, end in zip(self._ids, self._ends, strict=True) if before < end <= stop]
        said = texts.edit(row, self._text, sentence)
        if said != self._text[sentence.start : sentence.end]:
            own = self._spelled(self._text[max(before, 0) : sentence.start], said) if said else []
        return own

    def _spelled(self, gap: str, said: str) -> list[int]:
        """Return the tokens of a text behind what was written; some tokenizers put a space before it by themselves."""
        written = decode(self._tokenizer, self._written)
        gap = gap if written else ""
        for text in (gap + said, said):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if decode(self._tokenizer, [*self._written, *ids]) == written + gap + said:
                break
        return list(ids)


class VerifyingStreamer:
    """Holds tokens back until their sentence is complete and judged, then hands it on to another streamer.

    Args:
        streamer: The user's streamer, for one answer.
        answers: The call of ``generate``.
    """

    def __init__(self, streamer: Any, answers: _Answers) -> None:
        self._streamer = streamer
        self._answers = answers
        self._ids: list[int] = []
        self._written: list[int] = []
        self._texts: Texts | None = None
        self._done = 0
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token after the other."""
        if self._is_prompt:
            self._is_prompt = False
            self._streamer.put(value)
            return
        self._ids += value.flatten().tolist()
        self._hand_on(is_over=False)

    def end(self) -> None:
        """Judge what is left."""
        self._hand_on(is_over=True)
        self._emit(self._answers.cut(self._ids)[1])
        self._answers.streamed = self._written
        self._streamer.end()

    def _hand_on(self, *, is_over: bool) -> None:
        """Judge and hand on the sentences that are complete: all but the last, until the answer is over."""
        ids, _ = self._answers.cut(self._ids)
        tokenizer = self._answers.judge.tokenizer
        sentences = read_sentences(decode(tokenizer, ids))
        complete = len(sentences) if is_over else len(sentences) - 1
        if complete <= self._done:
            return
        if self._texts is None:
            self._texts = self._answers.texts()
        self._texts.judge([ids], [sentences[self._done : complete]])
        pieces = Pieces(tokenizer, ids, sentences, self._written)
        for number in range(self._done, complete):
            self._emit(pieces.edited(self._texts, 0, number, is_last=is_over and number == len(sentences) - 1))
        self._done = complete

    def _emit(self, tokens: Sequence[int]) -> None:
        self._written += tokens
        for token in tokens:
            self._streamer.put(torch.tensor([token]))
