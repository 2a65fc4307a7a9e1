"""``vlmfix score chair`` and ``score pope``: the forms of files they take, comparisons, and the official figures."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from families.saved_llava import write_lines
from shared_data import DATA, needs_data, official

from vlmfix.cli import main
from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.chair.task import read_captions
from vlmfix.evals.benchmarks.chair.truth import load_ground_truth
from vlmfix.evals.benchmarks.yes_no import PARSERS
from vlmfix.evals.data.answers import AnswerFile
from vlmfix.evals.data.records import parse_image_id, read_rows

TRUTH = {"10": ["dog", "person"], "20": ["cat"], "30": []}
CAPTIONS = {10: "A dog and a cat.", 20: "A cat, a cat and a chair", 30: "Nothing here."}


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"mode": "original", "objects": TRUTH}))
    return path


def captions_file(folder: Path, captions: dict[int, str] = CAPTIONS, name: str = "captions.jsonl", **more: Any) -> Path:
    return write_lines(folder / name, [{"image_id": i, "caption": text, **more} for i, text in captions.items()])


def score(folder: Path, *words: object) -> dict[str, Any]:
    """Run ``vlmfix score`` and return what it wrote."""
    assert main(["score", *map(str, words), "--out", str(folder / "out.json")]) == 0
    return json.loads((folder / "out.json").read_text())


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["score", *map(str, words)]) == 2
    return capsys.readouterr().err


# The forms of a file.


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("image_id", "caption"),
        ("image", "answer"),
        ("image_path", "response"),
        ("file_name", "generated_text"),
        ("img_id", "output"),
    ],
)
def test_usual_names(tmp_path: Path, truth: Path, image: str, text: str) -> None:
    for spelling in ("{}", "COCO_val2014_{:012d}.jpg", "{:012d}.jpg", "a/val2014/{:012d}.png"):
        rows = [{image: spelling.format(i), text: caption, "prompt": "Say."} for i, caption in CAPTIONS.items()]
        path = write_lines(tmp_path / "captions.jsonl", rows)
        found = score(tmp_path, "chair", "--captions", path, "--ground-truth", truth)
        assert found["counts"]["hallucinated_mentions"] == 2


@pytest.mark.parametrize("form", ["lines", "list", "annotations", "sentences", "pretty", "gzip", "bom", "crlf"])
def test_forms_of_a_file(tmp_path: Path, truth: Path, form: str) -> None:
    rows = [{"image_id": i, "caption": caption} for i, caption in CAPTIONS.items()]
    content = {
        "list": json.dumps(rows),
        "pretty": json.dumps(rows, indent=2),
        "annotations": json.dumps({"info": {"x": 1}, "annotations": rows}),
        "sentences": json.dumps({"sentences": rows}, indent=1),
    }.get(form, "\n".join(map(json.dumps, rows)) + "\n")
    data = content.replace("\n", "\r\n" if form == "crlf" else "\n").encode("utf-8-sig" if form == "bom" else "utf-8")
    path = tmp_path / "captions.json"
    path.write_bytes(gzip.compress(data) if form == "gzip" else data)
    counts = score(tmp_path, "chair", "--captions", path, "--ground-truth", truth)["counts"]
    expected = {"captions": 3, "hallucinated_captions": 2, "mentions": 5, "hallucinated_mentions": 2, "gt_objects": 3}
    assert counts.items() >= {**expected, "recalled_gt_objects": 2, "generated_distinct": 4}.items()


@pytest.mark.parametrize(("value", "image_id"), [(7, 7), ("7", 7), ("000000002239.jpg", 2239), (2239.0, 2239)])
def test_image_ids(value: object, image_id: int) -> None:
    assert parse_image_id(value, "here") == image_id


@pytest.mark.parametrize("value", [True, None, "dog.jpg", -1, "²", math.nan, ["7"], {"id": 7}, "7" * 30, ""])
def test_what_is_no_image_id(value: object) -> None:
    with pytest.raises(DataError, match=r"here: .*is no image id"):
        parse_image_id(value, "here")


def test_several_texts_are_never_chosen_between(tmp_path: Path) -> None:
    def text(row: Any, key: str | None = None) -> str:
        file = AnswerFile(write_lines(tmp_path / "a.jsonl", [row]), key)
        return file.given(file.rows())[0].text

    assert text({"text": "a", "answer": "a"}) == "a"
    assert text({"text": "a", "answer": "b"}, "answer") == "b"
    with pytest.raises(DataError, match=r"'text' and 'answer' differ.*--text-key KEY"):
        text({"text": "a", "answer": "b"})


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[\n {"a": 1},\n {"a":\n  2}, {"a": 3}\n]\n')
    assert [where.removeprefix(str(path)) for where, _ in read_rows(path)] == [
        " line 2, entry 1",
        " line 3, entry 2",
        " line 4, entry 3",
    ]
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert [where.removeprefix(str(path)) for where, _ in read_rows(path)] == [" line 2", " line 4"]


# Ground truth and modes.


def test_forms_of_the_ground_truth(tmp_path: Path) -> None:
    wanted = {10: frozenset({"dog", "person"}), 20: frozenset({"cat"})}
    contents = (
        json.dumps({"objects": TRUTH}),
        json.dumps(TRUTH, indent=1),
        json.dumps({"COCO_val2014_000000000010.jpg": ["dog", "person"], "20": ["cat"]}),
        json.dumps({"categories": ["cat", "dog", "person"], "objects": {"10": [1, 2], "20": [0]}}),
        "\n".join(json.dumps({"image_id": int(i), "objects": names}) for i, names in TRUTH.items()),
    )
    for content in contents:
        path = tmp_path / "t.json"
        path.write_text(content)
        found = load_ground_truth(path, [10, 20], "nltk")
        assert found.objects == wanted and found.mode == "nltk" and "does not say its mode" in found.source
        path.write_bytes(gzip.compress(content.encode()))
        assert load_ground_truth(path, [10, 20], "mixed").objects == wanted


@pytest.mark.parametrize(
    ("name", "said", "mode", "fits"),
    [
        ("t.json", "nltk", "nltk", True),
        ("t.json", "nltk", "original", False),
        ("t.json", "nltk", "mixed", False),
        ("t.json", "original", "nltk", False),
        ("t.json", "original", "mixed", True),
        ("t.json", "original", "original", True),
        ("gt_nltk.json", None, "nltk", True),
        ("gt_nltk.json", None, "mixed", False),
        ("gt_pattern_2014.json", None, "nltk", False),
        ("gt_pattern_2014.json", None, "mixed", True),
        ("gt_pattern.json", "nltk", "nltk", True),  # what the file says counts more than its name
    ],
)
def test_modes_are_never_mixed_silently(tmp_path: Path, name: str, said: str | None, mode: Any, fits: bool) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"objects": TRUTH, **({"mode": said} if said else {})}))
    if fits:
        assert load_ground_truth(path, [10], mode).mode == ("nltk" if mode == "nltk" else "original")
    else:
        with pytest.raises(DataError, match=r"--mode (nltk|original)"):
            load_ground_truth(path, [10], mode)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"10": ["unicorn"]}', "'unicorn' is none of the 80 objects"),
        ('{"categories": ["unicorn"], "objects": {"10": [0]}}', "category 'unicorn' is none of COCO's 80"),
        ('{"categories": ["dog"], "objects": {"10": [1]}}', "image 10: 1 is none of the 80"),
        ('{"10": "dog"}', "image 10: expected a list of objects, found 'dog'"),
        ('{"11": ["dog"]}', "has no image 10"),
        ('{"x": ["dog"]}', "'x' is no image id"),
        ('{"images": [], "annotations": [], "categories": []}', "annotation file of COCO: give its folder"),
        ('{"objects": {"10": ["dog"]}, "mode": "pattern"}', "expected the mode original or nltk, found 'pattern'"),
        ('{"image_id": 10, "objects": ["dog"]}\n{"image_id": 10, "objects": []}', "line 2: image 10 is listed already"),
        ("[]", "expected an object of image ids"),
        ("", "is empty"),
        ('{"10": ["dog"', "line 1: not readable JSON"),
    ],
)
def test_broken_ground_truth(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_ground_truth(path, [10], "original")


# Text quality and comparisons.


def test_repeated_lines_and_text_quality(tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = captions_file(tmp_path, truncated=False)
    path.write_text(path.read_text() + json.dumps({"image_id": 10, "caption": CAPTIONS[10], "truncated": False}) + "\n")
    found = score(tmp_path, "chair", path, "--ground-truth", truth)
    assert found["repeated_lines"] == 1 and found["counts"]["captions"] == 3
    assert found["text_quality"]["counts"]["unfinished_captions"] == 1
    assert found["text_quality"]["summary"]["truncation"] == 0.0
    assert "1 lines repeat an earlier one" in (out := capsys.readouterr().out) and "cut off" in out
    path = captions_file(tmp_path, finish_reason="length")
    assert score(tmp_path, "chair", path, "--ground-truth", truth)["text_quality"]["summary"]["truncation"] == 1.0
    path = captions_file(tmp_path)
    assert "truncation" not in score(tmp_path, "chair", path, "--ground-truth", truth)["text_quality"]["summary"]
    assert "cut off" not in capsys.readouterr().out.splitlines()[-1]
    rows = [{"image_id": 10, "caption": "A dog."}, {"image_id": 20, "caption": "A cat.", "truncated": True}]
    path = write_lines(tmp_path / "captions.jsonl", rows)
    assert "line 1: expected 'truncated'" in error_of(capsys, "chair", path, "--ground-truth", truth)


def test_baseline_captions(tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = captions_file(tmp_path, name="baseline.jsonl")
    path = captions_file(tmp_path, {**CAPTIONS, 20: "A cat, a cat"})
    found = score(tmp_path, "chair", path, "--ground-truth", truth, "--baseline", baseline)
    assert found["counts"]["hallucinated_mentions"] == 1
    assert found["baseline"]["counts"]["hallucinated_mentions"] == 2
    assert found["baseline"]["differences"]["chair_s"]["estimate"] == pytest.approx(-1 / 3)
    assert found["baseline"]["differences"]["chair_i"]["estimate"] == pytest.approx(1 / 4 - 2 / 5)
    # The shorter caption is the beginning of the other one: at equal length nothing is left of the difference.
    for way in ("words", "mentions"):
        assert found["baseline"]["length_matched"][way]["chair_i"]["difference"]["estimate"] == 0.0
    out = capsys.readouterr().out
    assert "difference" in out and "both cut to equal length" in out
    assert max(map(len, out.splitlines())) <= 130
    other = captions_file(tmp_path, {10: "A dog."}, name="other.jsonl")
    message = error_of(capsys, "chair", path, "--ground-truth", truth, "--baseline", other)
    assert "has no caption of 2 images" in message and "image 20" in message


QUESTIONS = [
    {"question_id": i, "image": f"COCO_val2014_00000000{image:04d}.jpg", "text": f"Is there a {name} in the image?"}
    | {"label": label}
    for i, (image, name, label) in enumerate(
        [(10, "dog", "yes"), (10, "cat", "no"), (20, "car", "yes"), (30, "cup", "no")], 1
    )
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "coco_pope_random.json", QUESTIONS)


def answers_file(folder: Path, *texts: str, name: str = "answers.jsonl", **columns: list[Any]) -> Path:
    rows = [{"question_id": i, "answer": text} for i, text in enumerate(texts, 1)]
    rows = [{**row, **{key: values[i] for key, values in columns.items()}} for i, row in enumerate(rows)]
    return write_lines(folder / name, rows)


def test_baseline_answers(tmp_path: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = answers_file(tmp_path, "Yes", "No", "Yes", "No", logit=[2.0, -1, 0.5, -2])
    baseline = answers_file(tmp_path, "Yes", "Yes", "No", "No", name="b.jsonl", logit=[2, 1, -0.5, -2])
    words = ("pope", "--answers", path, "--questions", questions, "--baseline", baseline, "--scores", "logit")
    found = score(tmp_path, *words)
    assert found["splits"]["random"]["counts"] == {"n": 4, "TP": 2, "FP": 0, "TN": 2, "FN": 0, "unparsed": 0}
    assert found["splits"]["random"]["summary"]["auc"] == 1.0
    assert found["baseline"]["splits"]["random"]["summary"]["auc"] == 0.75
    assert found["baseline"]["mcnemar"] == {"questions": 4, "only_method": 2, "only_baseline": 0, "p_value": 0.5}
    differences = found["baseline"]["differences"]["random"]
    assert differences["accuracy"]["estimate"] == 0.5 and differences["accuracy"]["n"] == 3  # images, not questions
    assert differences["auc"]["estimate"] == 0.25
    assert "only 2 right here, only 0 in the baseline, p = 0.500" in capsys.readouterr().out


def test_a_question_asked_in_two_splits_counts_once(tmp_path: Path, questions: Path) -> None:
    popular = write_lines(tmp_path / "coco_pope_popular.json", QUESTIONS)
    rows = [{"question_id": i, "split": s, "answer": "Yes"} for s in ("popular", "random") for i in (1, 2, 3, 4)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = score(tmp_path, "pope", path, "--questions", questions, popular, "--baseline", path)
    assert found["baseline"]["mcnemar"]["questions"] == 4
    assert found["mean_f1_of_splits"] == found["splits"]["random"]["summary"]["f1"] == pytest.approx(2 / 3)


def test_answers_by_label_with_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": "a.jpg", "question": q, "label": "yes", "answer": a} for q, a in (("1", "Yes"), ("2", "No"))]
    path = write_lines(tmp_path / "a.jsonl", rows)
    baseline = write_lines(tmp_path / "b.jsonl", [{**row, "answer": "No"} for row in rows])
    found = score(tmp_path, "pope", path, "--baseline", baseline)["baseline"]
    assert found["mcnemar"]["only_method"] == 1 and found["differences"]["all"]["accuracy"]["n"] == 1
    write_lines(baseline, rows[::-1])
    assert "do not answer the same questions" in error_of(capsys, "pope", path, "--baseline", baseline)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"question_id": 9, "answer": "Yes"}] * 4, (), "line 1: the question files have no random question 9"),
        (
            [{"question_id": 1, "answer": text} for text in ("Yes", "No", "Yes", "No")],
            (),
            "line 2: random question 1 is answered already, on",
        ),
        ([{"answer": "Yes"}, {"question_id": 1, "answer": "Yes"}], (), "line 1: expected 'question_id'"),
        ([{"answer": "Yes"}] * 3, ("--by-order",), "has 3 answers, the question files 4 questions"),
        ([{"answer": "Yes", "label": "no"}] * 4, (), "line 1: the label is 'no', and that of random question 1 is yes"),
        ([{"answer": "Yes", "label": "maybe"}] * 4, (), "line 1: expected the label yes or no, found 'maybe'"),
        (
            [{"answer": "Yes", "x": math.nan}] * 4,
            ("--scores", "x"),
            "line 1: expected a finite number in 'x', found nan",
        ),
        ([{"answer": "Yes", "x": True}] * 4, ("--scores", "x"), "expected a finite number in 'x', found True"),
        ([{"answer": "Yes"}] * 4, ("--scores", "x"), "expected a finite number in 'x', found the keys answer"),
        ([{"answer": True}] * 4, (), "line 1: expected text in 'answer', found True"),
        ([{"answer": "Yes"}] * 4, ("--text-key", "reply"), "line 1: expected one of reply"),
        ([{"answer": "yes", "prediction": "No"}] * 4, (), "'answer' and 'prediction' differ"),
    ],
)
def test_answers_that_do_not_fit(
    tmp_path: Path, questions: Path, rows: list[Any], more: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert message in error_of(capsys, "pope", "--answers", path, "--questions", questions, *more)


def test_order_can_be_asked_for(tmp_path: Path, questions: Path) -> None:
    rows = [{"question_id": 100 + i, "text": text} for i, text in enumerate(("Yes", "No", "Yes", "No"))]
    path = write_lines(tmp_path / "a.jsonl", rows)
    counts = score(tmp_path, "pope", "--answers", path, "--questions", questions, "--by-order")["splits"]["random"]
    assert counts["counts"]["TP"] == counts["counts"]["TN"] == 2


def test_one_file_is_scored(tmp_path: Path, truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = captions_file(tmp_path)
    assert "found 0; type --captions FILE" in error_of(capsys, "chair", "--ground-truth", truth)
    assert "found 2" in error_of(capsys, "chair", path, "--captions", path, "--ground-truth", truth)
    assert "type --answers FILE" in error_of(capsys, "pope")


# The official figures, through the command line.


FILES = {
    "opera/llava-1.5_beam5.jsonl": ("original", "nltk", "mixed"),
    "opera/llava-1.5_greedy.jsonl": ("original", "nltk", "mixed"),
    "opera/llava-1.5_ours.jsonl": ("original", "nltk", "mixed"),
    "less_is_more/r1-llava1.5-7b.jsonl": ("original", "nltk"),
    "less_is_more/r2-vcd.jsonl": ("original", "nltk"),
    "less_is_more/r3-opera.jsonl": ("original", "nltk"),
    "official_outputs/llava15_regular.json.gz": ("nltk",),
    "official_outputs/llava15_vcd.json.gz": ("nltk",),
}


@needs_data("expected.json", "expected_sentences.json.gz", "chair_captions", "chair_gt", "nltk_data")
@pytest.mark.usefixtures("nltk_data")
@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in FILES.items() for mode in modes])
def test_chair_files_give_the_official_counts(
    name: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = official()["chair"][name]
    truth = DATA / f"chair_gt/chair_gt_{'nltk' if mode == 'nltk' else 'pattern'}_trainval2014.json.gz"
    words = ("chair", "--captions", DATA / "chair_captions" / name, "--ground-truth", truth, "--mode", mode)
    found = score(tmp_path, *words)
    column = expected[{"original": "pattern"}.get(mode, mode)]
    assert found["counts"] == column["counts"]
    pairs = (("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"), ("recall", "Recall"), ("length_tokens", "Len"))
    for ours, theirs in (*pairs, ("precision", "Precision_pai"), ("f1", "F1_pai")):
        assert found["summary"][ours] == pytest.approx(column[theirs], abs=1e-12)
    assert found["summary"]["length_words"] == pytest.approx(expected["len_split_space"], abs=1e-9)
    assert f"mode {mode} (" in capsys.readouterr().out.splitlines()[0]
    sentences = official("expected_sentences.json.gz")[name]
    captions = read_captions(AnswerFile(DATA / "chair_captions" / name))
    by_image = dict(zip(captions, sentences[{"original": "pattern"}.get(mode, mode)], strict=True))
    assert {each["image_id"]: [each["mentions"], each["hallucinated"]] for each in found["sentences"]} == by_image


@needs_data("expected.json", "coco_sample", "nltk_data")
@pytest.mark.usefixtures("nltk_data")
@pytest.mark.parametrize("mode", ["original", "nltk", "mixed"])
def test_ground_truth_from_a_coco_folder_and_from_a_file(mode: str, tmp_path: Path) -> None:
    """The 268 sample images: rebuilt from their annotations, and the official ground truth as a file, are the same."""
    references = json.loads((DATA / "coco_sample/captions_sample.json").read_text())["annotations"]
    captions = {row["image_id"]: f"{row['caption']} A dog sits on a chair with a bus." for row in references}
    path = captions_file(tmp_path, captions)
    column = "nltk" if mode == "nltk" else "pattern"
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"objects": official()["coco_sample_ground_truth"][column]}))
    rebuilt, given = (
        score(tmp_path, "chair", "--captions", path, "--ground-truth", place, "--mode", mode)
        for place in (DATA / "coco_sample", truth)
    )
    assert rebuilt["counts"] == given["counts"] and rebuilt["sentences"] == given["sentences"]
    assert rebuilt["counts"]["captions"] == 268 and rebuilt["ground_truth"]["mode"] == given["ground_truth"]["mode"]


@needs_data("expected.json", "chair_captions", "chair_gt")
def test_the_original_mode_needs_no_nltk_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pytest.importorskip("nltk").data, "path", [])
    name = "opera/llava-1.5_greedy.jsonl"
    words = ["chair", "--captions", DATA / "chair_captions" / name, "--ground-truth"]
    found = score(tmp_path, *words, DATA / "chair_gt/chair_gt_pattern_trainval2014.json.gz")
    expected = dict(official()["chair"][name]["pattern"]["counts"])
    del expected["tokens_after_double_words"]
    assert found["counts"] == expected
    assert "nltk.downloader punkt_tab" in capsys.readouterr().out
    truth = DATA / "chair_gt/chair_gt_nltk_trainval2014.json.gz"
    assert "nltk.downloader punkt_tab averaged_perceptron_tagger_eng" in error_of(
        capsys, *words, truth, "--mode", "nltk"
    )


@needs_data("expected.json", "pope/answers")
@pytest.mark.parametrize("parser", PARSERS)
def test_pope_files_give_the_official_counts(parser: str, tmp_path: Path) -> None:
    expected = official()["pope"]["paint_llava15_random_910"]["parsers"]
    found = score(
        tmp_path, "pope", "--answers", DATA / "pope/answers/paint_llava15_random_910.jsonl", "--parser", parser
    )
    wanted = expected.get(parser, expected["official"])  # On these answers all agree but lmms.
    assert found["splits"]["all"]["counts"] == {key: wanted[key] for key in ("n", "TP", "FP", "TN", "FN", "unparsed")}
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found["splits"]["all"]["summary"][name] == pytest.approx(wanted[name], abs=1e-12)


@needs_data("pope")
def test_the_first_910_answers_fit_the_released_questions(tmp_path: Path) -> None:
    """By order, with the labels of the file checked against those of the questions."""
    lines = (DATA / "pope/questions_3000/coco_pope_random.json").read_text().splitlines()[:910]
    questions = tmp_path / "coco_pope_random.json"
    questions.write_text("\n".join(lines))
    answers = DATA / "pope/answers/paint_llava15_random_910.jsonl"
    found = score(tmp_path, "pope", "--answers", answers, "--questions", questions)
    assert found["splits"]["random"]["counts"]["TP"] == 413


@needs_data("new/repope_synthetic", "expected_new.json")
def test_the_official_figures_of_repopes_parser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """POPE and RePOPE in one table, on the same answers."""
    folder = DATA / "new" / "repope_synthetic"
    figures = official("expected_new.json")["repope"]["synthetic"]
    questions = ("--questions", folder / "coco_repope_random.json", folder / "coco_pope_random.json")
    found = score(tmp_path, "pope", folder / "answers.jsonl", *questions, "--parser", "repope")
    names = {"precision": "Precision", "recall": "Recall", "f1": "F1", "accuracy": "ACC", "yes_ratio": "Yes Ratio"}
    for expected, part in ((figures["POPE"], found), (figures["RePOPE"], found["repope"])):
        assert part["splits"]["random"]["counts"] == {
            **{name: expected[name] for name in ("TP", "FP", "TN", "FN")},
            "n": expected["rows"],
            "unparsed": expected["none"],
        }
        summary = part["splits"]["random"]["summary"]
        assert {theirs: summary[ours] for ours, theirs in names.items()} == pytest.approx(
            {theirs: expected[theirs] for theirs in names.values()}
        )
    said = capsys.readouterr().out.splitlines()
    assert "3 unparsed answers are in no figure" in said[-1]
    assert [line.split()[:6] for line in said[2:5]] == [
        ["random", "24", "61.9", "54.5", "66.7", "60.0"],
        ["repope_random", "20", "76.5", "100.0", "69.2", "81.8"],
        ["-", "POPE", "+14.6", "+45.5", "+2.6", "+21.8"],
    ]


def repope_files(folder: Path, labels: str) -> list[object]:
    """Four questions about an image; RePOPE leaves out the last and gives the others these labels."""
    rows = [
        {"question_id": i + 1, "image": "COCO_val2014_000000000042.jpg", "text": f"Is there a {name} in the image?"}
        for i, name in enumerate(("dog", "cup", "cat", "car"))
    ]
    word = {"y": "yes", "n": "no"}
    pope = [{**row, "label": word[label]} for row, label in zip(rows, "ynny", strict=True)]
    corrected = [{**row, "label": word[label]} for row, label in zip(rows, labels, strict=False)]
    pair = (
        write_lines(folder / "coco_pope_random.json", pope),
        write_lines(folder / "coco_repope_random.json", corrected),
    )
    return ["--questions", *pair]


def said_file(folder: Path, name: str, said: str) -> Path:
    rows = [{"question_id": i + 1, "answer": {"y": "Yes", "n": "No"}[word]} for i, word in enumerate(said)]
    return write_lines(folder / name, rows)


def test_repopes_labels_may_turn_a_ranking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pope", said_file(tmp_path, "a.jsonl", "ynny"), "--baseline", said_file(tmp_path, "b.jsonl", "nyyn")]
    found = score(tmp_path, *words, *repope_files(tmp_path, "nyy"))
    f1 = {split: each["f1"]["estimate"] for split, each in found["baseline"]["differences"].items()}
    assert f1 == {"random": 1.0, "repope_random": -1.0} and found["baseline"]["repope"]["mean_f1_of_splits"] == 1
    assert "random: the ranking turns, F1 is +100.0 by POPE's labels and -100.0 by RePOPE's" in capsys.readouterr().out
    score(tmp_path, *words, *repope_files(tmp_path, "ynn"))
    assert "turns" not in capsys.readouterr().out


def test_repope_goes_with_the_same_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = said_file(tmp_path, "a.jsonl", "ynny")
    _, pope, repope = repope_files(tmp_path, "nyy")
    row = {"question_id": 2, "image": "COCO_val2014_000000000042.jpg", "text": "Is there an owl in the image?"}
    write_lines(tmp_path / "coco_repope_random.json", [{**row, "label": "no"}])
    assert "which corrects POPE's current release" in error_of(capsys, "pope", answers, "--questions", pope, repope)
    write_lines(tmp_path / "coco_repope_random.json", [{**row, "question_id": 9, "label": "no"}])
    assert "1 questions of RePOPE's files are in none" in error_of(capsys, "pope", answers, "--questions", pope, repope)


@needs_data("new/repope_synthetic", "expected_new.json")
def test_answers_to_questions_that_repope_leaves_out_are_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = DATA / "new" / "repope_synthetic"
    expected = official("expected_new.json")["repope"]["synthetic"]["RePOPE"]
    asked = {row["question_id"]: row for _, row in read_rows(folder / "coco_pope_random.json")}
    rows = [
        {"question_id": row["question_id"], "question": asked[row["question_id"]]["text"], "response": row["text"]}
        for _, row in read_rows(folder / "answers.jsonl")
    ]
    words = ("--questions", folder / "coco_repope_random.json", "--parser", "repope")
    pictured = [{**row, "image": asked[row["question_id"]]["image"]} for row in rows]
    for given in (rows, pictured, pictured[::-1]):
        found = score(tmp_path, "pope", write_lines(tmp_path / "a.jsonl", given), *words)
        assert found["removed"] == expected["answers_ignored"]
        counts = found["splits"]["random"]["counts"]
        assert counts == {
            **{name: expected[name] for name in ("TP", "FP", "TN", "FN")},
            "n": expected["rows"],
            "unparsed": expected["none"],
        }
    assert "4 answers to questions that RePOPE leaves out are ignored" in capsys.readouterr().out
    assert "no random question 10" in error_of(capsys, "pope", folder / "answers.jsonl", *words)
    other = [{**row, "question": "Is there a zebra in the image?"} for row in pictured]
    assert "zebra" in error_of(capsys, "pope", write_lines(tmp_path / "b.jsonl", other), *words)
