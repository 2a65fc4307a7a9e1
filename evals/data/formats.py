"""Rows as some tools write them, in one form: OpenAI's API and its batches, lmms-eval, lm-evaluation-harness."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vlmfix.errors import DataError

from .matching import Row

_FAILED = "Failed to obtain answer via API"
"""What VLMEvalKit writes in place of an answer that it did not get."""

_CUSTOM_ID = re.compile(r"(?:(?:request|req|task|question|q|id|row|item)[-_:]?|(.+)[-_:/])?(\d+)")


def unify(rows: Sequence[Row]) -> list[Row]:
    """Rows in one form, without those that hold no answer because the call failed.

    Raises:
        DataError: A row has several answers, or none that is a text; or there are several rows per question, one for
            each way of filtering.
    """
    filters = sorted({str(row.fields["filter"]) for row in rows if "filter" in row.fields and _is_harness(row.fields)})
    if len(filters) > 1:
        raise DataError(
            f"{rows[0].where}: the file holds every answer {len(filters)} times, by the filters {', '.join(filters)}: "
            "keep the lines of one of them"
        )
    found = []
    for row in rows:
        if _is_api(row.fields):
            fields = _from_api(row)
        elif _is_harness(row.fields):
            fields = _from_harness(row)
        else:
            fields = row.fields
        if fields is not None and not any(isinstance(v, str) and _FAILED in v for v in fields.values()):
            found.append(row if fields is row.fields else Row(row.where, fields))
    return found


def labelled(rows: Sequence[Row], text_key: str | None, names: Mapping[str, str] = MappingProxyType({})) -> list[Row]:
    """Rows of a benchmark whose files hold the right answer as ``answer``, which is called ``label`` here.

    Args:
        rows: As the file has them.
        text_key: The field that the user names as the model's text, which keeps its name.
        names: Names of other fields -> what they are called here.
    """
    called = {**names, "answer": "label"}
    return [
        Row(row.where, {key if key == text_key else called.get(key, key): value for key, value in row.fields.items()})
        for row in rows
    ]


def _is_api(fields: Mapping[str, Any]) -> bool:
    response = fields.get("response")
    batch = "custom_id" in fields and (isinstance(response, Mapping) or response is None)
    return batch or isinstance(fields.get("choices"), list) or fields.get("object") == "response"


def _from_api(row: Row) -> Mapping[str, Any] | None:
    """The fields of an answer of OpenAI's API, of one that follows it, or of a line of a batch; None for an error."""
    fields, response = row.fields, row.fields.get("response")
    body: Any = fields
    if isinstance(response, Mapping) or ("custom_id" in fields and "choices" not in fields):
        if fields.get("error") or not isinstance(response, Mapping) or response.get("status_code", 200) != 200:
            return None
        body = response.get("body", response)
    if not isinstance(body, Mapping):
        raise DataError(f"{row.where}: expected an object in 'body', found {str(body)[:40]!r}")
    kept = {k: v for k, v in fields.items() if k not in ("choices", "response", "id", "output", "object", "error")}
    text, reason = _said(body, row.where)
    kept |= {"response": text} | ({} if reason is None else {"finish_reason": reason})
    custom = fields.get("custom_id")
    if custom is None and not any(key in kept for key in ("question_id", "image_id", "image")):
        raise DataError(f"{row.where}: expected 'custom_id', because 'id' is the server's and batches are in no order")
    if custom is not None and (parts := _CUSTOM_ID.fullmatch(str(custom))):
        kept |= {"question_id": parts[2], "id": int(parts[2])} | ({"split": parts[1]} if parts[1] else {})
    elif custom is not None:
        kept.setdefault("question_id", str(custom))
    return kept


def _said(body: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """The text of a response and why it ended."""
    choices = body.get("choices")
    if isinstance(choices, list):
        if len(choices) != 1 or not isinstance(choices[0], Mapping):
            raise DataError(f"{where}: expected one answer in 'choices', found {len(choices)}: keep one of them")
        choice = choices[0]
        message = choice.get("message")
        text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
        reason = choice.get("finish_reason")
    else:
        output = body.get("output")
        parts = [p for o in output if isinstance(o, Mapping) for p in o.get("content") or ()] if output else []
        text, reason = [p for p in parts if isinstance(p, Mapping) and p.get("type") == "output_text"], None
        if body.get("status") == "incomplete":
            reason = "incomplete"
    if isinstance(text, list):
        text = "".join(str(p.get("text", "")) for p in text if isinstance(p, Mapping))
    if reason == "content_filter" and text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{where}: expected the text of the message, found {str(text)[:40]!r}")
    return text, reason


def _is_harness(fields: Mapping[str, Any]) -> bool:
    return "filtered_resps" in fields and ("doc_id" in fields or "doc" in fields)


def _from_harness(row: Row) -> Mapping[str, Any]:
    """The fields of a sample of lmms-eval or lm-evaluation-harness."""
    fields, resps = row.fields, row.fields["filtered_resps"]
    while isinstance(resps, list) and len(resps) == 1:
        resps = resps[0]
    if not isinstance(resps, str):
        raise DataError(
            f"{row.where}: expected one text in 'filtered_resps', found {str(resps)[:40]!r}: of several answers keep "
            "one; tasks by likelihood generate none"
        )
    kept = {k: v for k, v in fields.items() if k in ("target", "input", "question_id", "split", "category")}
    kept["response"] = resps
    sources = [v for v in fields.values() if isinstance(v, Mapping)]
    for name in ("question_id", "question", "image", "image_source"):
        value = next((v[name] for v in sources if isinstance(v.get(name), str | int)), None)
        if value is not None:
            kept.setdefault(name, value)
    media = fields.get("input_media")
    if isinstance(media, list) and len(media) == 1 and isinstance(media[0], str):
        kept["image"] = media[0]
    return kept
