"""An attention method in the other branch: its forwards are begun, edited and remembered like those of a patch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vlmfix.engine.begin import ForwardBeginner
from vlmfix.engine.forwards import EditedForward, StockForward
from vlmfix.engine.plan import PatchedSite, make_sites

if TYPE_CHECKING:
    import torch

    from vlmfix.methods.base import Method
    from vlmfix.methods.sequence import SequenceState
    from vlmfix.model.anatomy import Anatomy
    from vlmfix.model.attention import AttentionCall


class BranchForward(StockForward):
    """A forward of the other branch. The patch's sites lead to those of the branch's own method.

    Attributes:
        edited: The forward as that method sees it.
        sites: Where the method acts, by the number of the attention module.
    """

    def __init__(self, edited: EditedForward, sites: dict[int, PatchedSite]) -> None:
        self.edited = edited
        self.sites = sites

    def attend(self, site: PatchedSite, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with the edits of the branch's own method."""
        mine = self.sites.get(site.index)
        return call.base() if mine is None else self.edited.attend(mine, call._replace(site=mine))


class BranchEdits:
    """Lets a bound attention method act in the forwards of the other branch.

    What the method learns is kept on the branch's cache, apart from what the patch's methods learn on the model's own.
    """

    def __init__(self, anatomy: Anatomy, method: Method) -> None:
        self._model = anatomy.model
        self.methods = (method,)
        self._sites = {site.index: site for site in make_sites(anatomy, self.methods)}
        self._beginner = ForwardBeginner(anatomy, self.methods, tuple(self._sites.values()))

    def begin(self, inputs: dict[str, Any]) -> BranchForward:
        """Make the forward of a call with these arguments."""
        edited = self._beginner.begin(self._model, inputs)
        assert edited is not None
        return BranchForward(edited, self._sites)

    def finish(self, forward: BranchForward, cache: Any) -> None:
        """Settle what was learned in a forward, and keep it."""
        forward.edited.finish()
        if forward.edited.begins and cache is not None:
            self._beginner.keep(cache, forward.edited.state)

    def keep_text(self, cache: Any, state: SequenceState, length: int) -> None:
        """Note on a cache what is known of the first ``length`` tokens, which were read before there was an image."""
        known = dataclasses.replace(state.cropped(length), methods=self.methods, learned={}, constants={}, branch=None)
        self._beginner.keep(cache, known)
