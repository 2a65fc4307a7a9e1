"""Ordinary chat of the untouched language model: its own replies, which the training keeps alive."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from train_smol_packing import Encoder
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from vlmfix.evals.testbed.smol.model import PAD_ID, TURN_END_ID

__all__ = ["load_chats"]

_MAX_TOKENS, _BATCH = 56, 16

_TOPICS = (
    "photosynthesis", "gravity", "the water cycle", "a black hole", "inflation", "democracy", "a neural network",
    "the moon", "bread", "jazz", "chess", "a volcano", "the internet", "a vaccine", "an atom", "poetry", "the sun",
    "evolution", "a castle", "coffee",
)  # fmt: skip
_FORMS = ("What is {}?", "Explain {} to a child.", "Write one sentence about {}.")
_PLAIN = (
    "Hello!", "Hi, how are you?", "Who are you?", "What can you help me with?", "Thank you very much.",
    "What is the capital of France?", "What is the capital of Japan?", "What is the largest planet?",
    "How many days are in a week?", "How many legs does a spider have?", "What is 2 + 2?", "What is 7 times 8?",
    "Is the sky blue?", "Is fire cold?", "Is water wet? Answer yes or no.", "Is Paris in Germany?",
    "Do fish live in water?", "Can birds fly?", "Name three fruits.", "Name three colors.", "Name four animals.",
    "Give me a synonym for happy.", "What is the opposite of hot?", "Translate 'good morning' to French.",
    "Correct this sentence: She go to school.", "Write a short poem about the sea.", "Tell me a joke.",
    "Write a greeting for a birthday card.", "Suggest a name for a cat.", "How do I boil an egg?",
    "How do I stay healthy?", "Give me a tip for better sleep.", "How can I learn a language?", "What should I cook?",
    "Write a sentence that contains the word 'river'.", "Complete: Once upon a time", "Who wrote Romeo and Juliet?",
    "When did the second world war end?", "What does DNA stand for?", "Why is the sky blue?", "Why do leaves fall?",
    "Why do we sleep?", "Write a Python function that adds two numbers.", "What is a for loop?",
    "Summarize: The dog ran across the road and hid under a tree because it was raining.",
    "Is this review positive or negative? 'I loved the food.'", "What rhymes with cat?", "Count from one to five.",
    "What is the boiling point of water?", "Which is larger, an ant or an elephant?", "What do bees make?",
    "Describe a typical kitchen.", "Describe a beach.", "What would you find in an office?", "Who lives on a farm?",
    "What do people do at a station?", "What is a bicycle used for?", "List things one needs for a picnic.",
)  # fmt: skip


def load_chats(path: Path, model: LlavaForConditionalGeneration, encoder: Encoder) -> list[tuple[str, list[int]]]:
    """Texts of a user and the model's greedy replies as token ids; generated once and kept in a file (a minute).

    Args:
        path: JSON file.
        model: The model before any training; its language model is moved to bfloat16.
        encoder: Token ids.
    """
    if not path.exists():
        texts = [*_PLAIN, *(form.format(topic) for topic in _TOPICS for form in _FORMS)]
        path.write_text(json.dumps(_replies(texts, model, encoder)), encoding="utf-8")
    return [(text, reply) for text, reply in json.loads(path.read_text(encoding="utf-8"))]


@torch.inference_mode()
def _replies(texts: list[str], model: LlavaForConditionalGeneration, encoder: Encoder) -> list[tuple[str, list[int]]]:
    writer = LlamaForCausalLM(model.config.text_config).eval()
    writer.model.load_state_dict(model.model.language_model.state_dict())
    writer.tie_weights()
    writer.to(torch.bfloat16)
    prompts = sorted(((text, [*encoder.text_prefix, *encoder(text), *encoder.reply]) for text in texts), key=_length)
    found = []
    for start in range(0, len(prompts), _BATCH):
        rows = prompts[start : start + _BATCH]
        size = max(len(ids) for _, ids in rows)
        ids = torch.tensor([[PAD_ID] * (size - len(ids)) + ids for _, ids in rows])
        output = writer.generate(
            input_ids=ids,
            attention_mask=(ids != PAD_ID).long(),
            max_new_tokens=_MAX_TOKENS,
            do_sample=False,
            eos_token_id=TURN_END_ID,
            pad_token_id=PAD_ID,
        )
        for (text, _), reply in zip(rows, output[:, size:].tolist(), strict=True):
            # A reply that was cut off simply has no end to learn.
            end = reply.index(TURN_END_ID) + 1 if TURN_END_ID in reply else len(reply)
            found.append((text, reply[:end]))
    return found


def _length(prompt: tuple[str, list[int]]) -> int:
    return len(prompt[1])
