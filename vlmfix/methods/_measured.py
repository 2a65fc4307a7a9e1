"""What is measured once per model and given to a method: written as JSON, read back from a dict or a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlmfix.errors import DataError, MethodError
from vlmfix.textfiles import read_json

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True, repr=False)
class Measured:
    """Base of frozen dataclasses whose fields are numbers, texts and (nested) tuples of them.

    Attributes:
        noun: What it is, for messages and file names ("ranking").
    """

    noun: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {field.name: _listed(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` wrote.

        Raises:
            MethodError: It is something else.
        """
        try:
            return cls(**data)
        except TypeError as error:
            fields = ", ".join(field.name for field in dataclasses.fields(cls))
            found = str(error).rpartition("() ")[2]
            raise MethodError(f"{cls.noun.capitalize()}: expected {fields}; {found}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file.

        Raises:
            MethodError: The file is missing or holds something else.
        """
        try:
            data = read_json(Path(path), what=f"{cls.noun} file", remedy="write it again, or give another")
        except DataError as error:
            raise MethodError(f"Cannot read the {cls.noun} {path}: {error}.") from error
        if not isinstance(data, dict):
            raise MethodError(f"{path} holds no {cls.noun}: expected a JSON object.")
        return cls.from_dict(data)


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value
