"""What is inspected: a picture and a question, with the model that is asked, and how that sees the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as Images

from vlmfix.observe.ask import look_at
from vlmfix.observe.prompts import PromptBuilder, encode
from vlmfix.observe.words import yes_no_tokens
from vlmfix.probes.spans import square

from ..benchmarks.object_choice import PROMPT as POPE_PROMPT
from ..report.page import data_uri
from ..testbed.vocabulary import article

if TYPE_CHECKING:
    from PIL.Image import Image

ASKED_AT_ONCE = 16
"""Questions per batch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture and a question, with the model that is asked.

    Attributes:
        model: The model.
        processor: Its processor.
        prompts: Wraps a question into a prompt.
        picture: The picture.
        question: What is asked.
        objects: What is in the picture, where known, as CHAIR's objects.
        scene_words: Further words that count as context.
        max_new_tokens: Limit of the answer.
    """

    model: Any
    processor: Any
    prompts: PromptBuilder
    picture: Image
    question: str
    objects: frozenset[str] | None
    scene_words: frozenset[str]
    max_new_tokens: int

    def inputs(self, *questions: str) -> Any:
        """Return the model's inputs for the question, or for others about the same picture."""
        asked = [self.prompts(each) for each in questions or (self.question,)]
        return encode(self.processor, asked, [self.picture] * len(asked), self.model)

    @torch.no_grad()
    def ask_for(self, names: Sequence[str]) -> list[float | None]:
        """Ask whether objects are in the picture.

        Returns:
            The probability of yes against no; None where the tokenizer has no single tokens for them.
        """
        answers = yes_no_tokens(self.processor.tokenizer)
        if answers is None:
            return [None] * len(names)
        distinct = sorted(set(names))
        found: dict[str, float] = {}
        for start in range(0, len(distinct), ASKED_AT_ONCE):
            part = distinct[start : start + ASKED_AT_ONCE]
            questions = [POPE_PROMPT.format(question=f"Is there {article(name)} {name} in the image?") for name in part]
            inputs = self.inputs(*questions)
            logits = look_at(self.model, "inspect", inputs).answer(inputs, logits=True).logits[0]
            found |= dict(zip(part, answers.log_odds(logits).sigmoid().tolist(), strict=True))
        return [found[name] for name in names]


def picture_as_seen(case: Case, inputs: Any, num_image_tokens: int) -> tuple[str, tuple[int, int] | None]:
    """Return the picture as a data URI, as the model sees it where that is one picture, and the grid of its tokens."""
    pixels = inputs.get("pixel_values")
    processor = case.processor.image_processor
    grid = grid_of(case.model, inputs, num_image_tokens)
    picture = case.picture
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if grid is not None and pixels is not None and pixels.dim() == 4 and mean is not None and std is not None:
        scale = pixels.new_tensor(std).float()[:, None, None], pixels.new_tensor(mean).float()[:, None, None]
        seen = (pixels[0].float() * scale[0] + scale[1]).clamp(0, 1) * 255
        picture = Images.fromarray(seen.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    if max(picture.size) < 512:  # small pictures stay sharp
        factor = 512 // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Images.Resampling.NEAREST)
    else:
        picture = picture.copy()
        picture.thumbnail((768, 768))
    return data_uri(picture, quality=88), grid


def grid_of(model: Any, inputs: Any, num_image_tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of the image's tokens; None for tiles, several images, or no rectangle."""
    shape = inputs.get("image_grid_thw")
    if shape is not None:  # Qwen-VL and its kin
        merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
        frames, rows, columns = (int(size) for size in shape[0])
        grid = (rows // merge, columns // merge)
        return grid if len(shape) == 1 and frames == 1 and grid[0] * grid[1] == num_image_tokens else None
    pixels = inputs.get("pixel_values")
    is_single = pixels is not None and pixels.dim() >= 4 and pixels.shape[:-3].numel() == 1
    return square(num_image_tokens) if is_single else None
