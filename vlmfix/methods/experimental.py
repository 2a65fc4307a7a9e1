"""What methods without published evidence share: nobody gets one without asking for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from vlmfix.errors import MethodError
from vlmfix.methods.base import Method
from vlmfix.methods.parameters import described
from vlmfix.model.anatomy import Anatomy


@dataclass(frozen=True)
class ExperimentalMethod(Method):
    """A method that no publication supports in this form."""

    caveat: ClassVar[str] = ""
    """What it is, for the error message."""

    experimental: bool = dataclasses.field(
        default=False, kw_only=True, metadata=described("Must be true: says that you know.")
    )

    def validate(self) -> None:
        """Raise ``MethodError`` unless ``experimental``."""
        if not self.experimental:
            raise MethodError(
                f"{self.name} is {self.caveat}. To try it all the same: "
                f"vlmfix.patch(model, {self.name!r}, experimental=True)."
            )

    def notes(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Say what it is."""
        return (f"{self.name} is {self.caveat}",)
