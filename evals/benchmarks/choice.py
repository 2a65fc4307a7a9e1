"""What the benchmarks of a run choose their questions and images from."""

from __future__ import annotations

from functools import cached_property

from vlmfix.errors import VlmfixError

from ..data.coco import CocoData
from ..data.records import read_ids
from ..options import EvalOptions

TESTBED_SCENES = 400
"""As many as a run on the embedded model takes three minutes for, on two cores."""

PAPER_IMAGES = 500
"""What most papers take of COCO."""

ANSWER_TOKENS = 16
"""The most new tokens of a yes/no answer."""


def answer_limit(options: EvalOptions) -> int:
    """The most new tokens of a yes/no answer of a run."""
    return options.pope_max_new_tokens or min(options.max_new_tokens or ANSWER_TOKENS, ANSWER_TOKENS)


class RunData:
    """Where the benchmarks of one run find their data, and what they tell its reader.

    Attributes:
        descriptions: One line per source of data, for the report.
        notes: What the reader must know about the choice of images.
    """

    def __init__(self, options: EvalOptions) -> None:
        self._options = options
        self.descriptions: list[str] = []
        self.notes: list[str] = []
        self._read: set[str] = set()

    def given(self, benchmark: str) -> str | None:
        """Where the options say that the data of a benchmark are, None if they do not."""
        self._read.add(benchmark)
        return self._options.data_of.get(benchmark)

    @property
    def unread(self) -> tuple[str, ...]:
        """The benchmarks whose data the options name and nobody has asked for."""
        return tuple(name for name in self._options.data_of if name not in self._read)

    def own(self, benchmark: str) -> str:
        """Where the data of a benchmark that brings its own are.

        Raises:
            VlmfixError: The options do not say.
        """
        where = self.given(benchmark)
        if where is None:
            raise VlmfixError(f"--benchmark {benchmark} needs its data; type --benchmark-data {benchmark}=PATH")
        self.descriptions.append(f"{benchmark} from {where}")
        return where

    def limit(self, testbed: int = TESTBED_SCENES) -> int | None:
        """How many images a benchmark takes of COCO, None for all.

        Args:
            testbed: How many it takes of the testbed's scenes if nobody says.
        """
        options = self._options
        if options.limit is not None or options.ids is not None:
            return options.limit
        return testbed if options.data is None else PAPER_IMAGES

    @property
    def uses_coco(self) -> bool:
        """Whether a benchmark has asked for the COCO folder."""
        return "coco" in vars(self)

    @cached_property
    def coco(self) -> CocoData:
        """The COCO folder, or the testbed's scenes in that form."""
        options = self._options
        if options.data is not None:
            self.descriptions.append(str(options.data))
            return CocoData.load(options.data)
        from ..testbed import prepare

        self.descriptions.append(f"testbed scenes, split {options.split}")
        return CocoData.load(prepare(options.split, options.limit or TESTBED_SCENES))  # type: ignore[arg-type]

    @cached_property
    def pool(self) -> tuple[int, ...]:
        """The image ids to choose from: those of ``--ids``, else the annotated images whose file is there."""
        if self._options.ids is not None:
            return tuple(read_ids(self._options.ids, "--ids"))
        present = self.coco.present_ids()
        if not present:
            self.coco.select()  # Raises the error that names the folder.
        if len(present) < len(self.coco.image_ids):
            self.notes.append(
                f"only {len(present)} of {len(self.coco.image_ids)} annotated images have their file here; the sample "
                "was drawn from these (give --ids FILE for a fixed list)"
            )
        return tuple(present)
