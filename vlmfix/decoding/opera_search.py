"""OPERA's search in the place of ``generate``: beams that look a token ahead and go back where attention is stuck."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.generation import GenerateBeamDecoderOnlyOutput

from vlmfix.decoding.beam_search import Beams
from vlmfix.decoding.branch import TOKEN_TYPES
from vlmfix.decoding.caches import is_plain, with_new_layers
from vlmfix.decoding.opera import OPERA
from vlmfix.decoding.other_image import is_image_argument
from vlmfix.engine.forwards import StockForward
from vlmfix.engine.places import passed_by
from vlmfix.engine.plan import PatchedSite
from vlmfix.engine.status import Counters
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.sequence import state_of
from vlmfix.model.anatomy import FORWARD_KWARG, Anatomy
from vlmfix.model.attention import AttentionCall, explicit_scores, masked_softmax

NOT_BESIDE_IT = (
    *("assistant_model", "prompt_lookup_num_tokens", "custom_generate"),
    *("streamer", "past_key_values", "num_return_sequences"),
)
"""Arguments of ``generate`` that ask for something else than the best beam of a search from an empty cache."""


class GenerateWithOpera:
    """Stands in for a model's ``generate``."""

    def __init__(self, anatomy: Anatomy, method: OPERA, index: int, counters: Counters) -> None:
        self._anatomy = anatomy
        self._method = method
        self._index = index
        self._counters = counters

    def stand_ins(self) -> dict[str, Any]:
        """Return the methods of the model that are replaced."""
        return {"generate": self}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Search with OPERA; a prompt without an image gets plain beams, and ``vlmfix=None`` the stock ``generate``.

        Raises:
            UnsupportedFeatureError: Anything but beam search over one prompt.
        """
        model = self._anatomy.model
        stock = type(model).generate
        if kwargs.get(FORWARD_KWARG, self) is None:
            return stock(model, *args, **kwargs)
        for name in NOT_BESIDE_IT:
            if kwargs.get(name) is not None and kwargs[name] != 1:
                raise UnsupportedFeatureError(
                    f"opera searches beams by itself, from an empty cache, for the best. Leave {name} out."
                )
        input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if input_ids is None:
            raise UnsupportedFeatureError("opera needs the prompt's tokens to find the image. Pass input_ids.")
        num_beams = self._num_beams(kwargs.pop("num_beams", None), kwargs.get("generation_config"))
        if not self._has_image(input_ids, kwargs):
            return stock(model, *args, num_beams=num_beams, **kwargs)
        if input_ids.shape[0] != 1:
            raise UnsupportedFeatureError(
                f"opera searches for one prompt at a time, and this batch has {input_ids.shape[0]}. Call generate for "
                "each, or set the batch size to 1."
            )
        config = kwargs.get("generation_config") or model.generation_config
        if kwargs.get("stop_strings", getattr(config, "stop_strings", None)):
            raise UnsupportedFeatureError(
                "opera cannot stop at strings: generate gives no tokenizer to a search in the place of its own. Pass "
                "stopping_criteria=[StopStringCriteria(tokenizer, [...])] instead, and leave stop_strings out."
            )
        # generate prepares one sequence, not beams, and would warn of settings that mean nothing without beams.
        of_beams = {name: kwargs.pop(name) for name in ("early_stopping", "length_penalty") if name in kwargs}

        def search(model: Any, input_ids: torch.Tensor, **options: Any) -> Any:
            for name, value in of_beams.items():
                setattr(options["generation_config"], name, value)
            return self.search(num_beams, input_ids, **options)

        return stock(model, *args, num_beams=1, custom_generate=search, **kwargs)

    def search(self, num_beams: int, input_ids: torch.Tensor, **options: Any) -> Any:
        """Search once, with what ``generate`` hands to a function in the place of its own search."""
        found = Search(self._anatomy, self._method, num_beams, input_ids, **options)
        result = found.run()
        self._counters.count(self._index, torch.tensor(found.num_candidates))
        self._counters.count(-1, torch.tensor(found.num_steps))
        return result

    def _num_beams(self, asked: int | None, config: Any) -> int:
        """Take the caller's number, else the model's own. One beam is what callers pass by habit: no wish of theirs."""
        config = config or self._anatomy.model.generation_config
        wishes = (asked, getattr(config, "num_beams", None), self._method.num_beams)
        return int(next(number for number in wishes if number is not None and number > 1))

    def _has_image(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """A placeholder that is written out in a prompt without a picture is text."""
        is_given = any(name == "mm_encoder_outputs" or is_image_argument(name, kwargs[name]) for name in kwargs)
        return is_given and bool(self._anatomy.is_image(input_ids).any())


class RowRecorder(StockForward):
    """Keeps the last row's weights in one layer.

    Attributes:
        row: fp32 ``[rows, keys]``, the maximum over heads divided by its sum; ``None`` until the layer is reached.
    """

    def __init__(self) -> None:
        self.row: torch.Tensor | None = None

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the base kernel and keep the last row's weights."""
        q_len = call.query.shape[2]
        weights = masked_softmax(*explicit_scores(call, q_len - 1, q_len))[:, :, 0]
        largest = weights.amax(1)
        self.row = largest / largest.sum(-1, keepdim=True)
        return call.base()


