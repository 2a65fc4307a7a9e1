"""The embedded testbed: scenes, COCO export, training sequences, weights."""

import contextlib
import io
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from vlmfix.errors import DataError
from vlmfix.evals.benchmarks.coco_objects import ChairMatcher, ground_truth
from vlmfix.evals.benchmarks.object_questions import build_questions
from vlmfix.evals.benchmarks.yes_no import score_labels
from vlmfix.evals.data.coco import CocoData
from vlmfix.evals.testbed import MODEL_DIR, PROMPTS, SPLITS, default_cache_dir, prepare
from vlmfix.evals.testbed.captions import detailed_caption, questions
from vlmfix.evals.testbed.scenes import BACKGROUND, GRID, IMAGE_SIZE, NAMES, image_id, make_scene, scene_kind
from vlmfix.evals.testbed.sprites import load_sprites
from vlmfix.evals.testbed.vocabulary import CATEGORIES, SCENES, noun_phrase

ROOT = Path(__file__).resolve().parents[3]
COUNT = 24


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare("heldout", COUNT, tmp_path_factory.mktemp("testbed"))


@pytest.fixture(scope="session")
def reader():
    from testbed_measure import Reader

    return Reader(batch_size=COUNT)


def silent_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


# --- vocabulary and sprites ---


def test_all_80_categories_with_the_official_ids() -> None:
    assert len(NAMES) == len(set(NAMES)) == 80
    ids = [number for number, _, _ in CATEGORIES]
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert ids == sorted(set(range(1, 91)) - gaps)
    assert dict((name, number) for number, name, _ in CATEGORIES)["hair drier"] == 89
    assert len({group for _, _, group in CATEGORIES}) == 12


def test_every_category_is_typical_of_some_scene() -> None:
    assert {name for scene in SCENES for name in scene.typical} == set(NAMES)


def test_atlas_holds_a_visible_sprite_of_every_category() -> None:
    sprites = load_sprites()
    assert set(sprites) == set(NAMES)
    for name, pictures in sprites.items():
        for picture in pictures:
            assert max(picture.size) == 64, name
            assert (np.asarray(picture)[..., 3] > 100).mean() > 0.1, name


@pytest.mark.parametrize("name", NAMES)
def test_noun_phrases_are_found_by_the_chair_matcher(name: str) -> None:
    matcher = ChairMatcher("original")
    for count in (1, 2, 3):
        found = matcher.match(f"There is {noun_phrase(name, count)} here.").nodes
        if name == "bus" and count == 1:
            assert found == ()  # the published matcher turns "bus" into "bu"
        elif not (name == "tie" and count > 1):  # ties are drawn once: it misses the plural
            assert found == (name,)


def test_scene_words_are_not_objects() -> None:
    matcher = ChairMatcher("original")
    for scene in SCENES:
        assert matcher.match(f"The image shows a {scene.name} with nothing.").nodes == ()


# --- scenes ---


def test_splits_own_disjoint_ids() -> None:
    ranges = [(image_id(split, 0), image_id(split, 9_999_999)) for split in SPLITS]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))
    with pytest.raises(DataError, match="index"):
        image_id("train", 10_000_000)
    with pytest.raises(DataError, match="calibration"):
        image_id("test", 0)  # type: ignore[arg-type]


def test_no_scene_occurs_in_two_splits() -> None:
    pictures = {split: {make_scene(image_id(split, i)).pixels.tobytes() for i in range(12)} for split in SPLITS}
    assert len(set.union(*pictures.values())) == 12 * len(SPLITS)


def test_a_scene_is_a_function_of_its_id() -> None:
    number = image_id("heldout", 7)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    first = make_scene(number)
    second = make_scene(number)
    assert np.array_equal(first.pixels, second.pixels) and first.instances == second.instances
    assert first.kind == scene_kind(number)


def test_scenes_stay_what_the_published_figures_were_measured_on() -> None:
    """Objects, boxes and mean colours of a few scenes; colours with room for another Pillow's resampling."""
    golden = json.loads((Path(__file__).parent / "testbed_golden.json").read_text())
    for row in golden:
        scene = make_scene(row["image_id"])
        assert SCENES[scene.kind].name == row["scene"]
        assert [instance.name for instance in scene.instances] == row["objects"]
        boxes = np.asarray([instance.bbox for instance in scene.instances])
        assert np.abs(boxes - np.asarray(row["boxes"])).max() <= 2
        assert np.abs(scene.pixels.mean((0, 1)) - np.asarray(row["mean_rgb"])).max() < 1.5


def test_annotations_fit_the_picture() -> None:
    for index in range(30):
        scene = make_scene(image_id("calibration", index))
        assert scene.pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and scene.pixels.dtype == np.uint8
        assert scene.patches.shape == (GRID, GRID)
        assert set(np.unique(scene.patches)) - {BACKGROUND} <= {NAMES.index(i.name) for i in scene.instances}
        assert scene.instances
        for instance in scene.instances:
            x, y, width, height = instance.bbox
            assert 0 <= x < x + width <= IMAGE_SIZE and 0 <= y < y + height <= IMAGE_SIZE
            assert 0.1 * width * height < instance.area <= width * height or instance.name in {"bicycle", "scissors"}


