"""What a patch hangs on a model: hooks that begin forwards, config copies that lead attention to vlmfix.

The only module that changes a model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmfix.decoding.base import DecodingMethod
from vlmfix.decoding.branch import PairedForward
from vlmfix.decoding.opera import OPERA
from vlmfix.decoding.opera_search import GenerateWithOpera
from vlmfix.decoding.other_image import OTHER_IMAGES_KWARG
from vlmfix.decoding.two_branches import TwoBranches
from vlmfix.engine.attention_function import ATTENTION_NAME, NameOfBoth
from vlmfix.engine.begin import ForwardBeginner
from vlmfix.engine.calls import every_row, parameter_names, refuse_replica, tokens_of
from vlmfix.engine.early_logits import EarlyHead
from vlmfix.engine.forwards import EditedForward
from vlmfix.engine.places import Places
from vlmfix.engine.plan import make_sites
from vlmfix.engine.stand_ins import (
    BEFORE_PROMPT,
    DRAFTS,
    PAGED,
    PREFILL,
    PROMPT_END_KWARG,
    ForwardWithHooks,
    GenerateByCall,
    RefuseDrafts,
    StandIns,
    TellingLength,
    TellingPrefill,
    forget_compiled_code,
    refuse_pages,
    refuse_remains,
)
from vlmfix.engine.status import Counters, Status, rounding_of
from vlmfix.engine.stream import make_block_hooks, make_layer_hooks, own_branch
from vlmfix.engine.tower import TowerHooks
from vlmfix.errors import UnsupportedFeatureError, VlmfixError
from vlmfix.methods.base import Method
from vlmfix.methods.sequence import state_of
from vlmfix.model.anatomy import FORWARD_KWARG, SITE_ATTRIBUTE, Anatomy
from vlmfix.model.uncopied import Uncopied
from vlmfix.recipes import placement_notes

PATCH_ATTRIBUTE = "_vlmfix_patch"
"""The attribute of a patched model, and of the models inside it, that holds the ``Patch``."""


logger = logging.getLogger("vlmfix")


_NO_DRAFTS = "This model takes no logits_to_keep, by which vlmfix tells drafted tokens from a prompt."


_NOT_WHOLE = (
    "somebody else has removed hooks of this patch, so that it cannot act; vlmfix.unpatch(model) removes the rest, and "
    "vlmfix.patch(...) puts it on anew"
)


@dataclasses.dataclass(eq=False)
class Context:
    """A ``with vlmfix.patched(...)`` block.

    Attributes:
        before: The patch that was on the model when it began.
        is_over: Whether it has ended.
    """

    before: Patch | None
    is_over: bool = False


class Patch:
    """Everything one ``patch`` call changes in a model, and the hooks that run while it is on.

    A call of the model takes this way. The hook ``before_forward`` runs before the outermost module, makes an
    ``EditedForward`` and adds it to the keyword arguments, with which transformers hands it down to every decoder layer
    and attention module. The patched attention modules look their attention function up in their own config copy, find
    vlmfix's, and it lets the forward edit. The hook ``after_forward`` settles what was learned and keeps it on the
    cache.

    Some models are called from inside: ``generate`` of BLIP-2 calls the language model, and a user may call
    ``model.model``. So the same two hooks are on every module that may be the outermost one; those further in find the
    forward that was already made.

    Args:
        anatomy: The model.
        methods: The bound methods, in the order of the path.
        choose: Returns a model with the same weights under other methods, for a single call of ``generate``.

    Attributes:
        variants: Models that ``choose`` made, by their methods.
        refusals: What was said to calls of ``generate`` that were refused so far.
        on_refusal: Is called with the error of each of them; what it raises takes the error's place.
    """

    def __init__(self, anatomy: Anatomy, methods: tuple[Method, ...], choose: Callable[[nn.Module, Any], Any]) -> None:
        self.anatomy = anatomy
        self.methods = methods
        self.choose = choose
        self.variants: Uncopied[str, Any] = Uncopied()
        self.counters = Counters(len(methods))
        self.early_head = EarlyHead(anatomy, methods, self.counters)
        self.tower_hooks = TowerHooks(anatomy, methods, self.counters)
        self.block_hooks = make_block_hooks(anatomy, methods, self.early_head)
        self.notes = tuple(
            note
            for method in methods
            for note in (*method.cautions(anatomy), *method.notes(anatomy), *placement_notes(method, anatomy))
        )
        self.refusals: list[str] = []
        self.on_refusal: Callable[[VlmfixError], None] | None = None
        self.owner: Context | None = None
        self.branches: TwoBranches | None = None
        self.search: GenerateWithOpera | None = None
        for number, method in enumerate(methods):
            if isinstance(method, OPERA):
                self.search = GenerateWithOpera(anatomy, method, number, self.counters)
            elif isinstance(method, DecodingMethod) and not method.is_identity:
                self.branches = TwoBranches(anatomy, method, number, self.counters)
        self.sites = tuple(make_sites(anatomy, methods, self.branches.branch_methods if self.branches else ()))
        self.beginner = ForwardBeginner(anatomy, methods, self.sites)
        self.layer_hooks = make_layer_hooks(self.sites)
        self.places = Places(anatomy, self.sites, self.block_hooks)
        self._handles: list[Any] = []
        self.stand_ins = StandIns()
        # Made once: a patch that is put on again after a ``with`` block leaves the model as it was.
        models = (anatomy.model, anatomy.language_model)
        name, telling = (
            (PREFILL, TellingPrefill) if hasattr(type(models[0]), PREFILL) else (BEFORE_PROMPT, TellingLength)
        )
        self._tell = name, {each: telling(each) for each in models if hasattr(type(each), name)}
        self._forward = ForwardWithHooks(self, anatomy.language_model, anatomy.language_model.forward)
        self._no_drafts = RefuseDrafts(anatomy.language_model, _NO_DRAFTS)
        self._generate: GenerateByCall | None = None
        self._rewriters: dict[int, Any] = {}
        self._hooked = tuple(dict.fromkeys([anatomy.model, anatomy.language_model, anatomy.inner]))
        self._parameters = {module: parameter_names(module) for module in self._hooked}
        # The stock model may read only the rows whose logits are wanted in layers with shared keys (Gemma 4).
        self._acts = any(not method.is_identity for method in methods)
        read = anatomy.sites if self.block_hooks else self.sites
        self._wants_every_row = self._acts and any(getattr(site.module, "is_kv_shared_layer", False) for site in read)

    # Attach and restore.

    @property
    def is_on(self) -> bool:
        """Whether it is on its model."""
        return self.anatomy.model.__dict__.get(PATCH_ATTRIBUTE) is self

    def attach(self) -> None:
        """Change the model; on any error, restore it and raise."""
        try:
            for module in self._hooked:
                module.__dict__[PATCH_ATTRIBUTE] = self
            self._lead_attention_here()
            for module in self._hooked:
                # Partials of bound methods follow ``copy.deepcopy(model)``. They hand on the module they were made for:
                # a replica of it (``DataParallel``) is another object with the same role.
                before, after = (functools.partial(hook, module) for hook in (self.before_forward, self.after_forward))
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(module.register_forward_hook(after, with_kwargs=True))
            self._stand_in_for_methods()
            parts: list[Any] = [self.beginner.images, self.beginner.vision, self.tower_hooks]
            for part in (*parts, *self.layer_hooks, *self.block_hooks):
                self._handles += part.attach() if part is not None else ()
            forget_compiled_code(self.anatomy.model)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the model. What others have changed since is left alone."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stand_ins.remove()
        for site in self.sites:
            if site.module.__dict__.get(SITE_ATTRIBUTE) is site:
                del site.module.__dict__[SITE_ATTRIBUTE]
                if site.module.config._attn_implementation_internal == ATTENTION_NAME:
                    site.module.config = site.config
        for module in self._hooked:
            if module.__dict__.get(PATCH_ATTRIBUTE) is self:
                del module.__dict__[PATCH_ATTRIBUTE]
        forget_compiled_code(self.anatomy.model)

    def _lead_attention_here(self) -> None:
        """Give each attention module a copy of its config that names vlmfix's attention function.

        The model's own config is left as it is: masks are made from it, and it names the stock kernel.
        """
        for site in self.sites:
            config = copy.copy(site.config)
            # The setter of ``_attn_implementation`` would check the name and set it in the vision tower too.
            config.__dict__["_attn_implementation_internal"] = (
                NameOfBoth(site.config) if site.selects_keys else ATTENTION_NAME
            )
            site.module.__dict__[SITE_ATTRIBUTE] = site
            site.module.config = config  # type: ignore[assignment]

    def _stand_in_for_methods(self) -> None:
        """Put objects in the place of methods of ``generate`` that go other ways than a forward with hooks."""
        model, language_model = self.anatomy.model, self.anatomy.language_model
        for each in dict.fromkeys([model, language_model]):
            self.stand_ins.put(each, PAGED, refuse_pages)
            name, telling = self._tell
            if each in telling:
                self.stand_ins.put(each, name, telling[each])
        # Decoding methods and early logits act behind the model's head, where only the hooks on the model itself are.
        # Where no attention module leads here, only the forward can notice that somebody removed the hooks.
        if self.branches is not None or self.early_head.mixing or (self._acts and not self.sites):
            self.stand_ins.put(language_model, "forward", self._forward)
        for decoder in (self.branches, self.search):
            for name, stand_in in decoder.stand_ins().items() if decoder else ():
                self.stand_ins.put(model, name, stand_in)
        if self.branches is None and not self.beginner.can_tell_drafts:
            self.stand_ins.put(language_model, DRAFTS, self._no_drafts)
        for number, method in enumerate(self.methods):
            if method.rewrites_answers and not method.is_identity:
                if number not in self._rewriters or self._rewriters[number].stock != model.generate:
                    self._rewriters[number] = method.rewriter(model.generate, number, self.counters)
                for name, stand_in in self._rewriters[number].stand_ins.items():
                    self.stand_ins.put(model, name, stand_in)
        if model.can_generate():
            if self._generate is None or self._generate.stock != model.generate:
                self._generate = GenerateByCall(self, model, model.generate)
            self.stand_ins.put(model, "generate", self._generate)

    def refuse(self, error: VlmfixError) -> None:
        """Remember a refused call of ``generate``."""
        self.refusals.append(str(error))
        if self.on_refusal is not None:
            self.on_refusal(error)

    # Hooks on the model.

    def before_forward(
        self, module: nn.Module, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add a forward to the keyword arguments, unless the caller or an outer hook chose one."""
        told = {name: kwargs[name] for name in (OTHER_IMAGES_KWARG, PROMPT_END_KWARG) if name in kwargs}
        if told:
            kwargs = {name: value for name, value in kwargs.items() if name not in told}
        if FORWARD_KWARG not in kwargs or kwargs[FORWARD_KWARG] is None:
            self.tower_hooks.call(is_stock=FORWARD_KWARG in kwargs)
        if FORWARD_KWARG in kwargs:
            if isinstance(kwargs[FORWARD_KWARG], (str, list, dict, Method)):
                raise UnsupportedFeatureError(
                    "A forward takes vlmfix=None, for the stock model. Methods for one call are named in "
                    "model.generate(..., vlmfix=...); for forwards, use 'with vlmfix.patched(model, ...)'."
                )
            cache = kwargs.get("past_key_values")
            state = state_of(cache)
            if kwargs[FORWARD_KWARG] is None and state is not None:
                stale = "The stock model has read tokens of this cache (vlmfix=None), of which nothing is known."
                self.beginner.keep(cache, dataclasses.replace(state, stale=stale))  # a copy may share what is known
            if module is self.anatomy.inner and isinstance(kwargs[FORWARD_KWARG], EditedForward):
                kwargs[FORWARD_KWARG].hold_past()
            return (args, kwargs) if told else None
        inputs = self._by_name(module, args, kwargs)
        if self._acts and not torch.compiler.is_compiling():
            refuse_remains(self, self.anatomy.model)
        if self.beginner.runs_passes or self.branches is not None:
            refuse_replica(called, module, inputs)
        forward = self.beginner.begin(module, inputs, told.get(PROMPT_END_KWARG))
        if forward is None:
            return args, {**kwargs, FORWARD_KWARG: None}
        if self.branches is not None and module is self.anatomy.model:
            chosen, kwargs = self.branches.begin(forward, inputs, kwargs, told.get(OTHER_IMAGES_KWARG))
            if isinstance(chosen, PairedForward):
                return (), {**kwargs, FORWARD_KWARG: chosen}
        tokens = tokens_of(inputs) if self._wants_every_row and forward.acts else None
        rows = {} if tokens is None else every_row(kwargs, forward.q_len, tokens.device)
        return args, {**kwargs, **rows, FORWARD_KWARG: forward}

    def after_forward(
        self, module: nn.Module, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Settle what was learned, keep the state on a new cache, mix logits, run the other branch."""
        forward = kwargs.get(FORWARD_KWARG)
        own = own_branch(forward)
        if not isinstance(own, EditedForward):
            return None
        if not own.is_over:
            self.places.check(own, called)
            self._settle(own, output)
        mixed = None
        if own.early and module is self.anatomy.language_model:
            mixed = output = self.early_head.mix(own, output, self._by_name(module, args, kwargs))
        if self.branches is None or module is not self.anatomy.model:
            return mixed
        return self.branches.finish(forward, output)

    def _by_name(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._parameters[module], args, strict=False)), **kwargs}

    def _settle(self, forward: EditedForward, output: Any) -> None:
        forward.finish()
        self.counters.add(forward)
        if forward.begins:
            parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
            for cache in parts:
                if hasattr(cache, "get_seq_length"):
                    self.beginner.keep(cache, forward.state)

    def status(self) -> Status:
        """Describe the patch."""
        prompts, prompts_without_image, decode_steps, edited = self.counters.read()
        moved = self.counters.read_moved()
        notes = (*self.notes, *filter(None, (each.note() for each in self._rewriters.values())))
        notes = notes if self.is_whole() else (*notes, _NOT_WHOLE)
        if self.refusals:
            notes = (*notes, f"{len(self.refusals)} calls were refused: {self.refusals[-1]}")
        for method, rows, far in zip(self.methods, edited, moved, strict=True):
            if rows and far is not None and far < rounding_of(self.anatomy.model.dtype):
                note = f"{method.name} edited {rows} {method.counts}, and none of them moved: it has no effect here"
                logger.warning("%s (%s).", note, type(self.anatomy.model).__name__)
                notes = (*notes, note)
        return Status(
            model=type(self.anatomy.model).__name__,
            methods=self.methods,
            layers=tuple(sorted({layer for method in self.methods for layer in method.layer_indices})),
            image_token_ids=self.anatomy.image_token_ids,
            prompts=prompts,
            prompts_without_image=prompts_without_image,
            decode_steps=decode_steps,
            edited=edited,
            moved=moved,
            notes=notes,
        )

    def is_whole(self) -> bool:
        """Whether everything that was hung on the model is still there."""
        hooks = all(handle.id in (handle.hooks_dict_ref() or {}) for handle in self._handles)
        return hooks and all(site.module.__dict__.get(SITE_ATTRIBUTE) is site for site in self.sites)
