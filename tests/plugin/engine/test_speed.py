"""What makes a patch cheap, counted instead of timed: operations per decode step, tensor sizes, texts read twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import bench_models
import bench_variants
import pytest
import torch
from families.tiny_llava import RAGGED, Sample, collate, forward, generate
from torch.utils._python_dispatch import TorchDispatchMode

import vlmfix
from vlmfix.engine.prompt_pass import HeadRecorder

VIEWS = {
    *("view", "_unsafe_view", "reshape", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "expand"),
    *("permute", "split", "unbind", "as_strided", "detach", "alias"),
}


class Watch(TorchDispatchMode):
    """Counts operations other than views, and keeps the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
            results = result if isinstance(result, (tuple, list)) else (result,)
            self.largest = max([self.largest, *(each.numel() for each in results if isinstance(each, torch.Tensor))])
        return result


@pytest.fixture(scope="module")
def model() -> Any:
    return bench_models.build("tiny", "cpu", torch.float32)


def watch_step(model: Any) -> Watch:
    """Watch the second decode step behind a prompt."""
    inputs = bench_models.make_inputs(model, 16, 12, 1)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for _ in range(2):
            with Watch() as watch:
                model(input_ids=torch.tensor([[40]]), past_key_values=cache, use_cache=True)
    return watch


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (vlmfix.PAI(layers=":"), 6),
        (vlmfix.IAT(layers=":"), 7),
        (vlmfix.VHR(layers=":"), 2),
        (vlmfix.VAR(sink_dims=[bench_models.SINK_DIM], sink_threshold=4.0, layers=":"), 12),
        (vlmfix.SPIN(layers=":"), 11),
        (vlmfix.ACT(layers=":"), 19),
        (vlmfix.ACT(heads=[(0, 1), (1, 0), (2, 3)]), 21),
        (vlmfix.MMA(layers=":"), 0),
    ],
    ids=lambda value: value.name if isinstance(value, vlmfix.Method) else str(value),
)
def test_operations_per_layer_of_a_decode_step(model: Any, method: Any, most: int) -> None:
    """Beyond the stock model's, in every layer; a handful more per step. None of them waits for the device."""
    stock = watch_step(bench_models.clone(model))
    copy = vlmfix.patch(bench_models.clone(model), method)
    found = watch_step(copy)
    # A stock kernel that is not called is one operation fewer.
    extra = sum(found.counts.values()) - sum(stock.counts.values())
    assert extra <= 3 * most + 10, found.counts - stock.counts
    assert most == 0 or extra > 0, "the method acts"
    for name in ("_local_scalar_dense", "is_nonzero", "nonzero", "_to_cpu"):
        assert found.counts[name] == stock.counts[name], name


@pytest.mark.parametrize("name", ["vhr", "var", "pai", "mma", "act, all heads", "act", "eah", "vaf", "spin"])
def test_no_tensor_grows_with_the_square_of_the_prompt(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of a few rows: at twice the tokens the largest tensor is at most twice as large."""
    monkeypatch.setattr("vlmfix.model.attention.CHUNK_ELEMENTS", 2**12)
    largest = {}
    for image_tokens in (320, 640):
        copy = bench_variants.make(model, name, image_tokens)
        inputs = bench_models.make_inputs(copy, image_tokens, 40, 1)
        with torch.no_grad(), Watch() as watch:
            copy(**inputs, logits_to_keep=1)
        largest[image_tokens] = watch.largest
    assert largest[640] <= 2.1 * largest[320], largest
    assert largest[320] < 360 * 360


@pytest.mark.parametrize("name", ["none", "vhr", "var", "pai", "spin", "act"])
def test_compiled_steps_write_only_to_fixed_addresses(model: Any, name: str) -> None:
    """Else they would not be turned into CUDA graphs."""
    from transformers import StaticCache

    loose: list[torch.Size] = []
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            tensors = [each for each in args if isinstance(each, torch.Tensor)]
            before = [each._version for each in tensors]
            results = graph(*args)
            written = [each for each, version in zip(tensors, before, strict=True) if each._version != version]
            loose.extend(each.shape for each in written if not hasattr(each, "_dynamo_static_input_type"))
            calls.append(len(written))
            return results

        return run

    torch._dynamo.reset()
    copy = bench_variants.make(model, name, 16)
    inputs = bench_models.make_inputs(copy, 16, 12, 1)
    cache = StaticCache(config=copy.config.text_config, max_cache_len=40)
    with torch.no_grad():
        copy(**inputs, past_key_values=cache, use_cache=True)
        step = torch.compile(copy, backend=backend, fullgraph=True)
        for token in (40, 41, 42):
            ids = torch.tensor([[token]])
            step(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=torch.tensor([[token - 12]]))
    assert len(calls) >= 3 and max(calls) > 0
    assert not loose


@pytest.fixture
def text_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many texts the attention of an image-free pass saw."""
    seen: list[int] = []
    attend = HeadRecorder.attend

    def spy(self: Any, site: Any, call: Any) -> Any:
        seen.append(call.query.shape[0])
        return attend(self, site, call)

    monkeypatch.setattr(HeadRecorder, "attend", spy)
    yield seen


def test_a_text_that_several_samples_share_is_read_once(tiny: Any, text_rows: list[int]) -> None:
    """One question about several images, among others, gives each sample what it gets alone."""
    image = [
        Sample(RAGGED[0].ids, torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(n))) for n in (1, 2)
    ]
    samples = [image[0], RAGGED[3], image[1], RAGGED[0]]
    vlmfix.patch(tiny, vlmfix.VHR(layers=":"))
    alone = [forward(tiny, collate([each])).logits[0, -1] for each in samples]
    text_rows.clear()
    together = forward(tiny, collate(samples)).logits[:, -1]
    assert set(text_rows) == {2}
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-3


def test_beams_share_their_text(tiny: Any, text_rows: list[int]) -> None:
    vlmfix.patch(tiny, vlmfix.VHR(layers=":"))
    generate(tiny, collate([RAGGED[0], RAGGED[3]]), 3, num_beams=3)
    assert set(text_rows) == {2}
