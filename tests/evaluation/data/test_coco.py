"""COCO folders: layouts, selection, and every way such a folder is broken."""

import json
import logging
import random

import pytest
from PIL import Image
from shared_data import DATA, needs_data

from vlmfix.errors import DataError
from vlmfix.evals.data.coco import CocoData, load_image

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def annotations(ids=(139, 285, 632), split="val2014"):
    name = "{:012d}.jpg" if split == "val2017" else "COCO_val2014_{:012d}.jpg"
    instances = {
        "images": [{"id": i, "file_name": name.format(i)} for i in ids],
        "annotations": [
            {"id": 1, "image_id": ids[0], "category_id": 18, "iscrowd": 0},
            {"id": 2, "image_id": ids[0], "category_id": 1, "iscrowd": 1},
            {"id": 3, "image_id": ids[1], "category_id": 18, "iscrowd": 0},
        ],
        "categories": CATEGORIES,
    }
    captions = {
        "images": instances["images"],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "caption": f"Caption {k} of {i}."} for i in ids for k in (0, 1)
        ],
    }
    return instances, captions


def make_folder(root, *, split="val2014", nested=True, images="{split}", ids=(139, 285, 632)):
    folder = root / "annotations" if nested else root
    folder.mkdir(parents=True, exist_ok=True)
    instances, captions = annotations(ids, split)
    (folder / f"instances_{split}.json").write_text(json.dumps(instances))
    (folder / f"captions_{split}.json").write_text(json.dumps(captions))
    image_dir = root / images.format(split=split)
    image_dir.mkdir(parents=True, exist_ok=True)
    for image in instances["images"]:
        Image.new("L", (4, 3), 128).save(image_dir / image["file_name"])
    return root


def edit(root, kind, change):
    path = root / "annotations" / f"{kind}_val2014.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_objects_captions_and_images(tmp_path, capsys):
    coco = CocoData.load(make_folder(tmp_path))
    assert coco.image_ids == (139, 285, 632)
    assert coco.objects(139) == {"dog", "person"}  # crowds included
    assert coco.objects(285) == {"dog"}
    assert coco.objects(632) == frozenset()  # annotated as having no object
    assert coco.captions(285) == ("Caption 0 of 285.", "Caption 1 of 285.")
    record = coco.image(139)
    assert (record.image_id, record.file_name) == (139, "COCO_val2014_000000000139.jpg")
    image = load_image(record.path)
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert capsys.readouterr().out == ""  # pycocotools prints


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("images", ["{split}", "images/{split}", "images"])
@pytest.mark.parametrize("split", ["val2014", "val2017"])
def test_layouts(tmp_path, split, nested, images):
    coco = CocoData.load(make_folder(tmp_path, split=split, nested=nested, images=images), split=split)
    assert coco.split == split
    assert coco.select() == [139, 285, 632]
    assert coco.image(632).path.is_file()


def test_the_only_split_of_a_folder_is_found_and_said(tmp_path, caplog):
    make_folder(tmp_path, split="sample", nested=False, images="images")
    with caplog.at_level(logging.INFO, "vlmfix"):
        assert CocoData.load(str(tmp_path)).split == "sample"
    assert "sample" in caplog.text
    make_folder(tmp_path, split="train2017", nested=False)
    make_folder(tmp_path, split="val2017", nested=False)
    assert CocoData.load(tmp_path).split == "val2017"  # the only one that starts with val
    make_folder(tmp_path, split="val2016", nested=False)
    with pytest.raises(DataError, match=r"val2016, val2017.*split="):
        CocoData.load(tmp_path)


def test_selection_is_a_function_of_ids_and_seed(tmp_path):
    ids = tuple(range(1, 41))
    coco = CocoData.load(make_folder(tmp_path, ids=ids))
    assert coco.select(limit=5, seed=3) == random.Random(3).sample(list(ids), 5)
    assert coco.select(ids=[9, 3, 7], limit=2) == random.Random(0).sample([3, 7, 9], 2)
    assert coco.select(ids=[9, 3, 7]) == [3, 7, 9]
    assert coco.select(limit=40) == coco.select(limit=99) == list(ids)


def test_selection_takes_images_that_are_there_and_says_so(tmp_path, caplog):
    coco = CocoData.load(make_folder(tmp_path))
    coco.image(285).path.unlink()
    assert coco.present_ids() == (139, 632)
    assert coco.select() == [139, 632]
    assert "2 of 3" in caplog.text


def test_selection_errors(tmp_path):
    coco = CocoData.load(make_folder(tmp_path))
    with pytest.raises(DataError, match=r"image id 7 is not annotated in instances_val2014\.json"):
        coco.select(ids=[139, 7])
    with pytest.raises(DataError, match="image id 139 is given twice"):
        coco.select(ids=[139, 285, 139])
    with pytest.raises(DataError, match="empty"):
        coco.select(ids=[])
    with pytest.raises(DataError, match="at least 1"):
        coco.select(limit=0)


