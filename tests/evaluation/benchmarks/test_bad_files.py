"""Damaged files, for every loader: an error with the file, the line and what to do, and nothing half-written."""

import gzip
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families.saved_llava import build_coco_folder
from test_amber import ANNOTATIONS, QUESTIONS, RELATION

from vlmfix.errors import VlmfixError
from vlmfix.evals.data.coco import CocoData
from vlmfix.evals.data.records import read_ids
from vlmfix.evals.power import read_pilot
from vlmfix.evals.run.answer_log import AnswerLog, read_records
from vlmfix.evals.run.folder import read_config
from vlmfix.evals.scores.counts import load_run
from vlmfix.recipes import load_recipe

POPE = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000010.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "COCO_val2014_000000000020.jpg", "text": "Is there a cat in the image?", "label": "no"},
]
HALLUSION = [
    {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": str(i), "question_id": "0"}
    | {"visual_input": "1", "question": "Is it?", "gt_answer_details": "It is.", "gt_answer": "1", "filename": None}
    for i in range(3)
]
MMHAL = [
    {"question_type": kind, "image_id": f"{i}", "image_content": ["cat"], "question": "What?", "gt_answer": "A cat."}
    for i, kind in enumerate(("attribute", "adversarial", "comparison"))
]
MME = [
    {"task": "existence", "image": f"{i // 2}.jpg", "question": f"Is it {i}?", "label": "yes", "answer": "Yes"}
    for i in range(60)
]
RUN = {
    "methods": [
        {"label": "none"},
        {"label": "vhr", "differences": {"chair.chair_s": {"low": -0.1, "high": 0.1, "n": 9}}},
    ],
    "intervals": {"confidence": 0.95},
}
COMPLETE = {"results": {**RUN, "settings": {}, "settings_digest": "d", "command": "vlmfix eval"}}


def lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Loader:
    """A file that somebody hands in.

    Attributes:
        name: Its name in the folder of the others.
        content: What it holds when it is whole.
        load: What reads it, from the folder.
        is_json: Whether it is JSON.
        torn: Whether a torn end is dropped, as in the log of a killed run.
    """

    name: str
    content: str
    load: Callable[[Path], object]
    is_json: bool = True
    torn: bool = False


def score(*words: str) -> Callable[[Path], object]:
    """``vlmfix score`` with ``@name`` for files of the folder; errors come out as they went in."""

    def run(folder: Path) -> None:
        from vlmfix.cli import command_parser

        given = [str(folder / word[1:]) if word.startswith("@") else word for word in words]
        options = command_parser().parse_args(["score", *given, "--out", str(folder / "out.json")])
        options.score(options)
        assert (folder / "out.json").is_file()

    return run


def written_coco() -> tuple[str, str]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = build_coco_folder(Path(name) / "c", num_images=3)
        return tuple((folder / f"{kind}_val2014.json").read_text() for kind in ("instances", "captions"))  # type: ignore[return-value]


INSTANCES, REFERENCES = written_coco()
CHAIR = score(
    "chair", "--captions", "@captions.jsonl", "--ground-truth", "@truth.json", "--baseline", "@baseline.jsonl"
)
ASKED = score("pope", "--answers", "@answers.jsonl", "--questions", "@coco_pope_random.json")
AMBER = score("amber", "@responses.jsonl", "--data", "@amber")
HALLUSIONBENCH = score("hallusionbench", "@judged.jsonl", "--by-order", "--questions", "@HallusionBench.json")
MMHALBENCH = score("mmhal", "@rated.jsonl", "--by-order", "--questions", "@response_template.json")
COCO = score("chair", "--captions", "@captions.jsonl", "--ground-truth", "@coco")

LOADERS = [
    Loader("captions.jsonl", lines({"image_id": i, "caption": f"A dog and a cat, {i}."} for i in (10, 20, 30)), CHAIR),
    Loader("baseline.jsonl", lines({"image_id": i, "caption": f"A dog, {i}."} for i in (10, 20, 30)), CHAIR),
    Loader("truth.json", json.dumps({"objects": {"10": ["dog"], "20": [], "30": ["cat"]}}, indent=1), CHAIR),
    Loader("coco/instances_val2014.json", INSTANCES, COCO),
    Loader("coco/captions_val2014.json", REFERENCES, COCO),
    Loader("answers.jsonl", lines({"question_id": i, "answer": "Yes, a dog."} for i in (1, 2)), ASKED),
    Loader("coco_pope_random.json", lines(POPE), ASKED),
    Loader("responses.jsonl", lines({"id": i, "response": text} for i, text in QUESTIONS.items()), AMBER),
    Loader("amber/annotations.json", json.dumps(ANNOTATIONS), AMBER),
    Loader("amber/relation.json", json.dumps(RELATION), AMBER),
    Loader("amber/safe_words.txt", "lamp\nshoe\n", AMBER, is_json=False),
    Loader("judged.jsonl", lines({"judge": "1", "note": "right"} for _ in HALLUSION), HALLUSIONBENCH),
    Loader("HallusionBench.json", json.dumps(HALLUSION, indent=1), HALLUSIONBENCH),
    Loader("rated.jsonl", lines({"rating": 3, "note": "half right"} for _ in MMHAL), MMHALBENCH),
    Loader("response_template.json", json.dumps(MMHAL), MMHALBENCH),
    Loader("mme.jsonl", lines(MME), score("mme", "@mme.jsonl")),
    Loader(
        "mme/existence.txt",
        "".join(f"{i // 2}.jpg\tIs it {i}?\tYes\tYes\n" for i in range(60)),
        score("mme", "@mme"),
        is_json=False,
    ),
    Loader("ids.json", json.dumps([10, "COCO_val2014_000000000020.jpg"]), lambda f: read_ids(f / "ids.json", "--ids")),
    Loader("ids.txt", "10\n20\n30\n", lambda f: read_ids(f / "ids.txt", "--ids"), is_json=False),
    Loader("recipe.json", json.dumps([{"method": "vhr", "alpha": 2.0}]), lambda f: load_recipe(f / "recipe.json")),
    Loader("run/results.json", json.dumps(COMPLETE["results"]), lambda f: (read_pilot(f / "run"), load_run(f / "run"))),
    Loader("run/config.json", json.dumps({"settings": {"seed": 0}}), lambda f: read_config(f / "run")),
    Loader(
        "run/counts.json",
        json.dumps({"settings_digest": "d", "benchmarks": {}, "images": {}}),
        lambda f: load_run(f / "run"),
    ),
    Loader(
        "run/answers.jsonl",
        lines({"key": f"{i}", "text": "A dog."} for i in range(3)),
        lambda f: (read_records(f / "run/answers.jsonl"), AnswerLog(f / "run/answers.jsonl").close()),
        torn=True,
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All files, whole."""
    for loader in LOADERS:
        path = tmp_path / loader.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(loader.content, encoding="utf-8")
    return tmp_path


def each(*, json_only: bool = False, log: bool = True) -> Any:
    chosen = [loader for loader in LOADERS if (loader.is_json or not json_only) and (log or not loader.torn)]
    return pytest.mark.parametrize("loader", chosen, ids=[loader.name for loader in chosen])


def damaged(folder: Path, loader: Loader, data: bytes) -> str:
    """The error that a loader raises for this content; it must name the file, and leave no file behind."""
    path = folder / loader.name
    path.write_bytes(data)
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    with pytest.raises(VlmfixError) as error:
        loader.load(folder)
    message = str(error.value)
    assert path.name in message and len(message) < 1000
    assert before == {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    return message


@each()
def test_whole_files_are_read(folder: Path, loader: Loader) -> None:
    loader.load(folder)


@each(log=False)
def test_harmless_forms_are_read(folder: Path, loader: Loader) -> None:
    content = loader.content.encode()
    for data in (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), gzip.compress(content)):
        (folder / loader.name).write_bytes(data)
        loader.load(folder)


@each(log=False)
def test_missing_file(folder: Path, loader: Loader) -> None:
    path = folder / loader.name
    path.unlink()
    with pytest.raises(VlmfixError, match=re.escape(path.name)):
        loader.load(folder)
    path.mkdir()
    with pytest.raises(VlmfixError, match=re.escape(path.name)):
        loader.load(folder)


@each(log=False)
def test_empty_file(folder: Path, loader: Loader) -> None:
    for content in (b"", b"  \n\n"):
        if loader.name != "amber/safe_words.txt":  # There may be none.
            damaged(folder, loader, content)


@each(json_only=True, log=False)
def test_truncated_file(folder: Path, loader: Loader) -> None:
    content = loader.content.rstrip()[:-2]
    message = damaged(folder, loader, content.encode())
    assert f"line {content.count(chr(10)) + 1}: " in message and "cut off" in message


@each(log=False)
def test_latin_1(folder: Path, loader: Loader) -> None:
    content = loader.content.encode()
    place = content.rstrip().rfind(b"\n") + 2
    message = damaged(folder, loader, content[:place] + "é".encode("latin-1") + content[place:])
    assert f"line {content.count(chr(10).encode(), 0, place) + 1}: byte 0xe9 is no UTF-8" in message
    assert "iconv -f LATIN1" in message


@each(log=False)
def test_other_encodings(folder: Path, loader: Loader) -> None:
    for codec in ("utf-16", "utf-16-le", "utf-32"):
        assert "iconv -f UTF-" in damaged(folder, loader, loader.content.encode(codec))


@each(log=False)
def test_archives_and_pickles(folder: Path, loader: Loader) -> None:
    assert "damaged gzip file" in damaged(folder, loader, gzip.compress(loader.content.encode())[:-9])
    assert "is a pickle" in damaged(folder, loader, pickle.dumps({"a": 1}))
    assert "unpack it" in damaged(folder, loader, b"PK\x03\x04" + b"\x00" * 40)


@each(json_only=True, log=False)
def test_other_json(folder: Path, loader: Loader) -> None:
    for content in ("null", '"text"', "[[]]", "[null]", '{"a": 1}', "{}", "image_id,caption\n1,a dog"):
        damaged(folder, loader, content.encode())


@each(json_only=True, log=False)
def test_deeply_nested(folder: Path, loader: Loader) -> None:
    for content in (b"[" * 100_000, b'{"a": ' * 100_000, b'[{"a": ' + b"[" * 100_000):
        damaged(folder, loader, content)


@each(json_only=True, log=False)
def test_ten_megabytes_in_one_line(folder: Path, loader: Loader) -> None:
    damaged(folder, loader, b"x" * 10_000_000)
    damaged(folder, loader, b'{"image_id": 10, "caption": "' + b"a dog " * 1_700_000)
    # The line breaks got lost.
    damaged(folder, loader, b'{"image_id": 10, "caption": "A dog."}' * 300_000)


def test_ten_megabytes_of_caption(folder: Path) -> None:
    loader = next(each for each in LOADERS if each.name == "captions.jsonl")
    row = {"image_id": 10, "caption": "a dog-" * 1_700_000}
    message = damaged(folder, loader, lines([row]).encode())
    assert "line 1: 'caption' has 10200000 characters" in message and "line breaks" in message


def edited(content: str, change: Callable[[Any], object], *, row: int | None = 1) -> bytes:
    """Content of JSON lines (one row changed) or of one document."""
    if row is None:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()
    rows = [json.loads(line) for line in content.splitlines()]
    change(rows[row])
    return lines(rows).encode()


NAN = float("nan")
FIELDS: list[tuple[str, Callable[[Any], object], str]] = [
    ("captions.jsonl", lambda r: r.pop("image_id"), "line 2: expected 'image_id'"),
    ("captions.jsonl", lambda r: r.update(image_id=NAN), "line 2: 'nan' is no image id"),
    ("captions.jsonl", lambda r: r.update(image_id={"id": 1}), "line 2: .* is no image id"),
    ("captions.jsonl", lambda r: r.update(image_id="cat.jpg"), "line 2: 'cat.jpg' is no image id"),
    ("captions.jsonl", lambda r: r.update(image_id=10), "line 2: image 10 has a caption already, .* line 1"),
    ("captions.jsonl", lambda r: r.update(image_id=40), r"captions\.jsonl: ground-truth file .* has no image 40"),
    ("captions.jsonl", lambda r: r.pop("caption"), "line 2: expected one of caption, text"),
    ("captions.jsonl", lambda r: r.update(caption=NAN), "line 2: 'caption' is NaN"),
    ("captions.jsonl", lambda r: r.update(caption=None), "line 2: 'caption' is null"),
    ("captions.jsonl", lambda r: r.update(caption=["A dog."]), "line 2: expected text in 'caption'"),
    ("captions.jsonl", lambda r: r.update(caption={"text": "A dog."}), "line 2: expected text in 'caption'"),
    ("captions.jsonl", lambda r: r.update(caption=5), "line 2: expected text in 'caption'"),
    ("captions.jsonl", lambda r: r.update(text="A cup."), "line 2: 'caption' and 'text' differ"),
    ("captions.jsonl", lambda r: r.update(truncated="no"), "line 2: expected true or false in 'truncated'"),
    ("answers.jsonl", lambda r: r.update(question_id=9), "line 2: the question files have no random question 9"),
    (
        "answers.jsonl",
        lambda r: r.update(question_id=1, answer="No."),
        "line 2: random question 1 is answered already",
    ),
    ("answers.jsonl", lambda r: r.update(answer=None), "line 2: 'answer' is null"),
    ("answers.jsonl", lambda r: r.update(answer=[]), "line 2: expected text in 'answer'"),
    ("coco_pope_random.json", lambda r: r.pop("label"), "line 2: expected question_id, image, text and label"),
    ("coco_pope_random.json", lambda r: r.update(label=["yes"]), "line 2: expected question_id"),
    ("coco_pope_random.json", lambda r: r.update(label="perhaps"), "line 2: expected the label yes or no"),
    ("coco_pope_random.json", lambda r: r.update(question_id=1), "line 2: the question id 1 is used already"),
    ("responses.jsonl", lambda r: r.update(id=NAN), "line 2: expected 'id'"),
    ("responses.jsonl", lambda r: r.update(id=3), "line 2: item 3 is answered already, on .* line 1"),
    ("responses.jsonl", lambda r: r.update(id=1, response="A dog."), r"responses\.jsonl: 1 of the"),
    ("responses.jsonl", lambda r: r.update(response={}), "line 2: expected text in 'response'"),
    ("judged.jsonl", lambda r: r.update(judge=NAN), "line 2: expected 'judge' from 0 to 2"),
    ("judged.jsonl", lambda r: r.update(judge=[1]), "line 2: expected 'judge' from 0 to 2"),
    ("rated.jsonl", lambda r: r.update(rating=9), "line 2: expected 'rating' from 0 to 6"),
    ("mme.jsonl", lambda r: r.update(task="smell"), "line 2: MME has no task 'smell'"),
    ("mme.jsonl", lambda r: r.update(question="Is it 0?"), r"mme\.jsonl: MME existence, image 0\.jpg: expected one"),
    ("mme.jsonl", lambda r: r.update(image="30.jpg"), "expected one answer to each of two questions"),
    ("mme.jsonl", lambda r: r.update(answer=None), "line 2: 'answer' is null"),
    ("mme.jsonl", lambda r: r.update(label=5), "line 2: expected the label yes or no"),
    ("mme.jsonl", lambda r: r.update(answer=["Yes"]), "line 2: expected text in 'answer'"),
    ("run/answers.jsonl", lambda r: r.pop("key"), "line 2: expected a JSON object with a 'key'"),
    ("run/answers.jsonl", lambda r: r.update(key=[]), "line 2: expected text in 'key'"),
]
DOCUMENTS: list[tuple[str, Callable[[Any], object], str]] = [
    ("truth.json", lambda d: d["objects"].update({"10": ["unicorn"]}), "image 10: 'unicorn' is none of the 80"),
    ("truth.json", lambda d: d["objects"].update({"10": {"a": 1}}), "image 10: expected a list of objects"),
    ("truth.json", lambda d: d["objects"].pop("10"), "has no image 10"),
    ("coco/instances_val2014.json", lambda d: d["annotations"][0].update(category_id=[1]), "wrong type"),
    ("coco/instances_val2014.json", lambda d: d["annotations"][0].update(category_id=99), "annotates category 99"),
    ("coco/instances_val2014.json", lambda d: d["annotations"][0].update(image_id=NAN), "annotates image nan"),
    ("coco/instances_val2014.json", lambda d: d["images"][0].update(id=10.5), "the image id 10.5"),
    ("coco/instances_val2014.json", lambda d: d["images"][0].update(file_name=None), "expected text under 'file_name'"),
    (
        "coco/instances_val2014.json",
        lambda d: [c.update(name=f"unicorn {c['id']}") for c in d["categories"]],
        "none of",
    ),
    ("coco/instances_val2014.json", lambda d: d["images"].append(d["images"][0]), "uses 1 ids twice"),
    ("coco/captions_val2014.json", lambda d: d["annotations"][0].update(caption=["A dog."]), "expected text under"),
    ("coco/captions_val2014.json", lambda d: d["annotations"].clear(), "has no entries under 'annotations'"),
    ("amber/annotations.json", lambda d: d[0].update(id=NAN), "entry 1: expected an integer id"),
    ("amber/relation.json", lambda d: d.update(dog="cat"), "maps each word to a list of words"),
    ("HallusionBench.json", lambda d: d[1].update(gt_answer=[1]), "line 1, entry 2: expected gt_answer 0 or 1"),
    ("response_template.json", lambda d: d[1].update(image_content=None), "line 1, entry 2: expected image_content"),
    ("ids.json", lambda d: d.append([5]), "line 1, entry 3: .* is no image id"),
    ("ids.json", lambda d: d.append("²"), "line 1, entry 3: .* is no image id"),
    ("recipe.json", lambda d: d[0].update(alpha="much"), r"recipe\.json.*alpha"),
    ("run/config.json", lambda d: d.update(settings=[]), r"config\.json is not the configuration of a run"),
    ("run/results.json", lambda d: d.update(methods=[5]), "holds no results of a finished run"),
    ("run/results.json", lambda d: d.update(intervals=[]), "holds no results of a finished run"),
]
CASES = [(name, change, message, 1) for name, change, message in FIELDS]
CASES += [(name, change, message, None) for name, change, message in DOCUMENTS]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "change", "message", "row"), CASES, ids=[f"{name}-{message[:40]}" for name, _, message, _ in CASES]
)
def test_wrong_fields(folder: Path, name: str, change: Callable[[Any], object], message: str, row: int | None) -> None:
    loader = next(loader for loader in LOADERS if loader.name == name)
    (folder / name).write_bytes(edited(loader.content, change, row=row))
    with pytest.raises(VlmfixError, match=message):
        loader.load(folder)
    assert not (folder / "out.json").exists()


def test_a_log_loses_its_torn_end_only(folder: Path) -> None:
    path = folder / "run" / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "3", "te')
    assert set(read_records(path)) == {"0", "1", "2"}
    with AnswerLog(path) as log:
        assert set(log.records) == {"0", "1", "2"}
    assert path.read_bytes() == whole
    for other in (gzip.compress(whole), whole.decode().encode("utf-16"), b"notes"):  # not a log: left as it is
        path.write_bytes(other)
        with pytest.raises(VlmfixError, match=r"answers\.jsonl line 1"):
            AnswerLog(path)
        assert path.read_bytes() == other


def test_missing_images_of_a_coco_folder(folder: Path) -> None:
    with pytest.raises(VlmfixError, match=r"none of the 3 images of instances_val2014\.json is in"):
        CocoData.load(folder / "coco").select()


def test_results_that_cannot_be_written(folder: Path, refused: Any) -> None:
    words = [
        "score",
        "chair",
        "--captions",
        str(folder / "captions.jsonl"),
        "--ground-truth",
        str(folder / "truth.json"),
    ]
    (folder / "taken").mkdir()
    assert "cannot write" in refused([*words, "--out", str(folder / "taken")])
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []
