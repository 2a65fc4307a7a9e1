"""Damaged and odd files of answers: a right figure or a clear refusal, never a wrong figure.

Every file is made of answers whose meaning is known. What the official rule makes of them is counted here one by one.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.data.odd_files import Rows, World, worlds

from vlmfix.cli import main
from vlmfix.evals.data.model_text import MODEL_KEYS

TRIALS = int(os.environ.get("VLMFIX_ODD_FILES", "120"))
"""How many files are scored; 1000 takes a minute."""

KEY, PLACE = "prediction", "place of the question"


class Case:
    """A file in the making.

    Attributes:
        rows: Its rows, each with the place of its question.
        meant: What each answer means; None once no figure is right any more.
        told: What was done, for the message of a failure.
        words: What is typed besides.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng, self.words, self.told = world, rng, list[str](), list[str]()
        drawn = [rng.choice(list(said.items())) for said in world.said]
        self.meant: dict[int, Any] | None = {place: meaning for place, (_, meaning) in enumerate(drawn)}
        more = world.truth if world.labels else [{} for _ in drawn]
        self.rows: Rows = [
            {PLACE: place, **world.ids[place], **more[place], KEY: text} for place, (text, _) in enumerate(drawn)
        ]

    @property
    def key(self) -> str:
        return next(key for key in (KEY, *MODEL_KEYS, "answer", "text") if any(key in row for row in self.rows))

    def one(self) -> dict[str, Any]:
        return self.rng.choice(self.rows)

    def add(self, make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.rows = [{**row, **make(row)} for row in self.rows]


# What changes no figure.


def shuffle(case: Case) -> None:
    case.rng.shuffle(case.rows)


def order_of_keys(case: Case) -> None:
    case.rows = [dict(case.rng.sample(list(row.items()), len(row))) for row in case.rows]


def repeat(case: Case) -> None:
    for row in case.rng.sample(case.rows, case.rng.randint(1, 3)):
        case.rows.insert(case.rng.randrange(len(case.rows)), dict(row))


def rename(case: Case) -> None:
    name, key = case.rng.choice((*MODEL_KEYS, "answer", "text")), case.key
    case.rows = [{(name if k == key else k): v for k, v in row.items()} for row in case.rows]


def question_and_image(case: Case) -> None:
    case.add(lambda row: case.world.asked[row[PLACE]])


def question_alone(case: Case) -> None:
    name = case.rng.choice(list(case.world.asked[0]) or [""])
    case.add(lambda row: {k: v for k, v in case.world.asked[row[PLACE]].items() if k == name})


def truth_beside(case: Case) -> None:
    case.add(lambda row: case.world.truth[row[PLACE]])


def thinking(case: Case) -> None:
    def thought(row: dict[str, Any]) -> dict[str, Any]:
        other = case.rng.choice(list(case.world.said[row[PLACE]]))
        return {case.key: f"<think>Is it so? {other} Well.</think>\n{row[case.key]}"} if case.rng.random() < 0.7 else {}

    case.add(thought)


def columns_of_no_concern(case: Case) -> None:
    value = case.rng.choice((None, float("nan"), 0.5, True, {"a": [1]}, [], "", "some-model"))
    case.add(lambda row: {case.rng.choice(("model_id", "metadata", "seconds", "tokens", "run")): value})


def finish_reason(case: Case) -> None:
    case.add(lambda row: {"finish_reason": case.rng.choice(("stop", "length"))})


def ids_of_another_type(case: Case) -> None:
    kind = case.rng.choice((str, float, int))

    def cast(name: str, value: Any) -> Any:
        number = name in ("question_id", "image_id", "id", "index", "Index") and str(value).isdecimal()
        return kind(value) if number else value

    case.rows = [{name: cast(name, value) for name, value in row.items()} for row in case.rows]


def blanks(case: Case) -> None:
    if case.world.verb not in ("amber", "scienceqa"):  # Whose official rules take " Yes" and " A" for no answers.
        case.add(lambda row: {case.key: case.rng.choice(("{}\n", " {}", "{} ")).format(row[case.key])})


def other_words_of_the_model(case: Case) -> None:
    case.add(lambda row: {"reasoning_content": case.rng.choice(list(case.world.said[row[PLACE]]))})


def a_reading_beside(case: Case) -> None:
    """What a parser made of the answer, as DASH-B's and RePOPE's files have it."""
    if all(isinstance(value, bool) for said in case.world.said for value in said.values()) and case.key == "response":
        said = case.world.said
        case.add(lambda row: {"parsed_answer": "yes" if said[row[PLACE]].get(row[case.key].strip()) else "no"})


HARMLESS = (shuffle, order_of_keys, repeat, rename, question_and_image, question_alone, truth_beside, thinking)
HARMLESS += (columns_of_no_concern, finish_reason, ids_of_another_type, blanks, other_words_of_the_model)
HARMLESS += (a_reading_beside,)


# What loses answers: refused, or what is left with --subset.


def lost_rows(case: Case) -> None:
    lost = set(case.rng.sample(range(len(case.world.ids)), case.rng.randint(1, 2)))
    case.rows = [row for row in case.rows if row[PLACE] not in lost]
    _subset(case, lost)


def failed_calls(case: Case) -> None:
    lost = {case.one()[PLACE]}
    case.add(lambda row: {case.key: "Failed to obtain answer via API."} if row[PLACE] in lost else {})
    _subset(case, lost)


def _subset(case: Case, lost: set[int]) -> None:
    if case.world.labels or case.world.verb == "chair":
        pass  # Nothing says what else there is.
    elif case.rng.random() < 0.5 and case.world.verb != "naturalbench":
        case.words = ["--subset"]
    else:
        case.meant = None
    if case.meant is not None:
        case.meant = {place: meaning for place, meaning in case.meant.items() if place not in lost}


# What makes every figure wrong, unless what stands beside an answer tells better.


def no_text(case: Case) -> None:
    case.one()[case.key] = case.rng.choice((None, 7, ["No"], {"a": 1}, float("nan"), True))
    case.meant = None


def no_key(case: Case) -> None:
    del case.one()[case.key]
    case.meant = None


def two_answers(case: Case) -> None:
    row = case.one()
    said = [text for text, meaning in case.world.said[row[PLACE]].items() if meaning != case.meant[row[PLACE]]]
    case.rows.append({**row, case.key: case.rng.choice(said)})
    case.meant = None


def two_texts(case: Case) -> None:
    other = next(key for key in ("response", "model_output") if key != case.key)
    case.add(lambda row: {other: "Something else: yes, B."})
    case.meant = None


def another_truth(case: Case) -> None:
    """The truths of the questions in another order."""
    truth = case.world.truth
    if case.world.labels or len({str(each) for each in truth}) == 1:
        no_text(case)
    else:
        case.add(lambda row: truth[(row[PLACE] + 1) % len(truth)])
        case.meant = None


def another_question(case: Case) -> None:
    asked = case.world.asked
    names = [name for name in asked[0] if len({each[name] for each in asked}) > 1]
    if not names or case.world.labels or case.world.verb == "dashb":
        no_key(case)
    else:
        name = case.rng.choice(names)
        for row in case.rows:
            row[name] = asked[row[PLACE]][name]
        row = case.one()
        others = [each[name] for each in asked if each[name] != row[name]]
        row[name] = case.rng.choice(others)
        case.meant = None


def ids_off_by_one(case: Case) -> None:
    names = [n for n in ("question_id", "image_id", "id", "index", "Index", "img_id") if n in case.world.ids[0]]
    names = [name for name in names if str(case.world.ids[0][name]).isdecimal()]
    if not names or case.world.verb in ("mmstar", "hallusionbench") or case.world.labels:
        return no_text(case)
    case.rows = [{**row, names[0]: int(float(row[names[0]])) + case.rng.choice((-1, 1, 500))} for row in case.rows]
    if not case.world.asked[0].keys() <= case.rows[0].keys() or not {"question", "image"} <= case.rows[0].keys():
        case.meant = None  # Else image and question decide, whatever the ids say.


def unknown_reason(case: Case) -> None:
    case.add(lambda row: {"finish_reason": "tired"})
    case.meant = None


def unknown_split(case: Case) -> None:
    if case.world.verb != "pope" or case.world.labels:
        return unknown_reason(case)
    case.add(lambda row: {"split": case.rng.choice(("adversarial", "train", "random,nothing"))})
    case.one()["split"] = "adversarial"
    case.meant = None


def as_a_batch(case: Case) -> None:
    """What OpenAI's API writes; one call failed."""
    if case.world.verb != "pope" or case.world.labels or len(case.world.words) > 2:
        return lost_rows(case)

    def body(text: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}

    case.rows = [
        {PLACE: row[PLACE], "custom_id": f"random-{row[PLACE] + 1}", "error": None}
        | {"response": {"status_code": 200, "body": body(row[case.key])}}
        for row in case.rows
    ]
    lost = case.one()[PLACE]
    for row in case.rows:
        if row[PLACE] == lost:
            row.update(response=None, error={"code": "x"})
    _subset(case, {lost})


def as_lmms_eval(case: Case) -> None:
    """Rows of a harness, whose own numbers are no ids; one has two answers."""
    if case.world.verb != "pope" or len(case.world.words) > 2 or case.world.labels:
        return lost_rows(case)
    asked, key = case.world.asked, case.key
    case.rows = [
        {PLACE: row[PLACE], "doc_id": place, "filtered_resps": [row[key]], "input": asked[row[PLACE]]["question"]}
        | {"target": case.world.truth[row[PLACE]]["label"], "input_media": [f"/x/{asked[row[PLACE]]['image']}"]}
        for place, row in enumerate({row[PLACE]: row for row in case.rows}.values())
    ]
    if case.rng.random() < 0.5:
        case.one()["filtered_resps"] *= 2
        case.meant = None


def truth_for_answer(case: Case) -> None:
    """The truth under a name of the model's text, and the model's text under a name that nobody knows."""
    (name, _), *_ = [*case.world.truth[0].items(), ("", "")]
    if not name or case.world.labels or case.world.verb == "chair":
        return no_text(case)
    key = case.key
    made = [{**{k: v for k, v in row.items() if k != key}, "reply": row[key]} for row in case.rows]
    case.rows = [{**row, "answer": str(case.world.truth[row[PLACE]][name])} for row in made]
    case.meant = None


def question_for_answer(case: Case) -> None:
    texts = [text for text in case.world.asked[0].values() if str(text).endswith("?")]
    if not texts:
        return no_text(case)
    name = next(name for name, text in case.world.asked[0].items() if str(text).endswith("?"))
    case.add(lambda row: {case.key: case.world.asked[row[PLACE]][name]})
    case.meant = None


HARMFUL = (no_text, no_key, two_answers, two_texts, another_truth, another_question, ids_off_by_one, unknown_reason)
HARMFUL += (truth_for_answer, question_for_answer, unknown_split)
LOSSES = (lost_rows, failed_calls, as_a_batch, as_lmms_eval)


# What keeps the rows, and what happens to it.


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: Rows, separator: str = ",") -> bytes:
    text, names = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


