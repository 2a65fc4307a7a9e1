"""The images of DASH-B and where their names come from: its two lists, or its data set.

Names of files are no ids: those of the images with the object start again for every object. What identifies an image is
the right answer, the source of the object, the object and the file; in the data set also ``question_id``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlmfix.errors import DataError
from vlmfix.files import read_json

from ...data.matching import Row, id_text
from ...data.model_text import WORDS, word
from ...data.records import read_rows
from ...data.source import dataset_rows, find_file, is_dataset, own_image, text_field

SIDES: Mapping[bool, str] = {False: "neg", True: "pos"}
"""Names of the halves: without the object, and with it."""

OBJECT_KEYS, FILE_KEYS, SOURCE_KEYS = ("object_name", "object"), ("img_id", "image_path"), ("dataset", "source")


@dataclass(frozen=True)
class DashImage:
    """One image and what is asked about it.

    Attributes:
        label: Whether the object is there.
        source: The data set that the object is from; empty where a file of answers does not say.
        object_name: What is asked for.
        file: Name of the image's file.
        question_id: Its id in the data set; empty without one.
        path: The file; None where only answers are scored.
    """

    label: bool
    source: str
    object_name: str
    file: str
    question_id: str = ""
    path: Path | None = None

    @property
    def side(self) -> str:
        """The half of the benchmark that it belongs to."""
        return SIDES[self.label]

    @property
    def picture(self) -> str:
        """What identifies it."""
        return "/".join((self.side, self.source, self.object_name, self.file))

    unit = picture

    @property
    def text(self) -> str:
        """The question, as in the official code: with "a" before every object."""
        return f"Can you see a {self.object_name} in this image?"


def read_lists(paths: Mapping[bool, Path]) -> list[DashImage]:
    """The images of the two lists, the half without the object first.

    Args:
        paths: The list of each half: an object of sources, each an object of lists of file names.

    Raises:
        DataError: A file is missing or of another form.
    """
    found = []
    for label in SIDES:
        path = paths[label]
        for source, objects in _entries(read_json(path, what="DASH-B list"), path):
            for name, files in _entries(objects, path):
                if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                    raise DataError(f"DASH-B list {path}: expected file names under {source!r}, {name!r}")
                found += [DashImage(label, source, name, file) for file in files]
    return distinct_images(found, "the DASH-B lists")


def _entries(value: Any, path: Path) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise DataError(f"DASH-B list {path}: expected {{source: {{object: [file, ...]}}}}, found {str(value)[:40]!r}")
    yield from value.items()


def distinct_images(images: Sequence[DashImage], what: str) -> list[DashImage]:
    """The images, if no two of them are one.

    Raises:
        DataError: Two are, or there is none.
    """
    if not images:
        raise DataError(f"{what} hold no image")
    seen = set()
    for image in images:
        for key in (image.picture, image.question_id and f"question_id {image.question_id}"):
            if key and key in seen:
                raise DataError(f"{what} name {key} twice: what identifies an image is answer, source, object and file")
            seen.add(key)
    return list(images)


def of_row(row: Mapping[str, Any], place: str, path: Path | None = None) -> DashImage:
    """The image of a row of the data set, whose ``answer`` is the right one."""
    answer = text_field(row, ("answer",), place)
    if word(answer) not in ("yes", "no"):
        raise DataError(f"{place}: expected the right answer, yes or no, under 'answer', found {answer[:40]!r}")
    return DashImage(
        WORDS[word(answer)],
        str(row.get("dataset") or ""),
        text_field(row, ("object",), place),
        PurePosixPath(text_field(row, FILE_KEYS, place)).name,
        id_text(row.get("question_id")),
        path,
    )


def load_images(where: str) -> list[DashImage]:
    """The images with their files, of the repository's folder ``images`` (or the one that holds it), or a data set.

    Raises:
        DataError: A list or an image is missing or broken.
    """
    if is_dataset(where):
        found = [of_row(row, place, own_image(row, place)) for place, row in dataset_rows(where)]
        return distinct_images(found, where)
    folder = Path(where)
    folder = folder / "images" if (folder / "images").is_dir() else folder
    lists = {label: find_file(folder, [f"dash_benchmark_{side}.json"], "DASH-B list") for label, side in SIDES.items()}
    images = []
    for image in read_lists(lists):
        path = folder / image.picture
        if not path.is_file():
            raise DataError(f"{folder} has no image {image.picture}, which a list names: unpack DASH-B's images there")
        images.append(DashImage(image.label, image.source, image.object_name, image.file, path=path))
    return images


def read_questions(files: Sequence[Path]) -> list[DashImage]:
    """What answers are matched to.

    Args:
        files: The two lists, told apart by ``neg`` and ``pos`` in their names; or one file with the data set's rows.

    Raises:
        DataError: A file is missing or broken, or the files are not both halves.
    """
    if len(files) == 1:
        return distinct_images([of_row(row, place) for place, row in read_rows(files[0])], str(files[0]))
    lists = {label: [path for path in files if side in path.stem.lower()] for label, side in SIDES.items()}
    if len(files) != 2 or any(len(paths) != 1 for paths in lists.values()) or lists[False] == lists[True]:
        raise DataError(
            "--questions takes dash_benchmark_neg.json and dash_benchmark_pos.json, told apart by neg and pos in their "
            "names, or one file with the rows of the data set"
        )
    return read_lists({label: paths[0] for label, paths in lists.items()})


class Images:
    """The images of the benchmark, by what a row of answers says of its own."""

    def __init__(self, images: Sequence[DashImage]):
        self.images = images
        self.by_id = {image.question_id: image for image in images if image.question_id}

    def of(self, row: Row) -> DashImage:
        """The image that a row is about.

        Raises:
            DataError: It names none, or one that the benchmark does not have, or several fit.
        """
        name, file, source = named(row)
        fit = [*self.images]
        if self.by_id and (number := id_text(row.fields.get("question_id"))):
            fit = [self.by_id[number]] if number in self.by_id else []
        elif not (name and file and "gt" in row.fields):
            ids = "'question_id', or " if self.by_id else ""
            raise DataError(f"{row.where}: nothing says which image this is: give {ids}gt, object_name and img_id")
        label = WORDS.get(word(row.fields["gt"])) if "gt" in row.fields else None
        if "gt" in row.fields and label is None:
            raise DataError(f"{row.where}: expected yes or no under 'gt', found {str(row.fields['gt'])[:40]!r}")
        given = {"label": label, "object_name": name or None, "file": file or None, "source": source or None}
        fit = [i for i in fit if all(value in (None, getattr(i, key)) for key, value in given.items())]
        if len(fit) != 1:
            said = ", ".join(f"{key} {value!r}" for key, value in given.items() if value is not None)
            raise DataError(
                f"{row.where}: {len(fit) or 'no'} images of the question file fit ({said}): "
                + ("say which with 'dataset'" if fit else "the answers are to other images, or to another release")
            )
        return fit[0]


def named(row: Row) -> tuple[str, str, str]:
    """The object, the file and the source that a row of answers names; empty where it does not."""
    name, file, source = (
        next((str(row.fields[key]) for key in keys if row.fields.get(key) not in (None, "")), "")
        for keys in (OBJECT_KEYS, FILE_KEYS, SOURCE_KEYS)
    )
    return name, PurePosixPath(file).name, source
