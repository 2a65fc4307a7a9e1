"""Answer files as people have them: the model's text is never the truth and never the question, whatever keeps them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families.saved_llava import write_lines

from vlmfix.cli import main
from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.custom.task import contains, is_exact
from vlmfix.evals.data.matching import id_text, image_name, is_asked
from vlmfix.evals.data.records import parse_image_id, read_rows
from vlmfix.evals.data.thinking import without_thinking

IMAGES = ("COCO_val2014_000000900001.jpg", "COCO_val2014_000000900002.jpg")
OBJECTS = {"random": ("person", "kite", "dog", "sink"), "popular": ("person", "chair", "dog", "car")}
TRUTH = ("yes", "no", "yes", "no")
SUFFIX = "\nAnswer the question using a single word or phrase."
ALL_NO = {"n": 4, "TP": 0, "FP": 0, "TN": 2, "FN": 2, "unparsed": 0}
RIGHT = {"n": 4, "TP": 2, "FP": 0, "TN": 2, "FN": 0, "unparsed": 0}


def asked(i: int, split: str = "random") -> str:
    return f"Is there a {OBJECTS[split][i]} in the image?"


def image(i: int) -> str:
    return IMAGES[i // 2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Question files of two splits."""
    for split in OBJECTS:
        rows = [{"question_id": i + 1, "image": image(i), "text": asked(i, split), "label": TRUTH[i]} for i in range(4)]
        write_lines(tmp_path / f"coco_pope_{split}.json", rows)
    return tmp_path


def counts(folder: Path, path: Path, *more: str, splits: tuple[str, ...] = ("random",)) -> dict[str, Any]:
    """Split -> counts of a file that is scored."""
    out = folder / "out.json"
    questions = [str(folder / f"coco_pope_{split}.json") for split in splits]
    assert main(["score", "pope", str(path), "--questions", *questions, "--out", str(out), *more]) == 0
    return {split: part["counts"] for split, part in json.loads(out.read_text())["splits"].items()}


def refusal(
    folder: Path, path: Path, capsys: pytest.CaptureFixture[str], *more: str, splits: tuple[str, ...] = ("random",)
) -> str:
    questions = [str(folder / f"coco_pope_{split}.json") for split in splits]
    assert main(["score", "pope", str(path), "--questions", *questions, *more]) == 2
    return capsys.readouterr().err


def rows(make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(i) for i in range(4)]


