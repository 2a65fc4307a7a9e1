"""What several runs have in common: which rows they share, and what stands in the way of comparing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmfix.errors import DataError

from ..benchmarks.registry import benchmark_class, benchmark_names
from ..run.folder import setting_differences
from ..scores.counts import BenchmarkCounts, RunCounts
from ..stats.table import Key

#: Settings of a benchmark that say which rows it has; the rows themselves are compared.
_ROWS = ("image_ids", "ground_truth", "questions", "items")

#: Settings that change the answers without changing what is asked or how it is scored.
_LENGTHS = ("max_new_tokens",)


@dataclass(frozen=True)
class Shared:
    """One benchmark on the rows that all its runs share.

    Attributes:
        rows: Run name -> indices of the shared rows in that run's tables, in the same order.
        sizes: Run name -> number of its rows.
        images: Number of shared images.
        notes: What the reader must know.
    """

    rows: Mapping[str, list[int]] = field(repr=False)
    sizes: Mapping[str, int]
    images: int
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of shared rows."""
        return len(next(iter(self.rows.values())))


def differing(runs: Mapping[str, RunCounts]) -> dict[str, dict[str, Any]]:
    """Every setting that is not the same in all runs: dotted name -> run name -> value.

    Methods are left out, because each is a row of its own, and so are lists of images and questions.
    """
    found: dict[str, dict[str, Any]] = {}
    first = next(iter(runs.values())).results["settings"]
    for run in runs.values():
        for name, _, _ in setting_differences(_comparable(first), _comparable(run.results["settings"])):
            found.setdefault(name, {})
    for name, values in found.items():
        for label, run in runs.items():
            values[label] = _look_up(run.results["settings"], name)
    return found


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "methods":
            continue
        kept[name] = {k: v for k, v in value.items() if k not in _ROWS} if isinstance(value, Mapping) else value
    return kept


def _look_up(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _owner(name: str, runs: Mapping[str, RunCounts]) -> str:
    """The benchmark that a part of ``counts.json`` belongs to: itself, or the one whose side table it is."""
    known = [each for each in next(iter(runs.values())).benchmarks if each in benchmark_names()]
    return next((each for each in known if name in benchmark_class(each).side_names), name)


def obstacle(benchmark: str, runs: Mapping[str, RunCounts], *, across_prompts: bool) -> str | None:
    """Why a benchmark of several runs cannot be compared, or None.

    Args:
        benchmark: Its name.
        runs: Those that have it.
        across_prompts: Whether different prompts are no reason.
    """
    named = _owner(benchmark, runs)
    sections = {name: run.results["settings"].get(named, {}) for name, run in runs.items()}
    parsers = {name: run.results["methods"][0].get(named, {}).get("parser") for name, run in runs.items()}
    keys = dict.fromkeys(key for section in sections.values() for key in section if key not in (*_ROWS, *_LENGTHS))
    values = {key: {name: section.get(key) for name, section in sections.items()} for key in keys}
    for key, found in [*values.items(), ("parser", parsers)]:
        if not _all_equal(found.values()):
            is_prompt = "prompt" in key or "template" in key
            if is_prompt and across_prompts:
                continue
            told = ", ".join(f"{name} {value!r}" for name, value in found.items())
            way_out = "; --across-prompts compares them all the same" if is_prompt else ""
            return f"the runs have different settings {key!r}: {told}{way_out}"
    return None


def _all_equal(values: Iterable[Any]) -> bool:
    listed = list(values)
    return all(value == listed[0] for value in listed)


def share(benchmark: str, runs: Mapping[str, RunCounts]) -> Shared:
    """The rows that all runs have: same image id and image file, same question, same ground truth.

    Args:
        benchmark: Its name.
        runs: Those that have it.

    Raises:
        DataError: There is no such row.
    """
    parts = {name: run.benchmarks[benchmark] for name, run in runs.items()}
    found = {name: _identities(part, runs[name].images) for name, part in parts.items()}
    first = next(iter(found))
    kept = [identity for identity in found[first] if all(identity in other for other in found.values())]
    notes = []
    by_key = [{key for key, *_ in identities} for identities in found.values()]
    conflicting = len(set.intersection(*by_key)) - len(kept)
    if conflicting > 0:
        notes.append(f"{conflicting} rows have one id but another image file or ground truth in the runs: left out")
    if not benchmark_class(_owner(benchmark, runs)).row_by_row:
        whole = _whole_images(kept, found)
        if len(whole) < len(kept):
            notes.append(
                f"{len(kept) - len(whole)} shared rows are of images with others that not all runs have: left out"
            )
        kept = whole
    if not kept:
        told = ", ".join(f"{name} {len(identities)}" for name, identities in found.items())
        more = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(f"the runs share no row ({told}){more}")
    notes += _balance(parts, {name: [identities[identity] for identity in kept] for name, identities in found.items()})
    return Shared(
        {name: [identities[identity] for identity in kept] for name, identities in found.items()},
        {name: len(identities) for name, identities in found.items()},
        len({key[0] for (key, _), *_ in kept}),
        tuple(notes),
    )


_Identity = tuple[tuple[Key, int], str, str]


def _identities(part: BenchmarkCounts, images: Mapping[int, str]) -> dict[_Identity, int]:
    """What each row is about -> its index; the n-th row about the same thing is its own."""
    table = next(iter(part.methods.values()))
    seen: Counter[Key] = Counter()
    found: dict[_Identity, int] = {}
    for row, (key, truth) in enumerate(zip(table.keys, table.truth, strict=True)):
        found[(key, seen[key]), images.get(key[0], ""), truth] = row
        seen[key] += 1
    return found


def _balance(parts: Mapping[str, BenchmarkCounts], rows: Mapping[str, list[int]]) -> list[str]:
    """Says when the shared questions have another share of yes among their labels than a run's own."""
    told = []
    for name, part in parts.items():
        label = next(iter(part.methods.values())).columns.get("label")
        if label is not None and abs(label.mean() - label[rows[name]].mean()) >= 0.005:
            told.append(f"{100 * label.mean():.1f} % of {name}'s")
    if not told:
        return []
    name, part = next(iter(parts.items()))
    shared = next(iter(part.methods.values())).columns["label"][rows[name]].mean()
    return [f"{100 * shared:.1f} % of the shared questions have the answer yes, {', '.join(told)}"]


def _whole_images(kept: Sequence[_Identity], found: Mapping[str, Mapping[_Identity, int]]) -> list[_Identity]:
    """The shared rows of images of which all rows of all runs are shared."""
    shared = set(kept)
    partial = {key[0] for rows in found.values() for (key, _), *rest in rows if ((key, _), *rest) not in shared}
    return [identity for identity in kept if identity[0][0][0] not in partial]
