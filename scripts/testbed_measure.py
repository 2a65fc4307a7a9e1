"""Measures an unpatched model on the testbed: the figures of its model card.

``python scripts/testbed_measure.py --split heldout --num-images 400`` prints one JSON object; ``--model smol`` takes
the larger model, in bfloat16. Captions, questions and scores come from the modules of the ordinary evaluation; nothing
here knows any hallucination method.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmfix.evals.benchmarks.chair.figures import score_captions
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher, ground_truth
from vlmfix.evals.benchmarks.object_questions import SPLITS as POPE_SPLITS
from vlmfix.evals.benchmarks.object_questions import PopeQuestion, build_questions
from vlmfix.evals.benchmarks.yes_no import score_labels
from vlmfix.evals.data.coco import CocoData, load_image
from vlmfix.evals.stats.table import Table
from vlmfix.evals.testbed import MODEL_DIR, MODELS, PROMPTS, model_folder, prepare
from vlmfix.evals.testbed.scenes import IMAGE_SIZE, NAMES, SPLITS, scene_kind
from vlmfix.evals.testbed.vocabulary import SCENES
from vlmfix.observe.ask import answer, next_logits
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.words import decode, need_yes_no_tokens

__all__ = ["Reader", "measure", "reader_of"]


class Reader:
    """A model with its processor, asked in batches.

    Args:
        model_dir: A ``from_pretrained`` folder.
        batch_size: Rows per batch.
        dtype: Type of the weights.
    """

    def __init__(self, model_dir: Path = MODEL_DIR, batch_size: int = 64, dtype: torch.dtype = torch.float32) -> None:
        self.processor = AutoProcessor.from_pretrained(model_dir)
        self.model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=dtype).eval()
        self.prompt = PromptBuilder(self.processor)
        self.batch_size = batch_size
        self._answered: dict[tuple[bytes, str], tuple[str, float]] = {}

    def batches(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Iterator[Any]:
        """Model inputs, ``batch_size`` rows at a time."""
        for start in range(0, len(texts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield encode(self.processor, [self.prompt(text) for text in texts[rows]], images[rows], self.model)

    @torch.inference_mode()
    def captions(self, images: Sequence[Image.Image], instruction: str, max_new_tokens: int = 128) -> list[str]:
        """Greedy captions."""
        batches = self.batches(images, [instruction] * len(images))
        answers = [ids for inputs in batches for ids in answer(self.model, inputs, max_new_tokens).words]
        return [decode(self.processor.tokenizer, ids) for ids in answers]

    def answers(self, images: Sequence[Image.Image], texts: Sequence[str]) -> tuple[list[str], list[float]]:
        """The most probable first word of each answer, and its yes-minus-no logit (of all spellings together).

        A question about a picture is asked once: the splits of POPE share theirs, and the blank images are one.
        """
        keys = [(sha256(image.tobytes()).digest(), text) for image, text in zip(images, texts, strict=True)]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._answered}
        yes_no = need_yes_no_tokens(self.processor.tokenizer)
        found: list[tuple[str, float]] = []
        for inputs in self.batches(list(new.values()), [text for _, text in new]):
            logits = next_logits(self.model, inputs)[:, -1]
            words = [self.processor.tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]
            found += zip(words, yes_no.log_odds(logits).tolist(), strict=True)
        self._answered.update(zip(new, found, strict=True))
        pairs = [self._answered[key] for key in keys]
        return [word for word, _ in pairs], [score for _, score in pairs]

    @torch.inference_mode()
    def internals(self, images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, Any]:
        """Attention mass on the image and massive activations while the model writes the given captions.

        Attention: mean over images and over the rows behind the image, per layer; the range is over heads. ``phi`` of
        dimension d is |x_d| / rms(x) of a layer's input (arXiv 2503.03321); a sink has phi > 20 in its dimensions.
        """
        self.model.set_attn_implementation("eager")
        mass, first, share, phi_first, phi_image, norms = [], [], [], [], [], []
        for picture, caption in zip(images, captions, strict=True):
            text = self.prompt(PROMPTS["describe"]) + " " + caption
            inputs = self.processor(images=picture, text=text, return_tensors="pt").to(self.model.dtype)
            out = self.model(**inputs, output_attentions=True, output_hidden_states=True)
            image = inputs["input_ids"][0] == self.model.config.image_token_id
            start = int(image.nonzero()[-1]) + 1
            weights = torch.stack(out.attentions)[:, 0, :, start:]  # [L, H, rows, keys]
            mass.append(weights[..., image].sum(-1).mean(-1))
            first.append(weights[..., 0].mean(-1))
            patch = weights[..., image].mean((1, 2))
            share.append(patch.amax(-1) / patch.mean(-1))
            states = torch.stack(out.hidden_states[:-1])[:, 0]  # [L, T, D], the input of each layer
            phi = states.abs() / (states.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            phi_first.append(phi[:, 0].amax(-1))
            phi_image.append(phi[:, image].amax((1, 2)))
            size = states.norm(dim=-1)
            norms.append(size[:, image].amax(-1) / size.median(-1).values)
        self.model.set_attn_implementation("sdpa")
        per_head = torch.stack(mass).mean(0)
        peak = torch.stack([torch.stack(phi_first).amax(0), torch.stack(phi_image).amax(0)])
        return {
            "image_mass": _round(per_head.mean(-1)),
            "image_mass_heads": [_round(per_head.amin(-1)), _round(per_head.amax(-1))],
            "image_mass_mean": round(float(per_head.mean()), 3),
            "first_token_mass": _round(torch.stack(first).mean((0, 2))),
            "top_patch_over_mean": _round(torch.stack(share).mean(0)),
            "phi_first_token_max": _round(peak[0], 1),
            "phi_image_tokens_max": _round(peak[1], 1),
            "image_token_norm_over_median_max": _round(torch.stack(norms).amax(0), 2),
        }


def _round(values: torch.Tensor, digits: int = 3) -> list[float]:
    return [round(float(value), digits) for value in values]


def _percent(summary: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v if k.startswith("length") else 100 * v, 1) for k, v in summary.items() if v == v}


def mention_rates(
    nodes: Mapping[int, Sequence[str]], truth: Mapping[int, frozenset[str]]
) -> dict[str, dict[str, float]]:
    """How often captions mention objects, by presence and by being typical of the scene, in percent."""
    tally = {(present, typical): [0, 0] for present in (True, False) for typical in (True, False)}
    for number, mentioned in nodes.items():
        expected, said = SCENES[scene_kind(number)].typical, set(mentioned)
        for name in NAMES:
            cell = tally[(name in truth[number], name in expected)]
            cell[0] += name in said
            cell[1] += 1
    rates = {key: 100 * said / max(1, total) for key, (said, total) in tally.items()}
    return {
        "present": {"typical": round(rates[True, True], 2), "intruder": round(rates[True, False], 2)},
        "absent": {
            "typical": round(rates[False, True], 2),
            "atypical": round(rates[False, False], 3),
            "ratio": round(rates[False, True] / max(rates[False, False], 1e-9), 1),
        },
    }


def measure(reader: Reader, folder: Path, num_internals: int = 50) -> dict[str, Any]:
    """All figures of one folder of scenes.

    Args:
        reader: The model.
        folder: From :func:`vlmfix.evals.testbed.prepare`.
        num_internals: Images whose attention and activations are read.
    """
    coco, matcher = CocoData.load(folder), ChairMatcher()
    ids = list(coco.image_ids)
    images = {number: load_image(coco.image(number).path) for number in ids}
    truth = ground_truth(coco, ids, matcher)
    texts = reader.captions(list(images.values()), PROMPTS["describe"])
    table = score_captions(dict(zip(ids, texts, strict=True)), truth, matcher)
    position = _position_rates(table.nodes, [truth[int(number)] for number in table.image_ids])
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))
    result: dict[str, Any] = {
        "images": len(ids),
        "chair": _percent(table.summary()),
        "chair_95": _intervals(table, ("chair_s", "chair_i", "recall", "f1")),
        "mentions_percent": mention_rates(dict(zip(ids, table.nodes, strict=True)), truth),
        "wrong_by_mention_position": position,
        "blank_caption": reader.captions([blank], PROMPTS["describe"])[0],
        "pope": {},
        "pope_blank": {},
        "pope_suffix": {},
    }
    for split in POPE_SPLITS:
        questions = build_questions(truth, split)
        shown = [images[question.image_id] for question in questions]
        asked = [question.text for question in questions]
        result["pope"][split] = _pope(reader, questions, shown, asked)
        result["pope_blank"][split] = _pope(reader, questions, [blank] * len(questions), asked)
        if split == "adversarial":
            asked = [f"{text}\n{PROMPTS['answer_suffix']}" for text in asked]
            result["pope_suffix"][split] = _pope(reader, questions, shown, asked)
    result["internals"] = reader.internals(list(images.values())[:num_internals], texts[:num_internals])
    result["examples"] = texts[:5]
    return result


def _pope(
    reader: Reader, questions: Sequence[PopeQuestion], images: Sequence[Image.Image], texts: Sequence[str]
) -> dict[str, Any]:
    words, scores = reader.answers(images, texts)
    table = score_labels([q.label for q in questions], words, image_ids=[q.image_id for q in questions], scores=scores)
    counts = {"n": len(table), "unparsed": table.counts()["unparsed"]}
    return _percent(table.summary()) | counts | {"accuracy_95": _intervals(table, ["accuracy"])["accuracy"]}


def _intervals(table: Table, names: Sequence[str]) -> dict[str, list[float]]:
    """95 % bootstrap intervals over images, in percent."""
    figures = {figure.name: figure.statistic for figure in table.FIGURES}
    found = {name: figures[name].interval(table) for name in names}
    return {name: [round(100 * interval.low, 1), round(100 * interval.high, 1)] for name, interval in found.items()}


def _position_rates(nodes: Sequence[Sequence[str]], truth: Sequence[frozenset[str]]) -> list[float]:
    """Share of wrong mentions at the 1st, 2nd, ... 6th place of a caption, in percent."""
    rates = []
    for place in range(6):
        wrong = [said[place] not in gt for said, gt in zip(nodes, truth, strict=True) if len(said) > place]
        rates.append(round(100 * float(np.mean(wrong)), 1) if wrong else float("nan"))
    return rates


def reader_of(model: str) -> Reader:
    """The reader of a model by name or folder: ``tiny`` in float32, others in bfloat16."""
    folder = model_folder(model) if model in MODELS else Path(model)
    if folder == MODEL_DIR:
        return Reader(folder)
    return Reader(folder, batch_size=16, dtype=torch.bfloat16)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="heldout")
    parser.add_argument("--num-images", type=int, default=400)
    parser.add_argument("--model", default="tiny", help="name or folder (default: tiny)")
    parser.add_argument("--out", type=Path, help="write the JSON object here as well")
    args = parser.parse_args()
    figures = measure(reader_of(args.model), prepare(args.split, args.num_images))
    text = json.dumps({"split": args.split, **figures}, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    _main()
