"""A tiny random LLaVA in the real Hugging Face classes and a tiny COCO folder, both made from nothing in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (
    "a an the is there in of on and with image picture please describe this detail answer question using single word "
    "or phrase yes no user assistant . , ? : ! person dog cat car chair table bottle cup bird horse pizza couch bed tv "
    "dining bus train"
).split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CATEGORIES = ("person", "car", "bird", "cat", "dog", "horse", "bottle", "cup", "pizza", "chair", "couch", "bed", "tv")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tiny_llava(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    image_size: int = 32,
    patch_size: int = 8,
    vision_layers: int = 2,
    chat_template: bool = True,
) -> Path:
    """Save an untrained LLaVA and its processor, as ``save_pretrained`` does.

    The weights are large enough for the answers to depend on the image, and the special tokens are suppressed in
    generation, because an untrained model would emit image placeholders.
    """
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = SPECIAL + WORDS
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 would add token types, which LLaVA refuses
    )
    side = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=side),
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )
    vision = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=hidden_size,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(256, 2 * (image_size // patch_size) ** 2),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=2.0 / parameter[0].numel() ** 0.5)
    model.generation_config.suppress_tokens = [0, 1, 3, 4]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def build_coco_folder(folder: Path, *, num_images: int = 6, seed: int = 0, size: int = 40) -> Path:
    """Write random pictures with annotations in the layout of COCO: every image has three or four objects."""
    rng = np.random.default_rng(seed)
    (folder / "val2014").mkdir(parents=True)
    images, annotations, captions = [], [], []
    for index in range(num_images):
        image_id = 10 * (index + 1)
        name = f"COCO_val2014_{image_id:012d}.png"
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(folder / "val2014" / name)
        images.append({"id": image_id, "file_name": name, "height": size, "width": size})
        objects = rng.choice(len(CATEGORIES), 3 + index % 2, replace=False)
        for category in objects.tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category + 1,
                    "bbox": [1, 1, 9, 9],
                    "area": 81,
                    "iscrowd": 0,
                }
            )
        text = f"A {CATEGORIES[objects[0]]} and a {CATEGORIES[objects[1]]}."
        captions.append({"id": index + 1, "image_id": image_id, "caption": text})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
    _write(folder / "instances_val2014.json", {"images": images, "annotations": annotations, "categories": categories})
    _write(folder / "captions_val2014.json", {"images": images, "annotations": captions})
    return folder


def write_lines(path: Path, rows: Sequence[object]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
