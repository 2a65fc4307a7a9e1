"""Load a vision-language model and its processor from a folder or a hub id, and say exactly which weights these are."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmfix.errors import UnsupportedModelError, VlmfixError
from vlmfix.model.devices import input_device

from .. import testbed
from ..data.write import file_digest
from ..testbed import MODELS, model_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")


_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found but not loaded yet.

    Attributes:
        name: What the user typed, or ``"testbed"``.
        location: Folder or hub id handed to ``from_pretrained``.
        revision: Commit of the hub repository, where known.
        config: The transformers configuration.
        processor: The transformers processor, its tokenizer padding on the left.
        identity: What identifies the weights in cache keys and ``config.json``.
        cpu_attention: transformers' attention that is fastest on a CPU, where that is known.
    """

    name: str
    location: str
    revision: str | None
    config: Any
    processor: Any
    identity: dict[str, Any]
    cpu_attention: str | None = None

    def attention(self, wanted: str | None, device: str) -> str | None:
        """The attention to load the model with: what is ``wanted``, or the fastest; None is transformers' choice."""
        return wanted or (self.cpu_attention if device == "cpu" else None)


def find_model(location: str | Path | None, *, yes: bool = False) -> ModelSource:
    """Read the configuration and the processor of a model, not its weights.

    Args:
        location: Local folder, hub id, or the name of one of the testbed's models; None is its default model.
        yes: Whether what a model of the testbed needs may be downloaded without a question.

    Raises:
        UnsupportedModelError: No such folder, no model in it, not a vision-language model, or no processor.
        DataError: A model of the testbed cannot be assembled.
    """
    from transformers import AutoConfig, AutoProcessor

    text = str(testbed.MODEL_DIR if location is None else location)
    for own in MODELS:
        if text == own and not Path(text).is_dir():
            text = str(model_folder(own, yes=yes))
    folder = Path(text).expanduser()
    local = folder.is_dir()
    if local:
        text = str(folder)
        if not (folder / "config.json").is_file():
            raise UnsupportedModelError(
                f"no model in {folder}: expected config.json, weights and processor files as save_pretrained writes "
                "them; pass the folder that holds config.json"
            )
    elif folder.exists() or text.count("/") > 1 or text.startswith((".", "/", "~")):
        raise UnsupportedModelError(f"no such model folder: {text}; pass a folder or a hub id like owner/name")
    try:
        config = AutoConfig.from_pretrained(text)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(_load_failure(text, "configuration", error)) from error
    _check_vision_language(text, config)
    try:
        processor = AutoProcessor.from_pretrained(text)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(_load_failure(text, "processor", error)) from error
    _prepare_processor(text, processor)
    revision = getattr(config, "_commit_hash", None)
    identity = {
        "model_type": config.model_type,
        # A folder is what is in it, wherever it lies; a hub model is its name and commit.
        "weights": folder_digest(folder) if local else f"{text} {revision}",
        "processor": processor_digest(processor),
    }
    name = "testbed" if location is None else str(location)
    # Decoding its batches in bfloat16 by torch's fused attention takes 1.6 times as long on a CPU.
    kernel = "eager" if location in testbed.OF_SMOL else None
    return ModelSource(name, text, revision, config, processor, identity, kernel)


def _load_failure(location: str, part: str, error: Exception) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"cannot load the {part} of {location!r}: {first_line} "
        "(expected a folder written by save_pretrained, or a hub id that is cached or reachable)"
    )


def _check_vision_language(location: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{location} is not a vision-language model: its model_type is {config.model_type!r}, and transformers "
            "knows no image-text-to-text class for it; pass a model like llava-hf/llava-1.5-7b-hf"
        )


def _prepare_processor(location: str, processor: Any) -> None:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise UnsupportedModelError(
            f"the processor of {location} is a {type(processor).__name__} without a tokenizer and an image processor; "
            "save the full processor beside the model (processor.save_pretrained)"
        )
    tokenizer.padding_side = "left"  # Decoding continues at the right end of every row.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a folder's weights, configuration and generation settings."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise UnsupportedModelError(f"no weights in {folder}: expected *.safetensors or *.bin beside config.json")
    hasher = hashlib.sha256()
    for path in [folder / "config.json", folder / "generation_config.json", *files]:
        if path.is_file():
            hasher.update(f"{path.name} {file_digest(path)}\n".encode())
    return f"sha256 {hasher.hexdigest()}"


