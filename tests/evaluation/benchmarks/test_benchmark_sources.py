"""Where the benchmarks' questions come from: folders, files, data sets; and what is wrong with broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from families.saved_llava import write_lines

from vlmfix.errors import DataError, VlmfixError
from vlmfix.evals.benchmarks.amber import task as amber
from vlmfix.evals.benchmarks.choice import RunData
from vlmfix.evals.benchmarks.custom import task as custom
from vlmfix.evals.benchmarks.custom.task import contains, is_exact, read_questions
from vlmfix.evals.benchmarks.hallusionbench import task as hallusionbench
from vlmfix.evals.benchmarks.mme import task as mme
from vlmfix.evals.benchmarks.mmhal import task as mmhal
from vlmfix.evals.benchmarks.object_choice import load_asked
from vlmfix.evals.benchmarks.pope.task import Pope
from vlmfix.evals.benchmarks.registry import B, make_tasks
from vlmfix.evals.data import source
from vlmfix.evals.data.samples import Answer, Sample
from vlmfix.evals.data.write import file_digest
from vlmfix.evals.options import EvalOptions
from vlmfix.evals.run import batches as answer_plan
from vlmfix.evals.run import plan as planning
from vlmfix.observe.prompts import PromptBuilder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Data sets and images are cached in the test's folder; the testbed's scenes where they are."""
    benchmark_data.scenes(6)
    import datasets

    monkeypatch.setattr(source, "default_cache_dir", lambda: tmp_path / "cache" / "testbed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield


def saved(rows: list[dict[str, Any]], folder: Path, kind: str) -> str:
    """Rows with image files as a data set of a kind; what to type for it."""
    from datasets import Dataset, DatasetDict, Image

    data = Dataset.from_list([{**row, "image": str(row["image"]) if row["image"] else None} for row in rows])
    data = data.cast_column("image", Image())
    folder.mkdir()
    if kind == "parquet":
        data.to_parquet(str(folder / "test.parquet"))
        return f"datasets:{folder / 'test.parquet'}"
    if kind == "folder":
        data.to_parquet(str(folder / "test-00000-of-00001.parquet"))
        return f"datasets:{folder}"
    half = len(data) // 2
    splits = {"a": data.select(range(half)), "b": data.select(range(half, len(data)))}
    DatasetDict(splits).save_to_disk(str(folder))
    return f"datasets:{folder}"


@pytest.mark.parametrize("kind", ["parquet", "folder", "disk"])
def test_mme_from_a_data_set_is_mme_from_its_folder(tmp_path: Path, kind: str) -> None:
    folder = benchmark_data.mme(tmp_path / "mme")
    questions = mme.Mme.load(str(folder))
    assert len(questions) == 4 * 3 * 2
    rows = [
        {"question_id": f"{q.task}/{q.image}", "image": q.path, "question": q.text, "category": q.task}
        | {"answer": "Yes" if q.label else "No"}
        for q in questions
    ]
    rows.append({**rows[0], "category": "OCR", "question_id": "OCR/1.png"})
    found = mme.Mme.load(saved(rows, tmp_path / "set", kind))
    assert [(q.task, q.image, q.text, q.label) for q in found] == [
        (q.task, q.image, q.text, q.label) for q in questions
    ]
    assert [file_digest(q.path) for q in found] == [file_digest(q.path) for q in questions], "the bytes as they were"


def test_one_split_of_a_data_set(tmp_path: Path) -> None:
    image = benchmark_data.scenes(1)[0][0]
    rows = [{"question": f"{i}?", "answer": "yes", "image": image} for i in range(4)]
    where = saved(rows, tmp_path / "set", "disk")
    assert [row["question"] for _, row in source.dataset_rows(where)] == ["0?", "1?", "2?", "3?"]
    assert [(row["question"], row["split"]) for _, row in source.dataset_rows(f"{where}#b")] == [
        ("2?", "b"),
        ("3?", "b"),
    ]
    with pytest.raises(DataError, match="cannot load the data set"):
        list(source.dataset_rows(f"{where}#c"))


def test_custom_from_a_folder_of_images(tmp_path: Path) -> None:
    """The library's imagefolder: metadata.jsonl beside the images."""
    rows = []
    for index, (path, _) in enumerate(benchmark_data.scenes(2)):
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "images" / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "question": "Is it day?", "answer": "no"})
    write_lines(tmp_path / "images" / "metadata.jsonl", rows)
    found = custom.Custom.load(f"datasets:{tmp_path / 'images'}")
    assert [(q.text, q.label) for q in found] == [("Is it day?", False)] * 2
    digests = [file_digest(path) for path, _ in benchmark_data.scenes(2)]
    assert [file_digest(q.path) for q in found if q.path] == digests


