#!/usr/bin/env python
"""Draw what VHR, VAR, ACT and MMA do inside the embedded model with a language model: one picture each.

    python scripts/mechanics.py --out evals/testbed/mechanics

Strengths are those of the model's recipe. The scene is not chosen: of each method it is the first of the held-out split
in whose caption it names other objects than the stock model. Each picture shows
which patches, heads and tokens the method acted on, and both captions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mechanics_drawing import Picture, draw, save
from PIL import Image

import vlmfix
from vlmfix import probes
from vlmfix.evals import testbed
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher
from vlmfix.evals.inspect.case import Case
from vlmfix.evals.inspect.look import Version, inspect_picture
from vlmfix.evals.run.methods import method_specs, strengths_on
from vlmfix.evals.testbed.scenes import image_id, make_scene
from vlmfix.methods.base import Method
from vlmfix.methods.registry import method_from_dict
from vlmfix.methods.views import Layer
from vlmfix.observe.ask import answer, look_at
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.watch import AttentionWatch
from vlmfix.observe.words import decode, prompt_tokens

PROMPT, SPLIT, LONGEST, AT_ONCE, SCENES, LISTED = "Describe the image.", "heldout", 160, 8, 80, 4


@dataclass(frozen=True)
class Before(AttentionWatch):
    """The weights before a method edits them; an ``AttentionWatch`` behind the method sees them afterwards."""

    name = "before"


class Log:
    """Attention weights of one sample: per forward and layer ``[num_heads, rows, keys]``, fp32."""

    def __init__(self) -> None:
        self.forwards: list[dict[int, torch.Tensor]] = []
        self._seen: Any = None

    def see(self, weights: torch.Tensor, allowed: torch.Tensor, layer: Layer) -> None:
        """Keep a copy: methods edit in place."""
        if layer.forward is not self._seen:
            self._seen = layer.forward
            self.forwards.append({})
        rows = weights[0].float().cpu().clone()
        kept = self.forwards[-1].get(layer.site.layer_idx)
        self.forwards[-1][layer.site.layer_idx] = rows if kept is None else torch.cat([kept, rows], dim=1)

    def last_rows(self, num_keys: int) -> torch.Tensor:
        """The row that predicts each word, keys behind it 0: ``[layers, num_heads, steps, keys]``."""
        rows = [torch.stack([step[at][:, -1] for at in sorted(step)]) for step in self.forwards]
        return torch.stack([torch.nn.functional.pad(row, (0, num_keys - row.shape[-1])) for row in rows], dim=2)


def first_changed(model: Any, processor: Any, method: Method) -> tuple[int, int, int]:
    """The first scene in whose caption a method names other objects, and in how many of the scenes up to it none did.

    Returns:
        The scene; how many were looked at; in how many of these the caption changed at all.
    """
    matcher, wrapped, changed = ChairMatcher("original"), PromptBuilder(processor)(PROMPT), 0
    for start in range(0, SCENES, AT_ONCE):
        scenes = [Image.fromarray(make_scene(image_id(SPLIT, start + n)).pixels) for n in range(AT_ONCE)]
        inputs = encode(processor, [wrapped] * AT_ONCE, scenes, model)
        said = []
        for acting in (vlmfix.NoMethod(), method):
            with vlmfix.patched(model, acting):
                said.append([decode(processor.tokenizer, ids) for ids in answer(model, inputs, LONGEST).words])
        for number, (stock, patched) in enumerate(zip(*said, strict=True)):
            changed += stock != patched
            if set(matcher.match(stock).nodes) != set(matcher.match(patched).nodes):
                return start + number, start + number + 1, changed
    raise SystemExit(f"{method.name} changes the objects of none of {SCENES} captions")


def case_of(model: Any, processor: Any, number: int) -> Case:
    """A scene and the question about it."""
    scene, matcher = make_scene(image_id(SPLIT, number)), ChairMatcher("original")
    return Case(
        model=model,
        processor=processor,
        prompts=PromptBuilder(processor),
        picture=Image.fromarray(scene.pixels),
        question=PROMPT,
        objects=frozenset(matcher.node(name) for name in scene.counts()),
        scene_words=frozenset(),
        max_new_tokens=LONGEST,
    )


@torch.no_grad()
def watched(case: Case, method: Method, rows: str) -> tuple[Log, Log, torch.Tensor, list[int]]:
    """Let the patched model answer.

    Returns:
        Its weights before and after the method's edits, which of its tokens are the image's, the answer's ids.
    """
    before, after, inputs = Log(), Log(), case.inputs()
    watches = Before(before.see, rows=rows), AttentionWatch(after.see, rows=rows)  # type: ignore[arg-type]
    with vlmfix.patched(case.model, [watches[0], method, watches[1]]):
        said = answer(case.model, inputs, case.max_new_tokens).tokens[0]
    image = prompt_tokens(look_at(case.model, "mechanics", inputs).anatomy, inputs).image[0]
    return before, after, image, list(said)


def groups_of(image: torch.Tensor, num_keys: int) -> dict[str, torch.Tensor]:
    """What a key is: bool ``[keys]`` by name."""
    at, length = torch.arange(num_keys), len(image)
    is_image = torch.nn.functional.pad(image, (0, num_keys - length))
    return {
        "first token": at == 0,
        "other text": ~is_image & (at > 0) & (at < length),
        "image": is_image,
        "words written": at >= length,
    }


def names_of(case: Case, image: torch.Tensor, written: Sequence[int]) -> list[str]:
    """What each key is called: patches by their row and column, other tokens as written."""
    ids = [*case.inputs()["input_ids"][0].tolist(), *written]
    side, order = round(int(image.sum()) ** 0.5), (image.cumsum(0) - 1).tolist()
    patch = [f"patch {order[at] // side + 1},{order[at] % side + 1}" if image[at] else "" for at in range(len(image))]
    return [
        patch[at] if at < len(image) and image[at] else spelt(case.processor.tokenizer.decode([token]))
        for at, token in enumerate(ids)
    ]


def spelt(token: str) -> str:
    """A token that can be seen."""
    return f"“{token.strip()}”" if token.strip() else "line break" if "\n" in token else "blank"


def redistribution(case: Case, method: Any, versions: tuple[Version, ...], framed: torch.Tensor) -> Picture:
    """Of a method that moves weights from sinks to others (VAR, ACT): from where, to where, in which heads."""
    before_log, after_log, image, written = watched(case, method, "last")
    num_keys = len(image) + len(after_log.forwards) - 1
    before, after = before_log.last_rows(num_keys), after_log.last_rows(num_keys)
    change = after - before
    edited = change.abs().sum(-1) > 1e-6  # [layers, heads, steps]
    is_sink = edited[..., None] & (change < -1e-7)
    old, new, sinks = before[edited], after[edited], is_sink[edited]  # [rows, keys]
    names = names_of(case, image, written[: num_keys - len(image)])
    lost = ((old - new) * sinks).mean(0)
    rows = [
        (f"sink: {names[at]}", float((old * sinks).mean(0)[at]), float((new * sinks).mean(0)[at]))
        for at in lost.topk(LISTED).indices.tolist()
    ]
    shown = torch.zeros(num_keys, dtype=torch.bool)
    shown[lost.topk(LISTED).indices] = True
    groups = {"other sinks": sinks & ~shown}
    groups |= {f"{name}, no sink": keys & ~sinks for name, keys in groups_of(image, num_keys).items()}
    rows += [(name, *(float((each * keys).sum(-1).mean()) for each in (old, new))) for name, keys in groups.items()]
    kept = method.beta if method.name == "act" else 1 - method.recycle
    share, patches = 100 * float(edited.float().mean()), slice(0, len(image))
    return Picture(
        f"sinks keep {100 * kept:.0f} % of their weight; edited are {share:.0f} % of the rows",
        case.picture,
        [
            ("how often a patch is a sink\n(% of edited rows)", 100 * sinks.float().mean(0)[patches][image]),
            ("what each patch loses or gains\n(points of attention)", 100 * (new - old).mean(0)[patches][image]),
        ],
        ("attention moved,\n% of a row", 50 * change.abs().sum(-1).mean(-1), framed),
        ("where edited rows look", ("before", "after"), [row for row in rows if max(row[1:]) > 5e-4]),
        versions,
    )


def reinforcement(case: Case, method: Any, versions: tuple[Version, ...], framed: torch.Tensor) -> Picture:
    """Of VHR: how far heads move without the image, which it chose, and what these look at."""
    seen = probes.head_divergence(case.model, case.inputs())
    with vlmfix.patched(case.model, method):
        status = vlmfix.status(case.model)
    assert status is not None
    acts = torch.zeros(seen.selected[0].shape, dtype=torch.bool)
    acts[list(status.layers)] = True
    chosen = seen.selected[0] & acts
    _, log, image, _ = watched(case, method, "last")
    num_keys = len(image) + len(log.forwards) - 1
    weights = log.last_rows(num_keys).mean(2)  # [layers, heads, keys]
    mine, others = weights[chosen].mean(0), weights[acts & ~chosen].mean(0)
    groups = groups_of(image, num_keys)
    rows = [(name, float(others[keys].sum()), float(mine[keys].sum())) for name, keys in groups.items()]
    on_image = [100 * each[: len(image)][image] for each in (mine, others)]
    return Picture(
        f"{int(chosen.sum())} of the {int(acts.sum())} heads of its layers are chosen (framed); their outputs grow by "
        f"{100 * (method.alpha - 1):.0f} %",
        case.picture,
        [
            ("where chosen heads look\n(% of attention)", on_image[0]),
            ("where the others look\n(% of attention)", on_image[1]),
        ],
        ("how far the output moves\nwithout the image (VHD)", seen.divergence[0, 0], chosen),
        ("what heads look at", ("not chosen", "chosen"), rows),
        versions,
        one_scale=True,
    )


def opening(case: Case, method: Method, versions: tuple[Version, ...], framed: torch.Tensor) -> Picture:
    """Of MMA: how much the image's tokens look at the question behind them."""
    _, after, image, _ = watched(case, method, "all")
    _, stock, _, _ = watched(case, vlmfix.NoMethod(), "all")
    prompt, plain = (torch.stack([log.forwards[0][at] for at in sorted(log.forwards[0])]) for log in (after, stock))
    behind = torch.arange(len(image)) > int(image.nonzero().max())
    opened = prompt[:, :, image][..., behind]  # [layers, heads, patches, question]
    names = [name for name, is_behind in zip(names_of(case, image, ()), behind.tolist(), strict=True) if is_behind]
    rows = [(name, 0.0, float(value)) for name, value in zip(names, opened.mean((0, 1, 2)), strict=True)]
    moved = (prompt[:, :, -1] - plain[:, :, -1]).mean((0, 1))
    return Picture(
        f"patches give {100 * float(opened.sum(-1).mean()):.0f} % of their attention to the question, which the stock "
        "model hides from them",
        case.picture,
        [
            ("how much each patch looks at\nthe question (% of attention)", 100 * opened.sum(-1).mean((0, 1))),
            ("what each patch loses or gains in\nthe prompt's last row (points)", 100 * moved[image]),
        ],
        ("patches look at\nthe question, %", 100 * opened.sum(-1).mean(-1), framed),
        ("what patches see of it", ("before", "after"), rows),
        versions,
    )


