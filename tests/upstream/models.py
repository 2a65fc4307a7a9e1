"""transformers' own tests of models, on the tiny model of a family; run by ``compare.py``, not among our tests.

The environment variables ``FAMILY`` and ``METHODS`` say which family, and with what its models are patched: there is a
class of tests for each method, and ``TestStock`` for none.
"""

from __future__ import annotations

import importlib
import inspect
import os
import unittest
from typing import Any

import transformers
from families import available
from method_parameters import parameters_of
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin

import vlmfix

FAMILY = available(os.environ["FAMILY"])
PROMPTS = FAMILY.even()
MODEL: Any = getattr(transformers, FAMILY.architecture)
GENERATIVE = (MODEL,) if hasattr(GenerationTesterMixin, "prepare_config_and_inputs_for_generate") else ()


class Tester:
    """What transformers' tests ask of a model's tester."""

    is_training = True
    method = ""
    """What every model is patched with that the running test makes."""

    def __init__(self) -> None:
        self.inputs = FAMILY.collate(PROMPTS)
        self.batch_size, self.seq_length = self.inputs["input_ids"].shape
        self.encoder_seq_length = self.seq_length
        text = FAMILY.config().get_text_config()
        self.num_hidden_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        return FAMILY.config(), dict(self.inputs)


def patch_when_built(kind: Any) -> None:
    """Let every model of a class be patched where it is made: new ones, and those that are loaded."""
    build = kind.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if Tester.method:
            vlmfix.patch(self, Tester.method, **parameters_of(Tester.method, self))

    __init__.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
    kind.__init__ = __init__


patch_when_built(MODEL)


class Models(ModelTesterMixin, GenerationTesterMixin):
    """All tests that a model of transformers has; those of generation where the sources hold them."""

    all_model_classes = (MODEL,)
    all_generative_model_classes = GENERATIVE
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = Tester()

    def prepare_config_and_inputs_for_generate(self, batch_size: int = 2) -> tuple[Any, dict[str, Any]]:
        """Take whole prompts: rows of ``pixel_values`` may be patches, of which a prompt has many."""
        config, first_rows = super().prepare_config_and_inputs_for_generate(batch_size)
        inputs = FAMILY.collate(PROMPTS[:batch_size], pad_to=self.model_tester.seq_length)
        return config, {name: inputs[name] for name in first_rows}


def own_tests() -> tuple[type, ...]:
    """The class of tests that the sources hold of this model alone, on configurations and inputs of its own."""
    kind = FAMILY.config().model_type
    try:
        module = importlib.import_module(f"tests.models.{kind}.test_modeling_{kind}")
    except ModuleNotFoundError as error:
        if not f"tests.models.{kind}.test_modeling_{kind}".startswith(str(error.name)):
            raise
        return ()
    return tuple(
        each for each in vars(module).values() if getattr(each, "__name__", "").endswith("ModelTest") and takes(each)
    )


def takes(tests: Any) -> bool:
    """Whether a class of tests is about the model."""
    case = tests()
    case.setUp()
    return MODEL in case.all_model_classes


class Patched:
    """A case whose models are patched."""

    method = ""

    def setUp(self) -> None:
        Tester.method = self.method
        super().setUp()  # type: ignore[misc]


OWN = own_tests()
for name in ("", *os.environ["METHODS"].split(",")):
    title = f"Test{name.title().replace('_', '') or 'Stock'}"
    globals()[title] = type(
        title, (Patched, *(OWN or (Models, unittest.TestCase))), {"method": name, "__module__": __name__}
    )
