"""OPERA's search: ``generate`` of a patched model, with look-ahead and roll-back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.generation import GenerateBeamDecoderOnlyOutput

from vlmfix.decoding.caches import is_plain, with_new_layers
from vlmfix.decoding.opera import FIRST, OPERA
from vlmfix.decoding.other_prompt import TOKEN_TYPES
from vlmfix.errors import UnsupportedFeatureError
from vlmfix.methods.views import state_of
from vlmfix.model.anatomy import FORWARD_KWARG
from vlmfix.model.attention import AttentionCall, explicit_scores, masked_softmax

if TYPE_CHECKING:
    from vlmfix.engine.plan import Site
    from vlmfix.engine.status import Counters
    from vlmfix.model.anatomy import Anatomy


NEVER = -1e9


@dataclass
class Beams:
    """The beams of one prompt.

    Attributes:
        ids: int64 ``[beams, length]``, the prompt included.
        scores: Their summed log-probabilities, fp32 ``[beams]``.
        prompt_length: Tokens of the prompt.
        finished: The best finished sequences with their scores, best first.
        may_improve: Whether a running beam may still beat the finished ones.
        is_done: Whether the search is over.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    prompt_length: int
    finished: tuple[tuple[float, torch.Tensor], ...] = ()
    may_improve: bool = True
    is_done: bool = False

    @classmethod
    def of(cls, input_ids: torch.Tensor, num_beams: int) -> Beams:
        """Begin with a prompt ``[1, length]``: the first beam alone counts, for all are the same."""
        scores = torch.full((num_beams,), NEVER, device=input_ids.device)
        scores[0] = 0.0
        return cls(input_ids.repeat(num_beams, 1), scores, input_ids.shape[1])

    @property
    def num_generated(self) -> int:
        """Tokens behind the prompt."""
        return self.ids.shape[1] - self.prompt_length

    def step(self, log_probs: torch.Tensor, criteria: Any, config: Any) -> tuple[Beams, torch.Tensor]:
        """Take the best continuations.

        Args:
            log_probs: Of every next token, processed, fp32 ``[beams, vocab]``.
            criteria: The stopping criteria.
            config: The generation config.

        Returns:
            The beams behind one more token, and which beam each continues: int64 ``[beams]``.
        """
        num_beams, vocab = log_probs.shape
        num_ends = 0 if config._eos_token_tensor is None else len(config._eos_token_tensor)
        kept = max(2, 1 + num_ends) * num_beams
        best, places = (log_probs + self.scores[:, None]).flatten().topk(kept)
        origins = places // vocab
        ids = torch.cat([self.ids[origins], (places % vocab)[:, None]], dim=1)
        ends = criteria(ids, None)
        running = (best + ends.float() * NEVER).topk(num_beams)
        beams = dataclasses.replace(self, ids=ids[running.indices], scores=running.values)
        beams._finish(ids[:num_beams], best[:num_beams], ends[:num_beams], config)
        beams.is_done = beams._is_over(bool(ends.all()), config)
        return beams, origins[running.indices]

    def _finish(self, ids: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor, config: Any) -> None:
        """Keep finished sequences; only those among the best ``num_beams`` continuations count."""
        num_beams = len(self.scores)
        is_closed = not self.may_improve or (len(self.finished) == num_beams and config.early_stopping is True)
        if is_closed or not bool(ends.any()):
            return
        length = float(self.num_generated) ** config.length_penalty
        new = [(float(scores[row]) / length, ids[row]) for row in ends.nonzero().flatten().tolist()]
        self.finished = tuple(sorted([*self.finished, *new], key=lambda each: -each[0])[:num_beams])

    def _is_over(self, all_end: bool, config: Any) -> bool:
        is_full = len(self.finished) == len(self.scores)
        if is_full:
            at_most = config.early_stopping == "never" and config.length_penalty > 0
            length = config.max_length - self.prompt_length if at_most else self.num_generated
            best = float(self.scores[0]) / float(length) ** config.length_penalty
            self.may_improve = self.may_improve and best > self.finished[-1][0]
        return not self.may_improve or (is_full and config.early_stopping is True) or all_end

    def best(self) -> tuple[float, torch.Tensor]:
        """Return the best sequence with its score: a finished one, else a running one."""
        if self.finished:
            return self.finished[0]
        return float(self.scores[0]), self.ids[0]


