"""The page of ``scripts/app.py``: four users at once get the answers of direct calls, with doubted words marked."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlmfix
from vlmfix.evals import testbed
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.observe.prompts import PromptBuilder, encode

pytest.importorskip("gradio", reason="Gradio is not installed: pip install vlmfix[app]")
client = pytest.importorskip("gradio_client")
app = pytest.importorskip("app")

USERS = [("vhr", 3), ("none", 4), ("pai", 3), ("vcd", 4)]


def test_a_text_is_cut_at_its_marks() -> None:
    marks = [(11, 14, "b"), (2, 5, "a")]
    assert app.pieces("A dog by a cat.", marks) == [
        ("A ", None),
        ("dog", "a"),
        (" by a ", None),
        ("cat", "b"),
        (".", None),
    ]
    assert app.pieces("Yes", [(0, 3, "a")]) == [("Yes", "a")]
    assert app.pieces("No.", []) == [("No.", None)]


@pytest.mark.slow
def test_four_users_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    model, processor = testbed.load()
    stock = copy.deepcopy(model)
    pictures = {number: Image.fromarray(make_scene(image_id("heldout", number)).pixels) for number in (3, 4)}
    for number, picture in pictures.items():
        picture.save(tmp_path / f"{number}.png")
    page = app.page(model, processor, max_new_tokens=24)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)

    def ask(user: tuple[str, int]) -> Any:
        method, number = user
        browser = client.Client(url, verbose=False, httpx_kwargs={"timeout": 300})
        file = client.handle_file(tmp_path / f"{number}.png")
        return browser.predict(file, app.QUESTION, method, api_name="/answer_1")

    try:
        with ThreadPoolExecutor(4) as users:
            answers = list(users.map(ask, USERS))
    finally:
        page.close()
    said = []
    for method, number in USERS:
        vlmfix.patch(stock, method)
        picture = Image.fromarray(np.asarray(pictures[number]))
        inputs = encode(processor, [PromptBuilder(processor)(app.QUESTION)], [picture], stock)
        ids = stock.generate(**inputs, max_new_tokens=24, do_sample=False)
        said.append(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    shown = ["".join(piece["token"] for piece in answer) for answer in answers]
    assert shown == said and len(set(said)) > 2
    marks = {piece["class_or_confidence"] for answer in answers for piece in answer}
    assert marks & {app.SUPPORTED, app.DOUBTED}
