"""Products by oneDNN: the right ones, only where they are asked for, and where it can."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families.tiny_llava import RAGGED, collate, generate
from method_parameters import parameters_of
from torch.utils._python_dispatch import TorchDispatchMode

import vlmfix
from vlmfix.methods.registry import make_method
from vlmfix.model.products import ProductsByOneDnn, fast_products, has_onednn

pytestmark = pytest.mark.skipif(not has_onednn(), reason="no oneDNN on this machine")
ONE = collate([RAGGED[0]])


class Counted(TorchDispatchMode):
    """Counts products that are oneDNN's, by their number of rows, and those that are not (0)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.rows[args[0].numel() // args[0].shape[-1]] += 1
        elif func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.rows[0] += 1
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> Counter[int]:
    with Counted() as mode:
        run()
    return mode.rows


@torch.no_grad()
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 48), (2, 1, 48), (3, 7, 48), (2, 3, 5, 48), (0, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_definition(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    states, weight, offset = torch.randn(shape), torch.randn(40, 48), torch.randn(40) if bias else None
    with ProductsByOneDnn():
        found = F.linear(states, weight, offset)
    expected = states.double() @ weight.double().T + (0 if offset is None else offset.double())
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_plain_fp32_on_the_cpu_is_torchs() -> None:
    class Special(torch.Tensor):
        pass

    weight, states = torch.randn(5, 4), torch.randn(3, 4)
    layer = torch.nn.Linear(4, 5)

    def products() -> None:
        F.linear(states.double(), weight.double())
        F.linear(states.bfloat16(), weight.bfloat16())
        F.linear(states, weight.as_subclass(Special))
        F.linear(states.T.contiguous().T, weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        with torch.enable_grad():
            layer(states).sum().backward()

    with torch.no_grad(), ProductsByOneDnn():
        seen = counted(products)
        assert seen[0] and sum(seen.values()) == seen[0]
        assert counted(lambda: layer(states)) == {3: 1}
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_code_compiled_within_takes_torchs() -> None:
    """A model's forward may be compiled inside the one that was patched; inductor cannot lower oneDNN's product."""
    layer, states, traced = torch.nn.Linear(4, 5), torch.randn(3, 4), []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        traced.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    with ProductsByOneDnn():
        found = torch.compile(lambda given: layer(given) + 1, backend=backend)(states)
    assert len(traced) == 1 and torch.ops.mkldnn._linear_pointwise not in traced[0]
    assert torch.ops.mkldnn._linear_pointwise.default not in traced[0]
    torch.testing.assert_close(found, layer(states) + 1)
    torch._dynamo.reset()


def test_other_threads_and_what_comes_behind_are_left_alone() -> None:
    weight, states, seen = torch.randn(5, 4), torch.randn(3, 4), []
    with torch.no_grad(), ProductsByOneDnn():
        thread = threading.Thread(target=lambda: seen.append(counted(lambda: F.linear(states, weight))))
        thread.start()
        thread.join()
    assert seen == [{0: 1}] and counted(lambda: F.linear(states, weight)) == {0: 1}


def test_when_it_is_chosen(build: Any) -> None:
    model = build()
    assert isinstance(fast_products(model), ProductsByOneDnn)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not isinstance(fast_products(model), ProductsByOneDnn)
    assert not isinstance(fast_products(model.to(torch.bfloat16)), ProductsByOneDnn)
    assert not isinstance(fast_products(model.to("meta")), ProductsByOneDnn)


@pytest.mark.parametrize("name", ["vcd", "guidance"])
def test_steps_of_two_branches_take_it_and_no_others(tiny: Any, name: str) -> None:
    stock = counted(lambda: generate(tiny, ONE, max_new_tokens=4))
    assert set(stock) == {0}
    vlmfix.patch(tiny, make_method(name, parameters_of(name, tiny)))
    language_model = tiny.model.language_model
    linears = sum(isinstance(each, torch.nn.Linear) for each in language_model.modules()) + 1  # with the head
    seen = counted(lambda: generate(tiny, ONE, max_new_tokens=4))
    assert seen[2] == 3 * linears and set(seen) == {0, 2}
    vlmfix.unpatch(tiny)
    assert counted(lambda: generate(tiny, ONE, max_new_tokens=4)) == stock


def test_the_pass_without_the_image_takes_it(tiny: Any) -> None:
    vlmfix.patch(tiny, "vhr")
    text = int((ONE["input_ids"] != tiny.config.image_token_id).sum())
    assert set(counted(lambda: generate(tiny, ONE, max_new_tokens=2))) == {0, text}