class BeamsLookingAhead:
    """Stands in for a model's ``generate``."""

    def __init__(self, anatomy: Anatomy, method: OPERA, index: int, counters: Counters) -> None:
        self._anatomy = anatomy
        self._method = method
        self._index = index
        self._counters = counters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Search with the method; a prompt without an image gets plain beams.

        Raises:
            UnsupportedFeatureError: Anything but beam search over one prompt.
        """
        model = self._anatomy.model
        others = ("assistant_model", "custom_generate", "streamer", "prompt_lookup_num_tokens", "past_key_values")
        for name in (*others, "num_return_sequences"):
            if kwargs.get(name) is not None and kwargs[name] != 1:
                raise UnsupportedFeatureError(
                    f"opera searches beams by itself, from an empty cache, for the best. Leave {name} out."
                )
        config = kwargs.get("generation_config") or model.generation_config
        num_beams = self._num_beams(kwargs.pop("num_beams", None), config)
        input_ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if input_ids is None:
            raise UnsupportedFeatureError("opera needs the prompt's tokens to find the image. Pass input_ids.")
        stock = type(model).generate
        ids = torch.tensor(self._anatomy.image_token_ids, device=input_ids.device)
        if not bool(torch.isin(input_ids, ids).any()):
            return stock(model, *args, num_beams=num_beams, **kwargs)
        if input_ids.shape[0] != 1:
            raise UnsupportedFeatureError(
                f"opera searches for one prompt at a time, and this batch has {input_ids.shape[0]}. Call generate for "
                "each, or set the batch size to 1."
            )

        flags = {name: kwargs.pop(name) for name in ("early_stopping", "length_penalty") if name in kwargs}

        def search(model: Any, input_ids: torch.Tensor, **options: Any) -> Any:
            for name, value in flags.items():  # of beams, which generate is not told of
                setattr(options["generation_config"], name, value)
            return Search(self._anatomy, self._method, num_beams, input_ids, **options).run(self._count)

        return stock(model, *args, num_beams=1, custom_generate=search, **kwargs)

    def _num_beams(self, asked: int | None, config: Any) -> int:
        if asked == 1:
            raise UnsupportedFeatureError(
                "opera is a beam search, and num_beams=1 asks for greedy decoding or sampling. Leave num_beams out, or "
                "vlmfix.unpatch(model) first."
            )
        given = getattr(config, "num_beams", None) or 1
        return int(asked or (given if given > 1 else self._method.num_beams))

    def _count(self, candidates: int, steps: int) -> None:
        self._counters.count(self._index, torch.tensor(candidates))
        self._counters.count(-1, torch.tensor(steps))


class RowRecorder:
    """Takes the place of a ``Forward``: plain attention, and the last row of one layer kept.

    Attributes:
        row: fp32 ``[rows, keys]``, the maximum over heads divided by its sum.
    """

    def __init__(self) -> None:
        self.row = torch.empty(0)

    def before_layer(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Nothing is read there."""

    def after_layer(self, site: Site) -> None:
        """Nor there."""

    def attend(self, site: Site, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the base kernel and keep the last row's weights."""
        q_len = call.query.shape[2]
        weights = masked_softmax(*explicit_scores(call, q_len - 1, q_len))[:, :, 0]
        largest = weights.amax(1)
        self.row = largest / largest.sum(-1, keepdim=True)
        return call.base()


@dataclass
class Step:
    """The state of the search before a token is chosen.

    Attributes:
        beams: The beams.
        sums: Logarithms of the column products, fp32 ``[beams, generated]``.
        chosen: The (beam, token) pairs taken next, once they are.
        peaks: Where the maximum was: per beam, the commonest among its candidates.
    """

    beams: Beams
    sums: torch.Tensor
    chosen: tuple[tuple[int, int], ...] = ()
    peaks: torch.Tensor | None = None


class Search:
    """One search."""

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
        self.prompt_cache = output.past_key_values
        state = state_of(self.prompt_cache)
        assert state is not None
        self.image = state.image_mask[0]
        self.prompt_length = input_ids.shape[1]
        self.model_kwargs = model_kwargs
        self.recorder = RowRecorder()
        self._length = self.prompt_length
        self.logits = output.logits[:, -1].float().expand(num_beams, -1)
        self.cache = self._repeated()
        empty = torch.zeros(num_beams, 0, device=self.logits.device)
        self.steps = [Step(Beams.of(input_ids, num_beams), empty)]
        self.visits: dict[int, int] = {}
        self.rejected: dict[int, set[tuple[int, int]]] = {}
        self.last_return = 0
        self.chooses_freely = False
        self.num_candidates = self.num_steps = 0

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

    def _repeated(self) -> Any:
        cache = with_new_layers(self.prompt_cache)
        cache.batch_repeat_interleave(self.num_beams)
        return cache

    def run(self, count: Any) -> Any:
        """Search.

        Args:
            count: Called with the numbers of candidates and of steps.

        Returns:
            What ``generate`` returns: ids ``[1, length]``, or an object with them.
        """
        while True:
            step = self.steps[-1]
            if self.chooses_freely:
                scored = self._without_rejected(step)
                self.chooses_freely = False
            else:
                candidates = self.logits.topk(self.method.num_attn_candidates, dim=-1).indices
                scored, step.peaks, place = self._look_ahead(step, candidates)
                if self._goes_back(place):
                    continue
                self.num_candidates += candidates.numel()
            log_probs = self.processor(step.beams.ids, scored.log_softmax(-1) if self.is_official else scored)
            beams, origins = step.beams.step(log_probs, self.criteria, self.config)
            step.chosen = tuple(zip(origins.tolist(), beams.ids[:, -1].tolist(), strict=True))
            if beams.is_done:
                count(self.num_candidates, self.num_steps)
                return self._result(beams)
            self._advance(beams, origins, step.sums[origins])

    @property
    def is_official(self) -> bool:
        """Whether scores are normalised over the candidates."""
        return self.method.mode == "official"

    def _advance(self, beams: Beams, origins: torch.Tensor, sums: torch.Tensor) -> None:
        self.num_steps += 1
        self.cache.reorder_cache(origins)
        self.logits = self._forward(beams.ids, self.cache)
        self.steps.append(Step(beams, self.method.columns(self._answer_part(), sums)))

    def _look_ahead(self, step: Step, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return the penalised scores, the commonest place of the maximum per beam, and that of all beams."""
        peaks, places, looks = [], [], []
        for tokens in candidates.T:
            self._forward(
                torch.cat([step.beams.ids, tokens[:, None]], dim=1), with_new_layers(self.cache)
            )  # leaves the cache as it is
            found = self.method.columns(self._answer_part(), step.sums).max(-1)
            peaks.append(found.values)
            places.append(found.indices)
            looks.append(self._padded()[:, : self.prompt_length][:, self.image].sum(-1))
        length = step.beams.num_generated + 1
        scored = self.method.score(self.logits, candidates, torch.stack(peaks, 1), torch.stack(looks, 1), length)
        commonest = torch.stack(places, 1).mode(-1).values
        return scored, commonest, int(commonest.mode().values)

    def _goes_back(self, place: int) -> bool:
        """Go back behind a place that has been the maximum too often, if it has."""
        threshold, now = self.method.threshold, self.steps[-1].beams.num_generated
        if threshold is None:
            return False
        peaks = [step.peaks for step in self.steps if step.peaks is not None]
        times = (torch.stack(peaks) == place).sum(0)
        least = threshold + 1 if self.is_official else threshold
        if bool((times < least).any()) or place < (FIRST if self.is_official else self.last_return):
            return False
        for position in (place + 1, place):
            if 0 < position < now and self.visits.get(position, 0) < self.method.num_attn_candidates:
                self.visits[position] = self.visits.get(position, 0) + 1
                self.last_return = place
                self._return_to(position)
                return True
        return False

    def _return_to(self, position: int) -> None:
        """Take the search up again where ``position`` tokens had been generated."""
        step = self.steps[position]
        self.rejected.setdefault(position, set()).update(step.chosen)
        self.steps = [*self.steps[:position], dataclasses.replace(step, chosen=(), peaks=None)]
        self.cache = self._repeated()
        self.logits = self._forward(step.beams.ids, self.cache)
        self.chooses_freely = True

    def _without_rejected(self, step: Step) -> torch.Tensor:
        """Return logits of the whole vocabulary, out of reach for what has been chosen here before."""
        logits = self.logits.clone()
        lowest = logits.amin() - 1000.0
        for beam, token in self.rejected[step.beams.num_generated]:
            logits[beam, token] = lowest
        normalised: torch.Tensor = logits if self.is_official else logits.log_softmax(-1)
        return normalised

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Run what a cache does not hold yet of ``ids`` ``[beams, length]``: fp32 logits of what follows."""
        self._length = ids.shape[1]
        more = self._length - self.prompt_length
        arguments = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=self._length - cache.get_seq_length(),
            **{**continued(self.model_kwargs, self.num_beams, more), "past_key_values": cache},
        )
        output = self.model(**{**arguments, "return_dict": True, FORWARD_KWARG: self.recorder})
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _padded(self) -> torch.Tensor:
        """Return the recorded row over all keys, fp32 ``[beams, length]``; those out of a window have no weight."""
        row = self.recorder.row
        padded: torch.Tensor = F.pad(row, (self._length - row.shape[1], 0))
        return padded

    def _answer_part(self) -> torch.Tensor:
        """Return the part of the recorded row over the answer, fp32 ``[beams, generated]``."""
        return self._padded()[:, self.prompt_length :]

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
        last = value[..., -1:]
        if name == "attention_mask":
            last = torch.ones_like(last)
        elif name in TOKEN_TYPES[1:]:  # of text
            last = torch.zeros_like(last)
        following = last.repeat_interleave(more, -1)
        if name == "position_ids":
            following = following + torch.arange(1, more + 1, device=last.device)
        value = torch.cat([value, following], dim=-1)
        longer[name] = value.expand(*value.shape[:-2], num_beams, -1)
    return longer
