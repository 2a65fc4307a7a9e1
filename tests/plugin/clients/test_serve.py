"""``vlmfix serve``, asked by OpenAI's client over loopback: every answer is that of a direct ``generate``."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client_runs import QUESTION, answer, picture, stock
from transformers import AutoTokenizer

import vlmfix
from vlmfix.cli import main

pytest.importorskip("fastapi", reason="the server of transformers is not installed: pip install vlmfix[serve]")
pytest.importorskip("uvicorn", reason="the server of transformers is not installed: pip install vlmfix[serve]")
openai = pytest.importorskip("openai", reason="the client of OpenAI is not installed: pip install openai")

CHOICES: list[Any] = [
    "not named",
    None,
    "pai",
    {"method": "vhr", "alpha": 0.5, "layers": ":"},
    ["var", {"method": "vhr", "alpha": 3, "layers": ":"}],
    {"method": "vcd", "alpha": 2, "beta": 0},
]
"""What requests name; the server's own patch is VHR with ``alpha=3``."""


@pytest.fixture(scope="module")
def server(processor_folder: Path) -> Iterator[tuple[Any, subprocess.Popen[str]]]:
    """A client, and the process of the server it asks."""
    port = free_port()
    words = ["vhr", "--set", "alpha=3", "layers=:", "--", str(processor_folder)]
    words += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmfix", "serve", *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not listens(port):
            assert process.poll() is None, process.communicate()[0]
        yield client_of(port), process
    finally:
        process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    """Whether a server listens; waits a moment if not."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        time.sleep(0.5)
        return False
    return True


def client_of(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: Any, folder: Path, *numbers: int, choice: Any = "not named", more: Any = None, **options: Any) -> Any:
    """Ask about the pictures of these numbers; ``more`` are further fields of the request."""
    content: list[Any] = []
    for number in numbers:
        png = io.BytesIO()
        picture(number).save(png, "png")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    chosen = {} if choice == "not named" else {"vlmfix": choice}
    return client.chat.completions.create(
        model=str(folder),
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
        extra_body={**chosen, **(more or {})},
        **{"max_tokens": 8, "temperature": 0, **options},
    )


def said(reply: Any) -> str:
    """The text of a reply, or of a stream."""
    if hasattr(reply, "choices"):
        return str(reply.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in reply)


@pytest.fixture(scope="module")
def expected(processor_folder: Path) -> list[list[str]]:
    """Per choice, the answers about two pictures."""
    model = vlmfix.patch(stock(processor_folder), "vhr", alpha=3.0, layers=":")
    found = []
    for choice in CHOICES:
        by_call = {} if choice == "not named" else {"vlmfix": choice}
        found.append([answer(model, processor_folder, picture(number), **by_call) for number in range(2)])
    assert len(set(map(str, found))) >= 4
    return found


@pytest.mark.slow
def test_concurrent_requests_with_methods_of_their_own(
    server: Any, processor_folder: Path, expected: list[list[str]]
) -> None:
    client, _ = server
    wanted = [(index % len(CHOICES), index % 2, index % 3 == 0) for index in range(16)]

    def one(request: tuple[int, int, bool]) -> str:
        choice, number, streams = request
        return said(ask(client, processor_folder, number, choice=CHOICES[choice], stream=streams))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, wanted))
    assert answers == [expected[choice][number] for choice, number, _ in wanted]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("vhrr", "There is no method 'vhrr'"),
        ({"method": "vhr", "alfa": 1}, "no parameter 'alfa'"),
        ("/etc/recipe.json", "not files of the server"),
        ([["/etc/recipe.json"]], "not files of the server"),
        ("adhh", "needs a list of heads"),
        ({"method": "opera", "layers": [99]}, "opera"),
        (5, "Expected a method's name"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_is_told_why(
    server: Any, processor_folder: Path, choice: Any, reason: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        ask(server[0], processor_folder, 0, choice=choice, stream=stream)


@pytest.mark.slow
def test_a_search_gives_no_stream(server: Any, processor_folder: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="opera knows its answer only at the end"):
        ask(server[0], processor_folder, 0, choice="opera", stream=True)


@pytest.mark.slow
@pytest.mark.parametrize("choice", [None, "vhr", "vcd", "verify", "opera"])
@pytest.mark.parametrize("pictures", [(), (0,), (0, 1)])
@pytest.mark.parametrize("stop", [None, "with"])
def test_every_number_of_pictures_and_stop_strings(
    server: Any, processor_folder: Path, choice: Any, pictures: tuple[int, ...], stop: str | None
) -> None:
    """With a stream too, where there is one."""
    model = vlmfix.patch(stock(processor_folder), "none")
    images = [picture(number) for number in pictures]
    by_call: dict[str, Any] = {"vlmfix": choice}
    if stop is not None:
        by_call |= {"stop_strings": [stop], "tokenizer": AutoTokenizer.from_pretrained(processor_folder)}
    more = {} if stop is None else {"stop": [stop]}
    if choice == "opera" and pictures and stop:
        with pytest.raises(openai.BadRequestError, match="StopStringCriteria"):
            ask(server[0], processor_folder, *pictures, choice=choice, **more)
        return
    expected = answer(model, processor_folder, *images, **by_call)
    for stream in (False, True)[: 1 if choice == "opera" else 2]:
        assert said(ask(server[0], processor_folder, *pictures, choice=choice, stream=stream, **more)) == expected


@pytest.mark.slow
def test_a_refusal_while_it_generates(server: Any, processor_folder: Path) -> None:
    request = {"choice": "sid", "more": {"generation_config": '{"use_cache": false, "max_new_tokens": 4}'}}
    with pytest.raises(openai.BadRequestError, match="without a cache"):
        ask(server[0], processor_folder, 0, **request)
    with pytest.raises(openai.APIError) as refused:
        said(ask(server[0], processor_folder, 0, stream=True, **request))
    assert "without a cache" in str(refused.value.body)


@pytest.mark.slow
def test_a_client_that_leaves_a_stream(server: Any, processor_folder: Path, expected: list[list[str]]) -> None:
    for choice in CHOICES[1:]:
        stream = ask(server[0], processor_folder, 0, choice=choice, stream=True, max_tokens=2000)
        next(iter(stream))
        stream.close()
    began = time.monotonic()
    assert said(ask(server[0], processor_folder, 0)) == expected[0][0]
    assert time.monotonic() - began < 30, "what nobody reads is not generated to its end"


@pytest.mark.slow
def test_what_the_patch_did_is_told_at_the_end(server: Any, processor_folder: Path) -> None:
    client, process = server
    ask(client, processor_folder, 0)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert "LlavaForConditionalGeneration patched with VHR(layers=(0, 1, 2), alpha=3" in told, told
    assert "prompts (0 without an image)" in told


@pytest.mark.slow
def test_transformers_serve_of_a_folder_with_a_recipe(
    processor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word of vlmfix on the command line."""
    from transformers.cli.serve import Serve

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = shutil.copytree(processor_folder, tmp_path / "model")
    vlmfix.save_recipe_beside_weights(folder, "vhr", alpha=0.5, layers=":")
    port = free_port()
    told = {"device": "cpu", "dtype": "float32", "trust_remote_code": True, "non_blocking": True}
    serve = Serve(force_model=str(folder), host="127.0.0.1", port=port, **told)
    try:
        while not listens(port):
            assert serve._thread.is_alive()
        found = [said(ask(client_of(port), folder, number)) for number in range(2)]
    finally:
        serve.kill_server()
    model = vlmfix.patch(stock(processor_folder), "vhr", alpha=0.5, layers=":")
    assert found == [answer(model, processor_folder, picture(number)) for number in range(2)]


def test_what_the_server_is_given_stands_behind_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "vhr", "MODEL"]) == 2
    assert "expected -- and what to run behind it" in capsys.readouterr().err
