"""Instruments: what a model looks at, which heads depend on the image, and what happens when a path is cut.

Every probe takes a model (patched or not) and the inputs of ``model.generate``, leaves the model as it was, and returns
a small frozen result with ``plot()`` and ``to_json()``. On a patched model the patch goes on acting, and the result
names it; ``causal_trace`` alone looks at the stock model.

One instrument per file: its result, a ``ProbeResult``, and a function of the same name that fills it. To add one, let
the model answer with something that watches it (``vlmfix.observe``), or with ``knockout.Cut`` in the way, and add both
names to this file:

>>> subject = look_at(model, "my_probe", inputs)  # refuses what no probe can look at  # doctest: +SKIP
>>> answered = subject.answer(inputs, AttentionWatch(log.see), max_new_tokens=32)  # doctest: +SKIP
"""

from __future__ import annotations

from vlmfix.probes.causal_trace import CausalTrace, ObjectPlace, causal_trace
from vlmfix.probes.corruption import Corruption
from vlmfix.probes.evidence import Evidence, doubt, evidence
from vlmfix.probes.head_divergence import HeadDivergence, head_divergence
from vlmfix.probes.image_attention import ImageAttention, attention_to_image
from vlmfix.probes.knockout import Knockout, knockout
from vlmfix.probes.result import ProbeResult
from vlmfix.probes.retrieval import Retrieval, retrieval
from vlmfix.probes.sinks import Sinks, sinks
from vlmfix.probes.spans import text_span

__all__ = [
    "CausalTrace",
    "Corruption",
    "Evidence",
    "HeadDivergence",
    "ImageAttention",
    "Knockout",
    "ObjectPlace",
    "ProbeResult",
    "Retrieval",
    "Sinks",
    "attention_to_image",
    "causal_trace",
    "doubt",
    "evidence",
    "head_divergence",
    "knockout",
    "retrieval",
    "sinks",
    "text_span",
]