def test_decorrelated_splits_lack_what_always_stands_there() -> None:
    def leading_share(split) -> float:
        """How often the object that is most typical of a scene is there."""
        scenes = [make_scene(image_id(split, index)) for index in range(200)]
        return sum(max(SCENES[s.kind].typical, key=SCENES[s.kind].typical.get) in s.counts() for s in scenes) / 200

    assert leading_share("heldout") < leading_share("train") - 0.05


def test_questions_are_balanced_and_true() -> None:
    scene = make_scene(image_id("train", 3))
    for seed in range(20):
        asked = questions(scene.kind, list(scene.counts()), random.Random(seed), 6)
        assert sum(present for _, present in asked) * 2 == len(asked)
        assert all((name in scene.counts()) == present for name, present in asked)


def test_captions_name_exactly_the_annotated_objects() -> None:
    matcher = ChairMatcher("original")
    for index in range(40):
        scene = make_scene(image_id("train", index))
        found = set(matcher.match(detailed_caption(scene.kind, scene.counts(), random.Random(0))).nodes)
        assert found == set(scene.counts()) - ({"bus"} if scene.counts().get("bus") == 1 else set())


# --- COCO folder ---


def test_pycocotools_reads_the_folder(folder: Path) -> None:
    instances = silent_coco(folder / "instances_val2014.json")
    captions = silent_coco(folder / "captions_val2014.json")
    assert [c["name"] for c in instances.loadCats(instances.getCatIds())] == list(NAMES)
    assert instances.getImgIds() == captions.getImgIds() == [image_id("heldout", i) for i in range(COUNT)]
    for record in instances.loadImgs(instances.getImgIds()):
        assert record["file_name"] == f"COCO_val2014_{record['id']:012d}.png"
        with Image.open(folder / "val2014" / record["file_name"]) as picture:
            assert picture.size == (record["width"], record["height"]) == (IMAGE_SIZE, IMAGE_SIZE)
            assert np.array_equal(np.asarray(picture), make_scene(record["id"]).pixels)
        assert len(captions.getAnnIds(imgIds=record["id"])) == 5
    annotations = instances.loadAnns(instances.getAnnIds())
    assert len({a["id"] for a in annotations}) == len(annotations)
    assert all(a["iscrowd"] == 0 and a["area"] > 0 for a in annotations)
    assert instances.annToMask(annotations[0]).sum() > 0


def test_ground_truth_is_what_was_drawn(folder: Path) -> None:
    coco = CocoData.load(folder)
    truth = ground_truth(coco, coco.image_ids, ChairMatcher("original"))
    for number in coco.image_ids:
        assert truth[number] == coco.objects(number) == set(make_scene(number).counts())


def test_prepare_reuses_and_repeats(folder: Path, tmp_path: Path) -> None:
    marker = folder / "val2014" / "marker"
    marker.touch()
    assert prepare("heldout", COUNT, folder.parent) == folder and marker.exists()
    marker.unlink()
    again = prepare("heldout", COUNT, tmp_path)
    assert again.name == folder.name
    for path in sorted(folder.rglob("*.json")) + sorted(folder.rglob("*.png")):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == [again.name]