def processor_digest(processor: Any) -> str:
    """Return the SHA-256 of what the processor turns text and images into: vocabulary, template and image settings."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(processor).__name__,
        backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items())),
        type(processor.image_processor).__name__,
        json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str),
    ]
    return "sha256 " + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def resolve_device(device: str | None) -> str:
    """Return the device to use: the one asked for, else CUDA if there is one, else the CPU.

    Raises:
        VlmfixError: CUDA was asked for and is not there.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise VlmfixError(f"--device {device}: torch {torch.__version__} sees no CUDA device; type --device cpu")
    return device


def resolve_dtype(dtype: str | None, device: str, config: Any) -> str:
    """Return the name of the floating-point type to load the weights in.

    Unless one is asked for, it is the checkpoint's own; on a CPU float32 instead, unless the checkpoint's is bfloat16
    and the processor computes in that.
    """
    if dtype not in (None, *DTYPES):
        raise VlmfixError(f"unknown --dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if dtype in (None, "auto"):
        own = str(getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "float32")
        own = own.removeprefix("torch.")
        if dtype is None and (device == "cpu" or (device == "auto" and not torch.cuda.is_available())):
            return "bfloat16" if own == "bfloat16" and _cpu_computes_bfloat16() else "float32"
        return own
    return str(dtype)


def _cpu_computes_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16; without them it is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every version of torch
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def load_model(
    source: ModelSource, *, dtype: str | None = None, device: str | None = None, attn_implementation: str | None = None
) -> Any:
    """Load the weights, in evaluation mode.

    Args:
        source: From ``find_model``.
        dtype: Name of a torch floating-point type; None as :func:`resolve_dtype` has it.
        device: Device of the whole model, or ``"auto"`` for accelerate's placement over several; None as
            :func:`resolve_device` has it.
        attn_implementation: When None, what :meth:`ModelSource.attention` has.

    Raises:
        UnsupportedModelError: transformers cannot load it; the message gives its reason.
        VlmfixError: There is no such device.
    """
    from transformers import AutoModelForImageTextToText

    device = resolve_device(device)
    options: dict[str, Any] = {"dtype": getattr(torch, resolve_dtype(dtype, device, source.config))}
    if device == "auto":
        options["device_map"] = "auto"
    if attention := source.attention(attn_implementation, device):
        options["attn_implementation"] = attention
    with _quiet_loading():
        try:
            model = AutoModelForImageTextToText.from_pretrained(source.location, **options)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UnsupportedModelError(_load_failure(source.location, "weights", error)) from error
    if device != "auto" and not getattr(model, "is_quantized", False):  # bitsandbytes places its weights itself.
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise VlmfixError(f"cannot move the model to --device {device}: {error}") from error
    return model.eval()


SMALL_MODEL = 50_000_000
"""Parameters below which a model runs on one CPU thread. On idle cores two threads made the testbed between a third
slower and twice as fast; where anything else ran beside them they made it up to ten times slower."""


@contextmanager
def fitting_threads(model: Any) -> Iterator[None]:
    """Run a small model on the CPU with one thread, and restore the number of threads afterwards.

    What its process frees it keeps from then on, see :func:`keep_freed_memory`.
    """
    before = torch.get_num_threads()
    if input_device(model).type == "cpu" and sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
        keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, instead of handing it back and taking it anew; whether it is glibc.

    A layer's tensors are freed before those of the next are made: a sixth of a small model's run would be page faults.
    And a decode step of any model costs some percent more or less, by what the prefill before it has freed.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**25))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence transformers' own progress bar where nobody watches it."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    if sys.stderr.isatty() or not shown:
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def placement(model: Any) -> str:
    """Return the name of a model's device, or the names of all devices that hold a part of it."""
    devices = dict.fromkeys((getattr(model, "hf_device_map", None) or {"": model.device}).values())
    found = [torch.device("cpu" if each == "disk" else each) for each in devices]
    names = [torch.cuda.get_device_name(each) if each.type == "cuda" else str(each) for each in found]
    names = ["disk" if each == "disk" else name for each, name in zip(devices, names, strict=True)]
    return ", ".join(dict.fromkeys(names))