SCORED: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, int]]] = {
    "the truth beside a prediction": (lambda i: {"answer": TRUTH[i], "prediction": "No"}, ALL_NO),
    "the truth beside another name": (lambda i: {"answer": TRUTH[i], "model_output": "No"}, ALL_NO),
    "a question row with an output": (lambda i: {"text": asked(i), "label": TRUTH[i], "model_output": "No"}, ALL_NO),
    "a question row with an answer": (lambda i: {"text": asked(i), "label": TRUTH[i], "answer": "No"}, ALL_NO),
    "answers that are all right": (lambda i: {"answer": TRUTH[i]}, RIGHT),
    "a parsed answer beside the response": (lambda i: {"response": "No, none.", "answer": "no"}, ALL_NO),
    "LLaVA's": (lambda i: {"prompt": asked(i) + SUFFIX, "text": "No", "answer_id": "x", "model_id": "m"}, ALL_NO),
    "a chat template": (lambda i: {"prompt": f"USER: <image>\n{asked(i)} ASSISTANT:", "text": "No"}, ALL_NO),
    "the first release's spelling": (
        lambda i: {"prompt": asked(i).replace("image", "imange"), "text": "No"},
        ALL_NO,
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_the_models_text_is_found(name: str, folder: Path) -> None:
    make, expected = SCORED[name]
    path = write_lines(folder / "a.jsonl", rows(lambda i: {"question_id": i + 1, **make(i)})[::-1])
    assert counts(folder, path) == {"random": expected}


REFUSED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "questions without answers": (lambda i: {"text": asked(i)}, "'text' is the question"),
    "the truth beside an unknown name": (
        lambda i: {"answer": TRUTH[i], "reply": "No"},
        "every 'answer' equals its label, and 'reply' ('No') differs",
    ),
    "two texts": (lambda i: {"prediction": "No", "response": "Yes"}, "'prediction' and 'response' differ"),
    "an answer that nothing explains": (lambda i: {"answer": "yes", "prediction": "No"}, "'answer' and 'prediction'"),
    "another split's questions": (
        lambda i: {"question": asked(i, "popular"), "prediction": "No"},
        "line 2: 'question'",
    ),
    "another image": (lambda i: {"image": image(3 - i), "prediction": "No"}, "line 1: the image is 900002"),
    "another truth of AMBER's name": (lambda i: {"truth": "yes", "prediction": "No"}, "line 2: the truth is 'yes'"),
    "other labels": (lambda i: {"gt": "yes", "prediction": "No"}, "line 2: the gt is 'yes'"),
    "nothing that can be read": (lambda i: {"answer": "A picture."}, "says yes or no"),
    "an unknown finish reason": (lambda i: {"answer": "No", "finish_reason": "tired"}, "finish reason 'tired'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_in_doubt_is_refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = REFUSED[name]
    path = write_lines(folder / "a.jsonl", rows(lambda i: {"question_id": i + 1, **make(i)}))
    assert message in refusal(folder, path, capsys)
    if name == "the truth beside an unknown name":
        assert counts(folder, path, "--text-key", "reply") == {"random": ALL_NO}
        assert counts(folder, path, "--text-key", "answer") == {"random": RIGHT}


def test_rows_without_ids_are_matched_by_image_and_question(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = rows(lambda i: {"image": image(i), "question": asked(i), "answer": TRUTH[i].title()})
    path = write_lines(folder / "a.jsonl", [made[2], made[0], made[3], made[1]])
    assert counts(folder, path) == {"random": RIGHT}
    path = write_lines(folder / "a.jsonl", [{k: v for k, v in row.items() if k != "image"} for row in made])
    assert counts(folder, path) == {"random": RIGHT}, "in order, as every question says"
    write_lines(path, [{"question": made[i]["question"], "answer": "No"} for i in (1, 0, 2, 3)])
    assert "line 1: 'question' is" in refusal(folder, path, capsys)
    assert "line 1: 'question' is" in refusal(folder, path, capsys, "--by-order")
    write_lines(path, [{"answer": "No"}] * 4)
    assert "type --by-order" in refusal(folder, path, capsys)
    assert counts(folder, path, "--by-order") == {"random": ALL_NO}


def test_llavas_numbering(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("popular", "random")
    made = [
        {"question_id": start + i + 1, "prompt": asked(i, split) + SUFFIX, "text": "No"}
        for start, split in ((10_000_000, "random"), (20_000_000, "popular"))
        for i in range(4)
    ]
    path = write_lines(folder / "a.jsonl", made)
    assert counts(folder, path, splits=both) == {"random": ALL_NO, "popular": ALL_NO}
    assert "another order" in refusal(folder, path, capsys, "--by-order", splits=both)
    assert "popular questions of the first release" in refusal(folder, path, capsys)
    moved = [{**row, "question_id": row["question_id"] % 10_000_000} for row in made[:4]]
    assert counts(folder, write_lines(path, [*moved, *made[4:]]), splits=both)["random"] == ALL_NO, "texts decide"


def test_rows_of_tools(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness = rows(
        lambda i: (
            {"doc_id": i, "target": TRUTH[i], "filtered_resps": ["No"], "input": asked(i) + SUFFIX}
            | {"input_media": [f"/x/{image(i)}"], "pope_accuracy": {"question_id": str(i + 1), "prediction": TRUTH[i]}}
        )
    )
    path = write_lines(folder / "a.jsonl", harness[::-1])
    assert counts(folder, path) == {"random": ALL_NO}
    twice = [{**row, "filter": name} for row in harness for name in ("none", "strict")]
    assert "filters none, strict" in refusal(folder, write_lines(path, twice), capsys)

    def batch(i: int, text: str, reason: str = "stop") -> dict[str, Any]:
        choice = {"index": 0, "message": {"content": [{"type": "text", "text": text}]}, "finish_reason": reason}
        body = {"choices": [choice]}
        return {
            "id": "x",
            "custom_id": f"random-{i + 1}",
            "response": {"status_code": 200, "body": body},
            "error": None,
        }

    path = write_lines(path, [batch(i, "No.") for i in (2, 0, 3, 1)])
    assert counts(folder, path) == {"random": ALL_NO}
    failed = {"id": "y", "custom_id": "random-4", "response": None, "error": {"code": "x"}}
    write_lines(path, [batch(2, "No."), batch(0, "No."), failed, batch(1, "No.")])
    assert "answers 3 of 4 questions" in refusal(folder, path, capsys)
    assert counts(folder, path, "--subset")["random"]["n"] == 3
    assert "1 rows hold no answer" in capsys.readouterr().out
    nested = {"random": {str(i + 1): {"text": asked(i), "response": "No", "answer": "no"} for i in range(4)}}
    path.write_text(json.dumps(nested, indent=1))
    assert counts(folder, path) == {"random": ALL_NO}
    shared = [
        {"index": 100 + i, "image_path": image(i), "question": asked(i, split), "answer": TRUTH[i].title()}
        | {"category": "random,popular" if i in (0, 2) else split, "prediction": "No"}
        for split, i in (("random", 0), ("random", 1), ("random", 2), ("random", 3), ("popular", 1), ("popular", 3))
    ]
    write_lines(path, shared)
    assert counts(folder, path, splits=("random", "popular")) == {"random": ALL_NO, "popular": ALL_NO}


def test_releases_are_never_merged(folder: Path, refused: Any) -> None:
    path = write_lines(folder / "a.jsonl", rows(lambda i: {"question_id": i + 1, "answer": "No"}))
    other = folder / "first"
    other.mkdir()
    (other / "coco_pope_random.json").write_bytes((folder / "coco_pope_random.json").read_bytes())
    words = ["--questions", str(folder / "coco_pope_random.json"), str(other / "coco_pope_random.json")]
    assert "never merged" in refused(["score", "pope", str(path), *words])


def test_exact_repeats_count_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = rows(lambda i: {"question_id": i + 1, "answer": "No"})
    path = write_lines(folder / "a.jsonl", [*made, *made])
    assert counts(folder, path) == {"random": ALL_NO}
    assert "4 lines repeat an earlier one" in capsys.readouterr().out
    write_lines(path, [*made, {**made[0], "answer": "Yes"}])
    assert "is answered already" in refusal(folder, path, capsys)
    labelled = rows(lambda i: {"image": image(i), "question": asked(i), "label": TRUTH[i], "answer": "No"})
    out = folder / "own.json"
    assert main(["score", "pope", str(write_lines(path, [*labelled, *labelled])), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["splits"]["all"]["counts"] == ALL_NO
    own: list[dict[str, Any]] = [*labelled, {**labelled[0], "answer": "Yes"}]
    assert main(["score", "pope", str(write_lines(path, own))]) == 2
    assert "is answered already, on" in capsys.readouterr().err
    twice = [{"question_id": 1, "label": "no", "answer": "No"}] * 2
    assert main(["score", "pope", str(write_lines(path, twice))]) == 2, "of two splits, or one line twice"
    assert "say what tells them apart" in capsys.readouterr().err


# What keeps the rows.


def as_table(made: list[dict[str, Any]], separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(made[0]), delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(made)
    return text.getvalue().encode()


def as_lines(made: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def as_parquet(made: list[dict[str, Any]]) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(arrow.Table.from_pylist(made), sink)
    return sink.getvalue()


def as_arrow(made: list[dict[str, Any]], stream: bool = False) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    table, sink = arrow.Table.from_pylist(made), io.BytesIO()
    with (arrow.ipc.new_stream if stream else arrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def as_workbook(made: list[dict[str, Any]]) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book, sink = openpyxl.Workbook(), io.BytesIO()
    book.active.append(["notes"])
    sheet = book.create_sheet("answers")
    for values in (list(made[0]), *(list(row.values()) for row in made)):
        sheet.append(values)
    book.save(sink)
    return sink.getvalue()


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "lines": as_lines,
    "list": lambda made: json.dumps(made).encode(),
    "pretty": lambda made: json.dumps(made, indent=1).encode(),
    "back to back": lambda made: "\n".join(json.dumps(row, indent=4) for row in made).encode(),
    "wrapped": lambda made: json.dumps({"info": 1, "results": made}).encode(),
    "bom, crlf": lambda made: b"\xef\xbb\xbf" + as_lines(made).replace(b"\n", b"\r\n"),
    "csv": lambda made: as_table(made, ","),
    "tsv": lambda made: as_table(made, "\t"),
    "gzip": lambda made: gzip.compress(as_lines(made)),
    "bzip2": lambda made: bz2.compress(as_lines(made)),
    "xz": lambda made: lzma.compress(as_table(made, "\t")),
    "parquet": as_parquet,
    "arrow": as_arrow,
    "arrow stream": lambda made: as_arrow(made, True),
    "xlsx": as_workbook,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_figure(container: str, folder: Path) -> None:
    made = rows(lambda i: {"question_id": float(i + 1), "answer": TRUTH[i], "prediction": "No, there\nis none."})
    path = folder / "answers.bin"
    path.write_bytes(CONTAINERS[container](made))
    assert counts(folder, path) == {"random": ALL_NO}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PAR1 no data", "damaged parquet file"),
        (b"ARROW1 no data", "damaged arrow file"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"PK\x03\x04....", "zip archive"),
        (b"\x80\x04\x95....", "pickle"),
        (b"BZh9 no data", "damaged bzip2 file"),
        (b"\xfd7zXZ\x00 no data", "damaged xz file"),
        (b"%PDF-1.4", "PDF"),
        (b" " * 257 + b"ustar", "tar archive"),
        (b"question_id,answer\n1,No\n2\n", "line 3: 1 columns"),
        (b"question_id,answer,answer\n1,No,No\n", "name every column, once"),
        (b'question_id,answer\n1,"No" he said\n', "line 2: no table"),
        (b'{"answer": "No", "answer": "Yes"}', "the key 'answer' stands twice"),
        (b'{"answer": "No"} {"answer": "Yes"}', "more behind the first JSON value"),
        (b'{"images": [], "annotations": [{"image_id": 1, "caption": "A dog."}]}', "which are the truth"),
        (b'{"results": [{"a": 1}], "answers": [{"a": 1}]}', "lists under 'answers' and 'results'"),
    ],
)
def test_what_cannot_be_read_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_rows(path)
    assert "a.txt" in str(error.value)


@pytest.mark.parametrize(
    "value", ["226988_9", "COCO_val2014_000000226988_25.jpg", 226988.5, "COCO_val2014_42.jpg", "a7.jpg"]
)
def test_ids_are_never_cut_out_of_names(value: object) -> None:
    with pytest.raises(DataError, match="no image id"):
        parse_image_id(value, "here")


def test_two_ids_of_a_row_must_agree(tmp_path: Path, refused: Any) -> None:
    truth = tmp_path / "t.json"
    truth.write_text(json.dumps({"objects": {"10": ["dog"], "20": []}}))
    path = write_lines(tmp_path / "c.jsonl", [{"image_id": 10, "file_name": "000000000020.jpg", "caption": "A dog."}])
    assert "'image_id' is image 10, and 'file_name' is image 20" in refused(
        ["score", "chair", str(path), "--ground-truth", str(truth)]
    )


@pytest.mark.parametrize(
    ("reason", "cut"), [("max_tokens", 1), ("MAX_TOKENS", 1), ("length", 1), ("STOP", 0), ("end_turn", 0), ("eos", 0)]
)
def test_finish_reasons(reason: str, cut: int, tmp_path: Path) -> None:
    truth, out = tmp_path / "t.json", tmp_path / "o.json"
    truth.write_text(json.dumps({"objects": {"10": ["dog"]}}))
    path = write_lines(tmp_path / "c.jsonl", [{"image_id": 10, "caption": "A dog.", "finish_reason": reason}])
    assert main(["score", "chair", str(path), "--ground-truth", str(truth), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["text_quality"]["summary"]["truncation"] == cut


# Thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes.", "Yes."),
        ("<think>No dog? No.</think>\n\nYes.", "Yes."),
        ("No dog? No.</think>Yes.", "Yes."),
        ("<think>Well</think><answer> Yes </answer>", "Yes"),
        ("[THINK]No[/THINK]Yes", "Yes"),
        ("◁think▷no◁/think▷Yes", "Yes"),
        ("<think>No, it is", ""),
        ("I think <b>so</b>", "I think <b>so</b>"),
    ],
)
def test_thinking_is_taken_off(text: str, answer: str) -> None:
    found = without_thinking(text)
    assert found.answer == answer and found.traced == (answer != text)


def test_thinking_is_counted_and_may_be_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = rows(lambda i: {"question_id": i + 1, "response": f"<think>Is there? Yes, no.</think>{TRUTH[i].title()}"})
    path = write_lines(folder / "a.jsonl", made)
    assert counts(folder, path) == {"random": RIGHT}
    assert "4 of 4 answers begin with thinking, which is left out" in capsys.readouterr().out
    assert json.loads((folder / "out.json").read_text())["thinking"] == {"answers": 4, "unfinished": 0, "how": "strip"}
    assert counts(folder, path, "--thinking", "keep")["random"] != RIGHT
    assert "kept as part of the answer" in capsys.readouterr().out


SIGNS = {
    "a special token": ("No</s>", "decode with skip_special_tokens=True"),
    "another one": ("<|im_start|>No.<|im_end|>", "special token '<|im_start|>'"),
    "a space of no width": ("\u200bNo", "U+200B"),
    "a space that is none": ("No\u00a0, there is none.", "U+00A0"),
    "a separator of lines": ("No\u2028There is none.", "U+2028"),
    "a line break that was escaped twice": ("No\\nThere is none.", "escaped twice"),
    "the prompt": ("USER: <image>\nAnswer yes or no. ASSISTANT: Yes", "begins with the prompt"),
    "a prompt of Qwen": ("system\nYou help.\nuser\nAnswer yes or no.\nassistant\nYes", "begins with the prompt"),
    "a prompt of Mistral": ("[INST] Answer yes or no. [/INST] Yes", "begins with the prompt"),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs_that_nobody_said_are_refused(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The official rule splits at blanks, so that each of these is yes to it."""
    text, message = SIGNS[name]
    path = write_lines(folder / "a.jsonl", rows(lambda i: {"question_id": i + 1, "answer": text if i == 2 else "No"}))
    found = refusal(folder, path, capsys)
    assert "line 3" in found and message in found


@pytest.mark.parametrize("text", ["**No**, there is none.", '"No"', "NO!", "(No)"])
def test_signs_that_the_model_wrote_are_told(text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(folder / "a.jsonl", rows(lambda i: {"question_id": i + 1, "answer": text}))
    assert counts(folder, path)["random"] == {**ALL_NO, "TP": 2, "FP": 2, "TN": 0, "FN": 0, "unparsed": 4}
    assert "4 answers stand within signs" in capsys.readouterr().out
    assert counts(folder, path, "--parser", "vlmeval") == {"random": ALL_NO}


def test_signs_that_change_no_reading_are_no_matter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ("Yes\u00a0!", "**Yes**", "Yes, “a person”.", "Yes")
    path = write_lines(folder / "a.jsonl", rows(lambda i: {"question_id": i + 1, "answer": said[i]}))
    assert counts(folder, path)["random"] == {"n": 4, "TP": 2, "FP": 2, "TN": 0, "FN": 0, "unparsed": 0}
    assert "within signs" not in capsys.readouterr().out


def test_odd_containers_and_names(folder: Path) -> None:
    lines = [json.dumps({"question_id": i + 1, "answer": "No"}) + "\n" for i in range(4)]
    mark = b"\xef\xbb\xbf"
    put_together = folder / "a.jsonl"
    put_together.write_bytes(mark + "".join(lines[:2]).encode() + mark + "".join(lines[2:]).encode())
    assert counts(folder, put_together) == {"random": ALL_NO}
    semicolons = folder / "a.csv"
    semicolons.write_bytes(mark + b"question_id;answer\r\n" + b"".join(b"%d;No, none\r\n" % (i + 1) for i in range(4)))
    assert counts(folder, semicolons) == {"random": ALL_NO}
    shouted = rows(lambda i: {"image": "C:\\val\\" + image(i).upper(), "question": asked(i).upper(), "answer": "No"})
    assert counts(folder, write_lines(folder / "b.jsonl", shouted)) == {"random": ALL_NO}
    assert parse_image_id("COCO_VAL2014_000000900001.JPG", "") == 900001


def test_ids_that_a_float_cannot_hold_are_none() -> None:
    """As pandas writes a column of integers with a gap in it."""
    assert id_text(17.0) == "17" and id_text(2**53 + 1) == str(2**53 + 1)
    assert id_text(float(2**53 + 1)) == ""  # which of two it was is lost


def test_accents_are_compared_in_one_form() -> None:
    composed, apart = (unicodedata.normalize(form, "Is there a café?") for form in ("NFC", "NFD"))
    assert composed != apart and is_asked(f"{apart} Answer yes or no.", composed)
    assert image_name(unicodedata.normalize("NFD", "Café.JPG")) == image_name("café.png")
    assert is_exact(unicodedata.normalize("NFD", "Café"), ["café"]) and contains(
        "a cup\u00a0of tea</s>", ["cup of tea"]
    )