def test_prepare_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlmfix.evals.testbed.export._write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("heldout", 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prepare_rejects_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_images"):
        prepare("heldout", 0, tmp_path)
    with pytest.raises(DataError, match="heldout2"):
        prepare("validation", 1, tmp_path)  # type: ignore[arg-type]
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(DataError, match="VLMFIX_CACHE"):
        prepare("heldout", 1, blocked)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLMFIX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "vlmfix" / "testbed"
    monkeypatch.setenv("VLMFIX_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own" / "testbed"
    monkeypatch.delenv("VLMFIX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "vlmfix" / "testbed"


def test_import_is_light() -> None:
    code = "import sys, vlmfix.evals.testbed; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


# --- training sequences ---


@pytest.fixture(scope="module")
def packing():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import testbed_packing

        yield testbed_packing
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_packed_dialogues_equal_the_processor_and_stand_alone(packing, reader) -> None:
    """Token ids agree with the tokenizer, and packing gives the logits of the separate prompts."""
    scene = make_scene(image_id("train", 0))
    tokenizer = reader.processor.tokenizer
    caption = detailed_caption(scene.kind, scene.counts(), random.Random(0))
    assert packing.encode(caption) == tokenizer(caption, add_special_tokens=False)["input_ids"]
    packed = packing.pack_image(scene.kind, scene.counts(), random.Random(1), 200, 0.0)
    batch = packing.collate([packed], 200)
    core, embed = reader.model.model, reader.model.get_input_embeddings()
    with torch.inference_mode():
        pixels = reader.processor.image_processor(Image.fromarray(scene.pixels), return_tensors="pt")["pixel_values"]
        image = core.multi_modal_projector(
            core.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        )
        start, stop = len(packing.TEXT_PREFIX), len(packing.IMAGE_PREFIX)
        embedded = embed(batch["ids"])
        embedded = torch.cat([embedded[:, :start], image, embedded[:, stop:]], 1)
        hidden = core.language_model(
            inputs_embeds=embedded,
            attention_mask=batch["mask"].float(),
            position_ids=batch["positions"],
            use_cache=False,
        ).last_hidden_state
        logits = reader.model.lm_head(hidden)[0]
        segment = torch.tensor(packed.segments) == packed.used
        alone = torch.tensor(
            [packed.prefix + [t for t, s in zip(packed.ids, packed.segments, strict=True) if s == packed.used]]
        )
        expected = reader.model(input_ids=alone, pixel_values=pixels).logits[0, stop:]
    assert torch.allclose(logits[: len(packed.ids)][segment], expected, atol=1e-3)


def test_blind_dialogues_do_not_see_the_image(packing) -> None:
    scene = make_scene(image_id("train", 0))
    packed = packing.pack_image(scene.kind, scene.counts(), random.Random(1), 240, 1.0)
    batch = packing.collate([packed], 240)
    visible = batch["mask"][0, 0] == 0
    row = packed.blind.index(True)
    image = batch["ids"][0] == packing.IMAGE
    assert not visible[row, image].any()
    assert visible[row, :3].all() and packed.positions[row] == 3
    seeing = packed.segments.index(1)
    assert visible[seeing, image].all() and not visible[row, seeing]


# --- the model ---


def test_the_folder_is_small_and_standard() -> None:
    files = list(MODEL_DIR.iterdir())
    assert sum(path.stat().st_size for path in files) < 16_000_000
    names = {path.name for path in files}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "bin" not in {path.suffix for path in files}


def test_standard_classes_load_it(reader) -> None:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    assert type(reader.model) is LlavaForConditionalGeneration and type(reader.processor) is LlavaProcessor
    assert reader.processor.tokenizer.padding_side == "left"
    assert reader.model.generation_config.eos_token_id == reader.processor.tokenizer.eos_token_id
    assert reader.prompt("Describe the image.") == "USER: <image>\nDescribe the image. ASSISTANT:"


def test_text_survives_the_tokenizer(reader) -> None:
    tokenizer = reader.processor.tokenizer
    for text in (
        "The image shows a dining room with two people and a wine glass. There is a pair of skis.",
        "Is there an orange in the image? Answer the question using a single word or phrase.",
        "Yes",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]


def test_decoding_a_longer_prefix_only_appends(reader) -> None:
    """Streaming prints text as it grows, and the early-stop control cuts captions at a token."""
    tokenizer = reader.processor.tokenizer
    ids = tokenizer(
        "The image shows a beach with a dog. A kite and a boat can be seen nearby.", add_special_tokens=False
    )
    texts = [tokenizer.decode(ids["input_ids"][:n]) for n in range(1, len(ids["input_ids"]) + 1)]
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))


def pope(reader, folder: Path, split, blank: bool = False):
    coco = CocoData.load(folder)
    asked = build_questions({number: sorted(coco.objects(number)) for number in coco.image_ids}, split)
    shown = [
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (127, 127, 127))
        if blank
        else Image.open(coco.image(q.image_id).path)
        for q in asked
    ]
    words, scores = reader.answers(shown, [q.text for q in asked])
    return score_labels([q.label for q in asked], words, image_ids=[q.image_id for q in asked], scores=scores)


def test_it_sees(reader, folder: Path) -> None:
    table = pope(reader, folder, "random")
    assert len(table) > 80 and table.counts()["unparsed"] == 0
    assert table.summary()["accuracy"] > 0.85 and table.summary()["auc"] > 0.93


def test_it_needs_the_image(reader, folder: Path) -> None:
    assert abs(pope(reader, folder, "random", blank=True).summary()["accuracy"] - 0.5) < 0.1


def test_captions_are_about_the_image_and_end(reader, folder: Path) -> None:
    coco = CocoData.load(folder)
    pictures = [Image.open(coco.image(number).path) for number in coco.image_ids]
    captions = reader.captions(pictures, PROMPTS["describe"])
    matcher = ChairMatcher("original")
    found = [set(matcher.match(text).nodes) for text in captions]
    right = sum(len(nodes & coco.objects(number)) for nodes, number in zip(found, coco.image_ids, strict=True))
    assert right > 0.6 * sum(len(coco.objects(number)) for number in coco.image_ids)
    assert all(text.startswith("The image shows a") and text.endswith(".") for text in captions)
    assert any(nodes - coco.objects(number) for nodes, number in zip(found, coco.image_ids, strict=True))
