"""From a question and an image to what a model reads: the text of a prompt, and a processor's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmfix.errors import DataError, VlmfixError
from vlmfix.model.devices import input_device


class PromptBuilder:
    """Turns a question into the text a processor expects.

    Args:
        processor: A transformers processor.
        use_template: Wrap the question into the processor's chat template (one user turn: image, then text).
            Otherwise the question must hold the processor's image placeholder itself, and there is one turn only.

    Raises:
        VlmfixError: A template is wanted and the processor has none.
    """

    def __init__(self, processor: Any, *, use_template: bool = True) -> None:
        self._processor = processor
        self.use_template = use_template
        if use_template and not has_template(processor):
            raise VlmfixError(
                f"this model's {type(processor).__name__} has no chat template; type --no-chat-template and give the "
                "whole prompt, such as --prompt 'USER: <image>\\nDescribe the image. ASSISTANT:' and "
                "--pope-prompt 'USER: <image>\\n{question} ASSISTANT:'"
            )

    def __call__(self, question: str, *, image: bool = True, before: Sequence[tuple[str, str]] = ()) -> str:
        """Return the prompt text of one question.

        Args:
            question: What the user says.
            image: Whether there is an image, which the first turn shows.
            before: Earlier turns: what the user said, and what was answered.

        Raises:
            VlmfixError: Without a template, when the text has no place for the image, or there are earlier turns.
        """
        if self.use_template:
            messages: list[dict[str, Any]] = []
            for said, answer in (*before, (question, "")):
                content = [{"type": "image"}] if image and not messages else []
                messages.append({"role": "user", "content": [*content, {"type": "text", "text": said}]})
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            return str(self._processor.apply_chat_template(messages[:-1], add_generation_prompt=True))
        if before:
            raise VlmfixError("a second turn needs the chat template; leave --no-chat-template out")
        image_token = getattr(self._processor, "image_token", None)
        if not image:
            return question.replace(f"{image_token}\n", "").replace(str(image_token), "") if image_token else question
        if image_token and image_token not in question:
            raise VlmfixError(f"the prompt {question!r} has no place for the image; put {image_token} where it belongs")
        return question


def has_template(processor: Any) -> bool:
    """Whether a processor has a chat template."""
    return bool(getattr(processor, "chat_template", None))


def encode(processor: Any, prompts: Sequence[str], images: Sequence[Any], model: Any = None) -> Any:
    """Return the inputs of a batch, padded on the side of the processor's tokenizer.

    Args:
        processor: A transformers processor.
        prompts: Texts, from a ``PromptBuilder``.
        images: One per prompt; ``None`` for each where none of them has an image.
        model: The model that will read them. By default they stay on the CPU, in fp32.

    Raises:
        DataError: The processor rejects a prompt.
    """
    bos = processor.tokenizer.bos_token
    # A chat template that already wrote the first token must not get a second one.
    is_begun = bool(bos) and prompts[0].startswith(bos)
    pictures = {} if images[0] is None else {"images": [[image] for image in images]}
    try:
        inputs = processor(
            **pictures, text=list(prompts), padding=True, add_special_tokens=not is_begun, return_tensors="pt"
        )
    except (ValueError, TypeError) as error:
        raise DataError(f"The processor rejects the prompt {prompts[0]!r}: {error}") from error
    return inputs if model is None else inputs.to(input_device(model), model.dtype)