def test_ids_without_annotation(tmp_path):
    coco = CocoData.load(make_folder(tmp_path))
    for ask in (coco.image, coco.objects, coco.captions):
        with pytest.raises(DataError, match="image id 7 is not annotated"):
            ask(7)
    edit(tmp_path, "captions", lambda d: d.update(annotations=[a for a in d["annotations"] if a["image_id"] != 632]))
    with pytest.raises(DataError, match="image 632 has no reference caption"):
        CocoData.load(tmp_path).captions(632)
    with pytest.raises(DataError, match="captions=True"):
        CocoData.load(tmp_path, captions=False).captions(139)


def test_missing_image_file(tmp_path):
    coco = CocoData.load(make_folder(tmp_path))
    coco.image(285).path.unlink()
    with pytest.raises(DataError, match=r"image 285 .*COCO_val2014_000000000285\.jpg is missing"):
        coco.image(285)


def test_wrong_or_missing_folders(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        CocoData.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither directly nor in annotations/"):
        CocoData.load(tmp_path)
    make_folder(tmp_path)
    (tmp_path / "val2014").rename(tmp_path / "other")
    coco = CocoData.load(tmp_path)  # enough to score stored captions
    assert coco.objects(285) == {"dog"}
    with pytest.raises(DataError, match="is this the right folder"):
        coco.select()
    with pytest.raises(DataError, match="is missing"):
        coco.image(139)


def break_file(root, kind, text):
    (root / "annotations" / f"{kind}_val2014.json").write_text(text)


@pytest.mark.parametrize("kind", ["instances", "captions"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"images": [', "line 1: not readable JSON .*cut off"),
        ("\x00\x01", "line 1: expected UTF-8"),
        ("{}", "has no entries under"),
        ("[]", "has no entries under"),
        ('{"images": [], "annotations": [], "categories": []}', "has no entries under"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [7], "categories": [{"id": 1, "name": "a"}]}', "id"),
    ],
)
def test_corrupt_annotation_files(tmp_path, kind, text, message):
    make_folder(tmp_path)
    break_file(tmp_path, kind, text)
    with pytest.raises(DataError, match=message) as error:
        CocoData.load(tmp_path)
    assert f"{kind}_val2014.json" in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "annotations" / "instances_val2014.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"expected UTF-8.*iconv"):
        CocoData.load(tmp_path)


def test_missing_captions_file(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(DataError, match=r"there is no annotation file .*captions_val2014.json"):
        CocoData.load(tmp_path)
    assert CocoData.load(tmp_path, captions=False).objects(285) == {"dog"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"].append(d["images"][0]), "uses 1 ids twice under 'images'"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "uses 1 ids twice under 'annotations'"),
        (lambda d: d["annotations"][0].update(image_id=5), "annotates image 5"),
        (lambda d: d["annotations"][0].update(category_id=99), "annotates category 99"),
        (lambda d: d["annotations"][0].pop("image_id"), "without 'image_id'"),
        (lambda d: d["annotations"][0].pop("category_id"), "without 'category_id'"),
        (lambda d: d["images"][0].pop("file_name"), "without 'file_name'"),
        (lambda d: d["images"][0].update(id="x"), "image id 'x'"),
        (lambda d: d["categories"][0].pop("name"), "without 'name'"),
    ],
)
def test_contradictory_instances(tmp_path, change, message):
    make_folder(tmp_path)
    edit(tmp_path, "instances", change)
    with pytest.raises(DataError, match=message) as error:
        CocoData.load(tmp_path)
    assert "instances_val2014.json" in str(error.value)


def test_caption_without_text(tmp_path):
    make_folder(tmp_path)
    edit(tmp_path, "captions", lambda d: d["annotations"][0].pop("caption"))
    with pytest.raises(DataError, match="without 'caption'"):
        CocoData.load(tmp_path)


def test_unreadable_images(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 80).save(whole)
    assert load_image(whole).size == (64, 64)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:800])
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for path in (cut, text, empty, tmp_path):
        with pytest.raises(DataError, match="cannot be read as an image") as error:
            load_image(path)
        assert str(path) in str(error.value)
    with pytest.raises(DataError, match="there is no image file"):
        load_image(tmp_path / "missing.jpg")


@needs_data("coco_sample")
def test_real_photographs_and_annotations(capsys):
    coco = CocoData.load(DATA / "coco_sample")
    assert (coco.split, len(coco.image_ids)) == ("sample", 268)
    assert len(coco.select()) == len(coco.present_ids()) == 57  # 25 more photographs come without annotations
    assert all(len(coco.captions(i)) == 5 for i in coco.image_ids)
    assert [i for i in coco.image_ids if not coco.objects(i)] == [58636, 226111]
    photographs = sorted((DATA / "coco_sample" / "images").glob("*.jpg"))
    assert len(photographs) == 82
    for path in photographs:
        assert load_image(path).mode == "RGB"
    assert capsys.readouterr().out == ""
