"""What ``counts.json`` keeps of a run: its tables, and what their rows are about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .cache import digest
from .counts import Rows, benchmark_counts
from .item_table import ItemTable
from .metrics.chair import ChairTable

if TYPE_CHECKING:
    from .tasks import Tasks

Tables = Mapping[str, Mapping[str, Any]]
Controls = Mapping[str, Mapping[str, Mapping[str, Any]]]


def invented_by_category(table: ChairTable) -> dict[str, int]:
    """Category -> captions that name it where it is not."""
    return dict(sorted(Counter(name for names in table.hallucinated_nodes for name in set(names)).items()))


def image_digests(tasks: Tasks) -> dict[int, str]:
    """Image id -> digest of its file, of every image of a run."""
    return {sample.image_id: tasks.image_digests[sample.path] for sample in tasks.samples() if sample.path is not None}


def count_run(tasks: Tasks, tables: Tables, controls: Controls) -> dict[str, Any]:
    """The ``benchmarks`` of ``counts.json``.

    Args:
        tasks: What was asked.
        tables: Benchmark -> method label -> table; text quality under ``"text"``.
        controls: Benchmark -> method label -> name of a control -> its table.
    """
    return {
        name: benchmark_counts(by_label, rows_of(name, tasks, next(iter(by_label.values()))), controls.get(name))
        for name, by_label in tables.items()
        if all(table is not None for table in by_label.values())  # Answers that nobody has judged have no table.
    }


def rows_of(name: str, tasks: Tasks, table: Any) -> Rows:
    """What the rows of a benchmark's tables are about, with their ground truth.

    Text quality has no ground truth; questions are known by their text, and where a table knows no more than names of
    its rows, by these.
    """
    ids = [int(i) for i in table.image_ids]
    if name == "chair" and tasks.chair is not None:
        truth = {i: digest(sorted(tasks.chair.truth[i]))[:8] for i in ids}
        return Rows(truth=[truth[i] for i in ids])
    if name == "pope" and tasks.pope is not None:
        questions = tasks.pope.questions
        return Rows(
            splits=[q.split for q in questions],
            items=[q.text for q in questions],
            truth=["yes" if q.label else "no" for q in questions],
        )
    if isinstance(table, ItemTable):
        labels = table.columns.get("label")
        told = [] if labels is None else ["yes" if label else "no" for label in labels.tolist()]
        return Rows(splits=table.splits, items=table.items, truth=told)
    names = getattr(table, "question_ids", None)
    return Rows() if names is None else Rows(items=[str(n) for n in names])