MAKERS = {"vhr": reinforcement, "var": redistribution, "act": redistribution, "mma": opening}


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--method", nargs="+", choices=MAKERS, default=list(MAKERS), help="default: all")
    options = parser.parse_args()
    model, processor = testbed.load("smol")
    config, recipe = model.config.text_config, strengths_on("smol")[0]
    for name in options.method:
        method = method_from_dict(recipe.get(name, {"method": name}))
        number, looked_at, changed = first_changed(model, processor, method)
        case = case_of(model, processor, number)
        (spec,) = (spec for spec in method_specs({name: method}) if spec.role == "method")
        versions = inspect_picture(case, [spec], title="").versions
        framed = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
        for layer, head in getattr(method, "heads", None) or ():
            framed[layer, head] = 1
        picture = MAKERS[name](case, method, versions, framed)
        picture.title = f"{spec.describe()}, scene {number} of {SPLIT}: {picture.title}"
        save(draw(picture), options.out / f"{name}.png")
        names = [{word.name for word in version.words if word.name} for version in versions]
        print(
            f"{method!r}\n  scene {number}, the first whose objects change; captions changed: {changed} of {looked_at}"
        )
        print(f"  no longer named: {sorted(names[0] - names[1])}, newly named: {sorted(names[1] - names[0])}")
        for version in versions:
            print(f"  {version.label}: {version.caption}")


if __name__ == "__main__":
    main()