TEXT: dict[str, Callable[[Rows], bytes]] = {
    "lines": lines,
    "list": lambda rows: json.dumps(rows, indent=1).encode(),
    "back to back": lambda rows: "\n".join(json.dumps(row, indent=4) for row in rows).encode(),
    "wrapped": lambda rows: json.dumps({"results": rows, "info": "x"}).encode(),
}
CONTAINERS: dict[str, Callable[[Rows], bytes]] = {
    **TEXT,
    "BOM, CRLF": lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n"),
    "gzip": lambda rows: gzip.compress(lines(rows)),
    "bzip2": lambda rows: bz2.compress(TEXT["list"](rows)),
    "xz": lambda rows: lzma.compress(lines(rows)),
}
TABLES: dict[str, Callable[[Rows], bytes]] = {
    "csv": table,
    "tsv": lambda rows: table(rows, "\t"),
    "csv with a BOM": lambda rows: b"\xef\xbb\xbf" + table(rows),
    "parquet": parquet,
}


def hurt(data: bytes, key: str, rng: random.Random) -> tuple[str, bytes]:
    """Damage to the text of a file, of which no figure is right."""
    body = data.rstrip()
    kind = rng.choice(("cut", "latin-1", "junk", "utf-16", "zeros", "half a packed file", "key twice"))
    if kind == "cut":
        return kind, body[: rng.randrange(1, len(body) - 1)].rstrip(b"\n")[:-1] or b"{"
    if kind == "latin-1":
        place = rng.randrange(len(body))
        return kind, body[:place] + b"\xe9" + body[place:]
    if kind == "junk":
        found = body.split(b"\n")
        found.insert(rng.randrange(len(found) + 1), rng.choice((b"null", b"[]", b"{", b"oops", b'"No"', b"{}", b"1,2")))
        return kind, b"\n".join(found)
    if kind == "utf-16":
        return kind, body.decode().encode(rng.choice(("utf-16", "utf-16-le", "utf-32")))
    if kind == "zeros":
        return kind, body + b"\x00" * 40
    if kind == "half a packed file":
        packed = gzip.compress(body)
        return kind, packed[: len(packed) - rng.randint(1, len(packed) // 2)]
    name = f'"{key}": '.encode()
    return kind, body.replace(name, name + b'"Yes", ' + name, 1)


def written(case: Case, rng: random.Random) -> bytes:
    rows = [{name: value for name, value in row.items() if name != PLACE} for row in case.rows]
    forms = {tuple(sorted((name, type(value).__name__) for name, value in row.items())) for row in rows}
    flat = len(forms) == 1 and {kind for form in forms for _, kind in form} <= {"str", "int"}
    name = rng.choice([*CONTAINERS, *(TABLES if flat else ())])
    case.told.append(name)
    return (CONTAINERS | TABLES)[name](rows)


def outcome(case: Case, path: Path) -> Any:
    """The figures; None for a refusal."""
    out = path.with_name("out.json")
    out.unlink(missing_ok=True)
    status = main(["score", case.world.verb, str(path), *case.world.words, *case.words, "--out", str(out)])
    assert status in (0, 2) and out.exists() == (status == 0), case.told
    return case.world.figures(json.loads(out.read_text())) if status == 0 else None


def trial(made: dict[str, World], folder: Path, seed: int) -> str:
    """Score one file; returns what came of it."""
    rng = random.Random(seed)
    name = rng.choice(list(made))
    case = Case(made[name], rng)
    case.told.append(name)
    kind = rng.choice(("harmless", "harmless", "lossy", "harmful", "bytes"))
    for step in rng.sample(HARMLESS, rng.randint(0, 4)):
        step(case)
        case.told.append(step.__name__)
    if kind in ("lossy", "harmful"):
        step = rng.choice(HARMFUL if kind == "harmful" else LOSSES)
        step(case)
        case.told.append(step.__name__)
    if kind == "bytes":
        rows = [{key: value for key, value in row.items() if key != PLACE} for row in case.rows]
        how, data = hurt(TEXT[rng.choice(list(TEXT))](rows), case.key, rng)
        case.told.append(how)
        case.meant = None
    else:
        data = written(case, rng)
    path = folder / "answers"
    path.write_bytes(data)
    found = outcome(case, path)
    right = None if case.meant is None else case.world.expected(case.meant)
    assert found in (None, right), f"seed {seed}: {case.told}: {found} instead of {right}\n{data[:3000]!r}"
    return f"{kind}, {'refused' if found is None else 'right'}"


@pytest.fixture
def made(tmp_path: Path) -> dict[str, World]:
    return worlds(tmp_path)


def test_a_right_figure_or_a_refusal(made, tmp_path):
    found = Counter(trial(made, tmp_path, seed) for seed in range(TRIALS))
    print(dict(found))
    assert found["harmless, right"] > 3 * found["harmless, refused"], "what harms nothing is mostly scored"


def test_every_container_of_every_benchmark(made, tmp_path):
    for name, world in made.items():
        for container, write in (CONTAINERS | TABLES).items():
            case = Case(world, random.Random(name + container))
            rows = [{key: value for key, value in row.items() if key != PLACE} for row in case.rows]
            (tmp_path / "answers").write_bytes(write(rows))
            assert outcome(case, tmp_path / "answers") == world.expected(case.meant), (name, container)


def test_special_tokens_behind_answers_never_make_a_wrong_figure(made, tmp_path):
    """As decoders leave them that skip none."""
    for name, world in made.items():
        for token in ("</s>", "<|im_end|>"):
            case = Case(world, random.Random(name))
            case.add(lambda row, token=token: {KEY: row[KEY] + token})
            (tmp_path / "answers").write_bytes(written(case, random.Random(name)))
            assert outcome(case, tmp_path / "answers") in (None, world.expected(case.meant)), (name, token)
