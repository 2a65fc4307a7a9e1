"""A page to try methods on: a picture, a question, and two answers side by side, doubted words marked.

    pip install 'vlmfix[app,eval]'
    python scripts/app.py --model llava-hf/llava-1.5-7b-hf
    python scripts/app.py                                   the embedded model and its drawings

Words are marked by ``vlmfix.verify``: the stock model is asked for every object that an answer names.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

import vlmfix
from vlmfix.evals import testbed
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.info import verdict
from vlmfix.model.anatomy import analyse
from vlmfix.observe.prompts import PromptBuilder, encode

QUESTION = "Please describe this image in detail."

SUPPORTED, DOUBTED = "the model stands by it", "the model doubts it when asked"

COLOURS = {SUPPORTED: "#86c5a4", DOUBTED: "#e0655f"}

STYLE = """<style>
.marked [style*="background-color"], .marked [style*="background-color"] * { color: var(--body-text-color) !important; }
</style>"""
"""Gradio writes marked words in black, which cannot be read on the marks of a dark page."""

ABOUT = """\
# vlmfix
What a model says about a picture, under two methods. `none` is the stock model. Objects are marked by what that model
answers when it is asked for each of them; it may be wrong in this too.
"""

Marked = list[tuple[str, str | None]]


class Answering(NamedTuple):
    """A model that many users ask at once, each with methods of their own.

    Attributes:
        model: Patched with ``none``, so that every call chooses.
        processor: Its processor.
        max_new_tokens: Length of an answer.
        verifying: One text is verified at a time.
    """

    model: Any
    processor: Any
    max_new_tokens: int
    verifying: threading.Lock

    def answer(self, picture: Image.Image, question: str, method: str) -> Marked:
        """Return an answer in pieces, each with its mark.

        Raises:
            gr.Error: There is no picture, or the method refuses; the page shows the reason.
        """
        if picture is None:
            raise gr.Error("Choose a picture first.")
        try:
            prompt = PromptBuilder(self.processor)(question or QUESTION)
            inputs = encode(self.processor, [prompt], [picture.convert("RGB")], self.model)
            chosen = None if method == "none" else method
            ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, vlmfix=chosen)
            said = self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            with self.verifying:
                found = vlmfix.verify(self.model, self.processor, picture.convert("RGB"), said, prompt=question)
        except vlmfix.VlmfixError as error:
            raise gr.Error(str(error)) from error
        marks = [(*span, DOUBTED if word.is_doubted else SUPPORTED) for word in found.words for span in word.spans]
        return pieces(said, marks)


def pieces(text: str, marks: Sequence[tuple[int, int, str]]) -> Marked:
    """Cut a text at its marks ``(start, end, mark)``, which do not overlap."""
    cut: Marked = []
    behind = 0
    for start, end, mark in sorted(marks):
        cut += [(text[behind:start], None), (text[start:end], mark)]
        behind = end
    return [piece for piece in (*cut, (text[behind:], None)) if piece[0]]


def methods_for(model: Any) -> list[str]:
    """Return the methods that a model takes as they come."""
    anatomy = analyse(model)
    return [name for name in vlmfix.list_methods() if verdict(name, anatomy)[0] == "yes"]


def page(model: Any, processor: Any, *, max_new_tokens: int = 128, picture: Image.Image | None = None) -> gr.Blocks:
    """Return the page; four users are answered at once."""
    methods = methods_for(model)
    asked = Answering(vlmfix.patch(model, "none"), processor, max_new_tokens, threading.Lock())
    with gr.Blocks(title="vlmfix") as blocks:
        gr.HTML(STYLE)
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(picture, type="pil", label="Picture", height=280)
                question = gr.Textbox(QUESTION, label="Question", max_lines=3)
                with gr.Row():
                    choices = [
                        gr.Dropdown(methods, value=value, label=label, min_width=120)
                        for label, value in (
                            ("First method", "none"),
                            ("Second method", "vhr" if "vhr" in methods else methods[0]),
                        )
                    ]
                button = gr.Button("Answer", variant="primary")
            with gr.Column(scale=2, min_width=300), gr.Row():
                answers = [
                    gr.HighlightedText(
                        label=label,
                        color_map=COLOURS,
                        show_legend=True,
                        combine_adjacent=False,
                        min_width=240,
                        elem_classes="marked",
                    )
                    for label in ("First answer", "Second answer")
                ]
        for number, (choice, shown) in enumerate(zip(choices, answers, strict=True)):
            gr.on(
                [button.click, question.submit],
                asked.answer,
                [image, question, choice],
                shown,
                concurrency_limit=4,
                api_name=f"answer_{number + 1}",
            )
    return blocks.queue(default_concurrency_limit=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="MODEL", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    if options.model is None:
        model, processor = testbed.load()
        picture = Image.fromarray(make_scene(image_id("heldout", 3)).pixels)
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto", device_map="auto").eval()
        processor, picture = AutoProcessor.from_pretrained(options.model), None
    page(model, processor, max_new_tokens=options.max_new_tokens, picture=picture).launch(server_port=options.port)


if __name__ == "__main__":
    main()