class Look(NamedTuple):
    """What a forward of the beams shows.

    Attributes:
        logits: Of the next token, fp32 ``[beams, vocab]``.
        to_prompt: Attention of the last token to the prompt, fp32 ``[beams, prompt]``.
        to_answer: Its attention to the answer, itself included, fp32 ``[beams, generated]``.
    """

    logits: torch.Tensor
    to_prompt: torch.Tensor
    to_answer: torch.Tensor


@dataclass
class Step:
    """The search before a token is chosen, when ``beams.num_generated`` tokens have been.

    Attributes:
        beams: The beams.
        sums: Logarithms of the column products, fp32 ``[beams, generated]``.
        peaks: The column of the maximum per beam, the commonest among its candidates: int64 ``[beams]``. It stays what
            it was when a token was first chosen here, also after a return.
        chosen: The (beam, token) pairs taken next, once they are.
        rejected: Those taken before each return to this step.
    """

    beams: Beams
    sums: torch.Tensor
    peaks: torch.Tensor | None = None
    chosen: tuple[tuple[int, int], ...] = ()
    rejected: tuple[tuple[int, int], ...] = ()


class Search:
    """One search.

    Attributes:
        steps: Every step so far. A return drops those behind it, and with them what they remembered.
        logits: Of the beams' next token, fp32 ``[beams, vocab]``.
        num_candidates: Tokens looked ahead at, for the choices that were made from them.
        num_steps: Forwards of the beams.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        method: OPERA,
        num_beams: int,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> None:
        self.model, self.method, self.num_beams = anatomy.model, method, num_beams
        self.processor, self.criteria, self.config = logits_processor, stopping_criteria, generation_config
        self._check(model_kwargs.get("past_key_values"))
        output = self.model._prefill(input_ids, generation_config, model_kwargs)
        self.model_kwargs, self.prompt_length = model_kwargs, input_ids.shape[1]
        self.prompt_cache = output.past_key_values
        state = state_of(self.prompt_cache)
        assert state is not None
        self.image = state.image_mask[0]
        self.recorder = RowRecorder()
        self.cache = self._prompt_of_beams()
        self.logits = output.logits[:, -1].float().expand(num_beams, -1)
        self.steps = [Step(Beams.of(input_ids, num_beams), self.logits.new_zeros(num_beams, 0))]
        self.visits: Counter[int] = Counter()
        self.last_knot = self.num_candidates = self.num_steps = 0

    def _check(self, cache: Any) -> None:
        config = self.config
        if config.do_sample:
            raise UnsupportedFeatureError("opera returns the best beam and draws nothing. Pass do_sample=False.")
        wanted = [f"output_{name}" for name in ("attentions", "hidden_states", "logits")]
        if any(getattr(config, name, None) for name in wanted):
            raise UnsupportedFeatureError(
                f"opera goes back and forth and keeps no steps. Leave {', '.join(wanted)} out."
            )
        if getattr(config, "prefill_chunk_size", None) is not None or not hasattr(self.model, "_prefill"):
            raise UnsupportedFeatureError(
                "opera reads a prompt in one forward, by a step of generate that older versions do not have. Leave "
                "prefill_chunk_size unset, and install the latest: pip install -U transformers."
            )
        if not is_plain(cache):
            raise UnsupportedFeatureError(
                f"opera looks ahead on a cache that it can leave as it was, and {type(cache).__name__} is none of "
                "those that only grow. Leave cache_implementation and use_cache at their defaults."
            )

    def run(self) -> Any:
        """Search; return what ``generate`` returns: ids ``[1, length]``, or an object with them."""
        while True:
            step = self.steps[-1]
            if step.rejected:
                log_probs = self.method.choose_again(self.logits, step.rejected)
            else:
                candidates = self.logits.topk(self.method.num_attn_candidates, dim=-1).indices
                log_probs, step.peaks = self._look_ahead(step, candidates)
                if self._goes_back():
                    continue
                self.num_candidates += candidates.numel()
            beams, origins = step.beams.step(self.processor(step.beams.ids, log_probs), self.criteria, self.config)
            if beams.is_done:
                return self._result(beams)
            step.chosen = tuple(zip(origins.tolist(), beams.ids[:, -1].tolist(), strict=True))
            self.num_steps += 1
            self.cache.reorder_cache(origins)
            look = self._forward(beams.ids, self.cache)
            self.logits = look.logits
            self.steps.append(Step(beams, self.method.columns(look.to_answer, step.sums[origins])))

    def _look_ahead(self, step: Step, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the penalised log-probabilities, and per beam the commonest column of the maximum."""
        columns, images = [], []
        for tokens in candidates.T:  # the layers are copies: the cache itself stays as it is
            look = self._forward(torch.cat([step.beams.ids, tokens[:, None]], 1), with_new_layers(self.cache))
            columns.append(self.method.columns(look.to_answer, step.sums))
            images.append(look.to_prompt[:, self.image].sum(-1))
        largest = torch.stack(columns, 1).max(-1)
        looks, length = torch.stack(images, 1), step.beams.num_generated + 1
        log_probs = self.method.penalise(self.logits, candidates, largest.values, looks, length)
        return log_probs, largest.indices.mode(-1).values

    def _goes_back(self) -> bool:
        """Go back behind the column that the beams are stuck at, if they are and it can be left again."""
        peaks = torch.stack([step.peaks for step in self.steps if step.peaks is not None])
        place, now = int(peaks[-1].mode().values), len(self.steps) - 1
        if place + 1 >= now or not self.method.is_knot(peaks, place, self.last_knot):
            return False
        for position in (place + 1, place):
            if position > 0 and self.visits[position] < self.method.num_attn_candidates:
                self.visits[position] += 1
                self.last_knot = place
                self._return_to(position)
                return True
        return False

    def _return_to(self, position: int) -> None:
        """Take the search up again where ``position`` tokens had been generated."""
        step = self.steps[position]
        step.rejected, step.chosen = (*step.rejected, *step.chosen), ()
        del self.steps[position + 1 :]
        self.cache = self._prompt_of_beams()
        self.logits = self._forward(step.beams.ids, self.cache).logits

    def _prompt_of_beams(self) -> Any:
        """Return the prompt's cache, repeated for every beam."""
        cache = with_new_layers(self.prompt_cache)
        cache.batch_repeat_interleave(self.num_beams)
        return cache

    def _forward(self, ids: torch.Tensor, cache: Any) -> Look:
        """Run what a cache does not hold yet of ``ids`` ``[beams, length]``."""
        length = ids.shape[1]
        arguments = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=length - cache.get_seq_length(),
            **{
                **continued(self.model_kwargs, self.num_beams, length - self.prompt_length),
                "past_key_values": cache,
            },
        )
        self.recorder.row = None
        output = self.model(**{**arguments, "return_dict": True, FORWARD_KWARG: self.recorder})
        row = self.recorder.row
        if row is None:
            raise passed_by(self.model, ["the attention whose weights opera reads"])
        row = F.pad(row, (length - row.shape[1], 0))  # keys that have left a sliding window have no weight
        return Look(output.logits[:, -1].float(), *row.tensor_split([self.prompt_length], dim=1))

    def _result(self, beams: Beams) -> Any:
        score, ids = beams.best()
        if not self.config.return_dict_in_generate:
            return ids[None]
        scores = torch.tensor([score]) if self.config.output_scores else None
        return GenerateBeamDecoderOnlyOutput(sequences=ids[None], sequences_scores=scores)


def continued(prompt: dict[str, Any], num_beams: int, more: int) -> dict[str, Any]:
    """Return a prompt's arguments by token for its beams, ``more`` tokens longer; the others as they are."""
    longer = dict(prompt)
    for name in ("attention_mask", "position_ids", *TOKEN_TYPES):
        value = prompt.get(name)
        if value is None:
            continue
        following = value[..., -1:].repeat_interleave(more, -1)
        if name == "attention_mask":
            following = torch.ones_like(following)
        elif name == "position_ids":
            following = following + torch.arange(1, more + 1, device=value.device)
        elif name in TOKEN_TYPES[1:]:  # kinds of tokens, of which 0 is text
            following = torch.zeros_like(following)
        value = torch.cat([value, following], dim=-1)
        longer[name] = value.expand(*value.shape[:-2], num_beams, -1)
    return longer
