"""transformers' own tests of models, on the tiny model of a family; run by ``compare.py``, not among our tests.

The environment variables ``FAMILY`` and ``METHOD`` say which family, and what every model of the tests is patched with.
"""

from __future__ import annotations

import inspect
import os
import unittest
from typing import Any

import transformers
from families import available
from method_parameters import parameters_of
from tests.test_modeling_common import ModelTesterMixin

import vlmfix

FAMILY = available(os.environ["FAMILY"])
METHOD = os.environ.get("METHOD")
MODEL: Any = getattr(transformers, FAMILY.architecture)


def patch_when_built(kind: Any) -> None:
    """Let every model of a class be patched where it is made: new ones, and those that are loaded."""
    build = kind.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        vlmfix.patch(self, METHOD, **parameters_of(METHOD, self))

    __init__.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
    kind.__init__ = __init__


if METHOD:
    patch_when_built(MODEL)


class Tester:
    """What transformers' tests ask of a model's tester."""

    is_training = True

    def __init__(self) -> None:
        self.inputs = FAMILY.collate(FAMILY.even())
        self.batch_size, self.seq_length = self.inputs["input_ids"].shape
        self.encoder_seq_length = self.seq_length
        text = FAMILY.config().get_text_config()
        self.num_hidden_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return FAMILY.config(), dict(self.inputs)


class TestModel(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MODEL,)
    all_generative_model_classes = ()
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = Tester()