def test_custom_from_json_through_the_library(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", [{"question": "Is snow black?", "answer": "no"}])
    assert custom.Custom.load(f"datasets:{path}")[0].label is False


def test_hallusionbench_from_a_data_set(tmp_path: Path) -> None:
    folder = benchmark_data.hallusionbench(tmp_path / "hallusionbench")
    rows = json.loads((folder / "HallusionBench.json").read_text())
    given = [{**row, "image": folder / row["filename"] if row["filename"] else None} for row in rows]
    own, found = (
        hallusionbench.HallusionBench.load(w) for w in (str(folder), saved(given, tmp_path / "set", "parquet"))
    )
    assert [q.key for q in found] == [q.key for q in own]
    assert [q.path and file_digest(q.path) for q in found] == [q.path and file_digest(q.path) for q in own]
    assert sum(q.path is None for q in found) == 2


def test_mmhal_from_a_data_set(tmp_path: Path) -> None:
    folder = benchmark_data.mmhal(tmp_path / "mmhal")
    items = mmhal.Mmhal.load(str(folder))
    found = mmhal.Mmhal.load(saved([{**item.row, "image": item.path} for item in items], tmp_path / "set", "parquet"))
    assert [replace(item, path=None) for item in found] == [replace(item, path=None) for item in items]
    assert [file_digest(item.path) for item in found] == [file_digest(item.path) for item in items]


def test_pope_from_a_data_set_and_from_files_with_images(tmp_path: Path) -> None:
    scenes = benchmark_data.scenes(2)
    rows = [
        {"question_id": str(i), "question": benchmark_data.ask(word), "answer": "yes" if word in objects else "no"}
        | {"image_source": path.stem, "image": path, "category": split}
        for split in ("random", "popular")
        for i, (path, objects, word) in enumerate((*scene, w) for scene in scenes for w in ("dog", "cup"))
    ]
    questions, paths = load_asked(saved(rows, tmp_path / "set", "parquet"), ())
    assert [(q.split, q.text, q.label) for q in questions] == [
        (row["category"], row["question"], row["answer"] == "yes") for row in rows
    ]
    assert {file_digest(p) for p in paths.values()} == {file_digest(path) for path, _ in scenes}

    folder = tmp_path / "gqa"
    folder.mkdir()
    for number, (path, _) in enumerate(scenes):
        shutil.copy(path, folder / f"23{number}.jpg")
    listed = [{"question_id": 1, "image": "231.jpg", "text": "Is there a sky in the image?", "label": "yes"}]
    (tmp_path / "gqa_pope_random.json").write_text(json.dumps(listed))
    options = EvalOptions(
        benchmarks=("pope", "sycophancy"),
        benchmark_data=(f"pope={folder}",),
        pope_questions=(tmp_path / "gqa_pope_random.json",),
    )
    tasks = make_tasks(options)
    pope = tasks.find(Pope)
    assert pope is not None and pope.splits == ["gqa_random"]
    assert {sample.path for sample in tasks.samples()} == {folder / "231.jpg"}
    assert [task.name for task in tasks.tasks] == ["pope", "sycophancy"] and "testbed scenes" not in tasks.description
    with pytest.raises(VlmfixError, match="give --pope-questions"):
        load_asked(str(folder), ())


def test_a_run_reads_its_answers_by_repopes_labels_too(tmp_path: Path) -> None:
    shutil.copy(benchmark_data.scenes(1)[0][0], tmp_path / "42.jpg")
    rows = [{"question_id": i, "image": "42.jpg", "text": benchmark_data.ask(w)} for i, w in enumerate(("cup", "dog"))]
    files = {"coco_pope_random.json": [{**rows[0], "label": "yes"}, {**rows[1], "label": "no"}]}
    files["coco_repope_random.json"] = [{**rows[1], "label": "yes"}]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    options = EvalOptions(
        benchmarks=("pope",),
        benchmark_data=(f"pope={tmp_path}",),
        pope_questions=tuple(tmp_path / name for name in files),
    )
    pope = make_tasks(options).find(Pope)
    assert pope is not None and len(pope.samples) == 2 and "RePOPE's labels of 1 of them" in pope.about()
    answers = {sample.key: Answer("Yes", (), False, (), None, 0.0) for sample in pope.samples}
    found = pope.details("m", {"m": pope.score(answers)}, {"m": answers}, 0)
    assert found["splits"] == ["random", "repope_random"] and found["all"]["counts"]["n"] == 2
    accuracy = [found[split]["summary"]["accuracy"] for split in found["splits"]]
    assert accuracy == [0.5, 1.0]
    assert pope.settings() != replace(pope, corrected=()).settings()


def test_a_row_must_have_an_image_where_the_question_needs_one() -> None:
    with pytest.raises(DataError, match="row 3: expected an image"):
        source.own_image({"question": "Is it?", "image": None}, "row 3")


# Limits


def make(kind: type[B], where: Path, limit: int | None) -> B:
    options = EvalOptions(benchmarks=(kind.name,), benchmark_data=(f"{kind.name}={where}",), limit=limit)
    made = kind.make(options, RunData(options))
    assert isinstance(made, kind)
    return made


def test_a_limit_takes_images_with_all_their_questions(tmp_path: Path) -> None:
    folder = benchmark_data.amber(tmp_path / "amber", 4, described=False)
    whole, some = (make(amber.Amber, folder, limit) for limit in (None, 2))
    images = {q.image for q in some.queries}
    assert len(images) == 2 and some.queries == tuple(q for q in whole.queries if q.image in images)
    assert set(some.data.items) == {q.item.id for q in some.queries}
    task = make(mme.Mme, benchmark_data.mme(tmp_path / "mme"), 1)
    assert len(task.asked) == 4 * 2
    sets = make(hallusionbench.HallusionBench, benchmark_data.hallusionbench(tmp_path / "h"), 2)
    assert len({q.set_id for q in sets.asked}) == 2 and len(sets.asked) == 8


def test_image_numbers_do_not_depend_on_what_else_is_asked() -> None:
    numbers = {source.image_number(*names) for names in (("mme", "a"), ("mme", "b"), ("amber", "a"))}
    assert len(numbers) == 3 and all(0 < number < 2**48 for number in numbers)


# Batches


def test_a_second_turn_is_in_the_batch_of_its_first(tmp_path: Path) -> None:
    """So that the process that owns the batch needs no other's answers."""
    words: dict[str, Any] = {"benchmarks": ("sycophancy",), "limit": 3, "batch_size": 4, "out": tmp_path}
    plan = answer_plan.AnswerPlan(planning.plan_run(EvalOptions(methods=("none",), **words)))
    seen = 0
    for batch in plan.batches:
        firsts = {sample for sample in batch if sample.second is None}
        follow = [sample for sample in batch if sample.second is not None]
        assert {sample.first for sample in follow} <= firsts and len(firsts) <= 4
        seen += len(batch)
    assert seen == len(list(plan.run.tasks.samples()))
    spec, follow = plan.run.methods[0], next(s for s in plan.run.tasks.samples() if s.second is not None)
    assert plan.key(spec, follow) is None, "not known before the first answer"
    key = str(plan.key(spec, follow.first))
    keys = {plan.key(spec, follow, {key: {"text": text}}) for text in ("Yes", "No")}
    assert None not in keys and len(keys) == 2, "the first answer decides the second"


def test_samples_without_an_image_have_batches_of_their_own(tmp_path: Path) -> None:
    folder = benchmark_data.custom(tmp_path / "custom")
    options = EvalOptions(benchmarks=("custom",), benchmark_data=(f"custom={folder}",), methods=("none",), out=tmp_path)
    for batch in answer_plan.AnswerPlan(planning.plan_run(options)).batches:
        assert len({sample.path is None for sample in batch}) == 1


def test_sample_keys_tell_turns_apart() -> None:
    first = Sample("b", 1, None, "q")
    assert first.key == ("b", 1, "q")
    assert len({first.key, Sample("b", 1, None, "q", second="x").key, Sample("b", 1, None, "q", second="y").key}) == 3


# Prompts


class Templated:
    """A processor whose template shows what it is given."""

    chat_template = "..."
    image_token = "<image>"

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return " ".join(
            f"{m['role']}:{''.join('<image>' if p['type'] == 'image' else p['text'] for p in m['content'])}"
            for m in messages
        )


def test_prompts_with_and_without_an_image_and_of_a_second_turn() -> None:
    build = PromptBuilder(Templated())
    assert build("q") == "user:<image>q" and build("q", image=False) == "user:q"
    assert build("sure?", before=(("q", "Yes"),)) == "user:<image>q assistant:Yes user:sure?"
    bare = PromptBuilder(Templated(), use_template=False)
    assert bare("USER: <image>\nq", image=False) == "USER: q" and bare("q", image=False) == "q"
    with pytest.raises(VlmfixError, match="second turn needs the chat template"):
        bare("<image>", before=(("q", "Yes"),))


def test_sycophancy_without_a_template_has_no_second_turn() -> None:
    options = EvalOptions(benchmarks=("sycophancy",), limit=4, chat_template=False, pope_prompt="<image>{question}")
    tasks = make_tasks(options)
    assert not any(sample.second for sample in tasks.samples())
    assert any("leaves the challenge out" in note for note in tasks.notes)
    assert tasks.settings()["sycophancy"]["conditions"] == ["neutral", "wrong_hint", "right_hint"]
    answers = {sample.key: Answer("Yes", (), False, (), 0.5, 0.1) for sample in tasks.samples()}
    (task,) = tasks.tasks
    summary = task.part("none", {"none": task.score(answers)}, {"none": answers}, 0)["summary"]
    assert summary["accuracy_challenge"] is None and summary["accuracy_wrong_hint"] == 0.5


# Free answers


@pytest.mark.parametrize(
    ("answer", "right", "exact", "contained"),
    [
        ("A red cup.", ["red cup"], True, True),
        ("There is a red cup on it", ["the red cup", "mug"], False, True),
        ("cups", ["cup"], False, False),
        ("red and cup", ["red cup"], False, False),
        ("", ["cup"], False, False),
        ("Two!", ["2", "two"], True, True),
        ("anything", ["the"], False, False),
    ],
)
def test_free_answers(answer: str, right: list[str], exact: bool, contained: bool) -> None:
    assert (is_exact(answer, right), contains(answer, right)) == (exact, contained)


@pytest.mark.parametrize(
    ("answer", "label", "answers"),
    [("Yes", True, ()), ("no.", False, ()), (False, False, ()), (3, None, ("3",)), (["a", "b"], None, ("a", "b"))],
)
def test_labels_of_own_questions(answer: Any, label: bool | None, answers: tuple[str, ...]) -> None:
    found = read_questions([("line 1", {"question": "?", "answer": answer}, None)])[0]
    assert (found.label, found.answers) == (label, answers)


# What is wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "Is it?", "answer": ""}, "line 8: expected 'answer'"),
        ({"question": "", "answer": "yes"}, "line 8: expected 'question'"),
        ({"image": "none.png", "question": "Is it?", "answer": "yes"}, "line 8: there is no image file"),
        ({"question": "Is there a dog in the image?", "answer": "yes"}, "line 8: the same question"),
    ],
)
def test_broken_questions_of_ones_own(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = benchmark_data.custom(tmp_path / "custom", 2, more=[line])
    with pytest.raises(DataError, match=message):
        custom.Custom.load(str(path))


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of MME's tasks"):
        mme.Mme.load(str(tmp_path))
    folder = benchmark_data.mme(tmp_path / "mme")
    (folder / "existence" / "0000.png").unlink()
    with pytest.raises(DataError, match=r"0000\.txt has no image"):
        mme.Mme.load(str(folder))
    (folder / "existence" / "0000.txt").write_text("Is there a dog?\n")
    shutil.copy(folder / "existence" / "0001.png", folder / "existence" / "0000.png")
    with pytest.raises(DataError, match=r"0000.txt line 1: expected a question, a tab"):
        mme.Mme.load(str(folder))

    folder = benchmark_data.amber(tmp_path / "amber", 2, described=False)
    (folder / "image" / "AMBER_2.jpg").unlink()
    with pytest.raises(DataError, match=r"no image AMBER_2.jpg"):
        amber.load_queries(str(folder))
    (folder / "data" / "query" / "query_all.json").write_text('[{"id": 1}]')
    with pytest.raises(DataError, match="id, image and query"):
        amber.load_queries(str(folder))
    with pytest.raises(DataError, match="annotations are files"):
        amber.load_queries("datasets:owner/amber")

    folder = benchmark_data.hallusionbench(tmp_path / "hallusionbench")
    (folder / "VD" / "map" / "0_0.png").unlink()
    with pytest.raises(DataError, match=r"no image \./VD/map/0_0\.png of question VD/map/0/0/0"):
        hallusionbench.HallusionBench.load(str(folder))
    folder = benchmark_data.mmhal(tmp_path / "mmhal")
    (folder / "1_o.jpg").unlink()
    with pytest.raises(DataError, match=r"1_o\.jpg of question 1"):
        mmhal.Mmhal.load(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmarks": ("amber",)}, "--benchmark-data amber=PATH"),
        ({"benchmarks": ("chair",), "benchmark_data": ("amber=x",)}, "amber, and nothing of this run is read"),
        ({"benchmarks": ("chair",), "benchmark_data": ("chair=x",)}, "chair, and nothing of this run is read"),
        ({"benchmark_prompts": ("mme={question}",)}, "mme, which is not asked"),
        ({"benchmark_prompts": ("chair={question}",)}, "type --prompt TEXT"),
        ({"benchmark_data": ("x",)}, "NAME=VALUE"),
        ({"benchmarks": ("mme",), "benchmark_data": ("mme=x", "mme=y")}, "names mme twice"),
        ({"benchmarks": ("sycophancy",), "benchmark_prompts": ("sycophancy=x",)}, "needs the placeholder"),
        ({"judge": "cat"}, "--judge is for mmhal"),
        ({"benchmarks": ("mmhal",), "benchmark_data": ("mmhal=x",), "judge": str}, "give judge_name"),
    ],
)
def test_contradictory_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VlmfixError, match=message):
        make_tasks(EvalOptions(**{"limit": 1, **options}))


def test_a_coco_folder_nothing_is_read_from(tmp_path: Path) -> None:
    path = benchmark_data.custom(tmp_path / "custom", 1)
    options = EvalOptions(benchmarks=("custom",), benchmark_data=(f"custom={path}",), data=tmp_path)
    with pytest.raises(VlmfixError, match="nothing of this run is read from it"):
        make_tasks(options)
