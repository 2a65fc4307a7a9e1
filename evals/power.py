"""What a run can show: the smallest paired difference that n images reveal, before the GPU time is spent.

A paired difference of two methods on n images is nearly normal with standard error s / sqrt(n). A two-sided test at
level alpha = 1 - confidence finds a true difference d with the asked power if (the far tail left out)

    d = (z(1 - alpha / 2) + z(power)) * s / sqrt(n)

z being quantiles of the standard normal; the factor is 2.80 for 80 % power at 95 %. s is the standard deviation over
images of the difference in one image's (linearised) contribution. It comes from one of two places:

- *a pilot run*: the half width of the run's own bootstrap interval is z(0.975) s / sqrt(n_pilot). Nothing is assumed
  about images, captions or pairing. A method is then expected to change as much as the pilot's did.
- *the rates of LLaVA-1.5-7B* (:data:`ASSUMED`), where there is no pilot: with rate p per item, k items per image, a
  correlation c between the items of an image, and r between the two methods on one image,

      s^2 = 2 (1 - r) p (1 - p) (1 + (k - 1) c) / k

With m methods to compare, Holm's first step tests at alpha / m; ``methods`` does that.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from vlmfix.errors import DataError, VlmfixError
from vlmfix.files import read_json

from .flags import verb_parser
from .tables import number, plain_table

IMAGES = (100, 200, 500, 1000, 2000, 5000)


class Rate(NamedTuple):
    """How often an item is wrong, and how much the items of an image have in common.

    Attributes:
        title: Of the figure.
        share: Of the items, 0 to 1.
        items: Items per image: one caption, its mentions of objects, its distinct questions.
        clustering: Intra-class correlation of an image's items, 0 to 1.
    """

    title: str
    share: float
    items: float = 1.0
    clustering: float = 0.0

    def deviation(self, correlation: float) -> float:
        """Return the s of the module's docstring for two methods that correlate so on one image."""
        single = self.share * (1 - self.share) * (1 + (self.items - 1) * self.clustering) / self.items
        return math.sqrt(2 * (1 - correlation) * single)


ASSUMED = {
    "chair.chair_s": Rate("CHAIR_s", 0.5),
    "chair.chair_i": Rate("CHAIR_i", 0.15, 7.5, 0.15),
    "pope.accuracy": Rate("POPE accuracy", 0.86, 6.0, 0.05),
}
"""The rates of LLaVA-1.5-7B's released captions (500 captions of at most 512 tokens, greedy against beams, OPERA and
VCD): CHAIR_s is 45 to 50, CHAIR_i 13 to 15 with 7.5 mentions, and the variance of CHAIR_i is twice the binomial one,
which is a clustering of 0.15. The accuracy is what LLaVA-1.5 is printed with; answers to POPE were looked at on the
embedded model only, where they are not clustered at all, and 0.05 leaves some room for other models."""

CORRELATION = 0.5
"""Between two methods on one image. The released captions have 0.48 to 0.96: this is the cautious end."""


def assumed_deviations(questions: float = ASSUMED["pope.accuracy"].items) -> dict[str, float]:
    """Return the s of every figure at the assumed rates.

    Args:
        questions: Distinct POPE questions per image, at least 1; there are 6 in one split.
    """
    rates = {**ASSUMED, "pope.accuracy": ASSUMED["pope.accuracy"]._replace(items=questions)}
    return {key: rate.deviation(CORRELATION) for key, rate in rates.items()}


def detectable(
    deviation: float, images: float, *, power: float = 0.8, confidence: float = 0.95, methods: int = 1
) -> float:
    """Return the smallest true difference that is found with the asked power.

    Args:
        deviation: s of the module's docstring, in units of the figure.
        images: Number of images.
        power: Chance to find it, 0.5 to 1 (exclusive).
        confidence: Of the two-sided interval, 0 to 1 (exclusive).
        methods: Comparisons that share the error level.

    Returns:
        In units of the figure; a fraction, not percent points.

    Raises:
        DataError: A number out of range.
    """
    if not (0.5 <= power < 1 and 0 < confidence < 1 and images > 0 and methods >= 1 and deviation >= 0):
        raise DataError(
            "expected 0.5 <= power < 1, 0 < confidence < 1, at least one image and one method, found "
            f"power {power}, confidence {confidence}, {images} images, {methods} methods"
        )
    normal = NormalDist()
    factor = normal.inv_cdf(1 - (1 - confidence) / (2 * methods)) + normal.inv_cdf(power)
    return factor * deviation / math.sqrt(images)


def deviation_of_interval(interval: Mapping[str, Any], confidence: float) -> float | None:
    """Return the s behind a paired bootstrap interval; None where the interval is not defined or has no width.

    Args:
        interval: As in ``results.json``: ``low`` and ``high``, or null, and ``n``, the number of images.
        confidence: The interval's.
    """
    low, high = interval["low"], interval["high"]
    if low is None or high is None or not high > low:
        return None
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    return float((high - low) / (2 * quantile) * math.sqrt(interval["n"]))


@dataclass(frozen=True)
class Pilot:
    """What a finished run says about a longer one.

    Attributes:
        deviations: Label of a method -> figure -> s, None where its interval has no width.
        images: The smallest number of images behind one of them.
    """

    deviations: dict[str, dict[str, float | None]]
    images: int


def read_pilot(folder: Path) -> Pilot:
    """Read the s of every figure and method of a finished run (its folder, or its ``results.json``).

    Raises:
        DataError: The folder holds no results, or none that compare methods.
    """
    path = folder / "results.json" if folder.is_dir() else folder
    try:
        results = read_json(path, what="results of a run", remedy="type: vlmfix eval --limit 50")
        confidence = results["intervals"]["confidence"]
        intervals = {
            method["label"]: {key: method["differences"][key] for key in ASSUMED if key in method["differences"]}
            for method in results["methods"]
            if "differences" in method
        }
        found = {
            label: {key: deviation_of_interval(interval, confidence) for key, interval in figures.items()}
            for label, figures in intervals.items()
        }
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} holds no results of a finished run ({type(error).__name__}: {error}); type: vlmfix eval --limit 50"
        ) from error
    if not any(found.values()):
        raise DataError(f"{path} compares no method with none; give the run at least one method")
    return Pilot(found, min(int(interval["n"]) for figures in intervals.values() for interval in figures.values()))


def power_table(
    deviations: Mapping[str, Mapping[str, float | None]],
    images: Sequence[int],
    *,
    power: float = 0.8,
    confidence: float = 0.95,
    methods: int = 1,
) -> str:
    """Return the table that ``vlmfix power`` prints.

    Args:
        deviations: Name of a comparison -> figure -> s, None where there is nothing to estimate it from.
        images: Numbers of images, one row each.
        power: As in :func:`detectable`.
        confidence: Likewise.
        methods: Likewise.
    """
    shared = f", shared by {methods} methods (Holm)" if methods > 1 else ""
    keys = [key for key in ASSUMED if any(key in figures for figures in deviations.values())]
    rows = [["", "images", *(ASSUMED[key].title for key in keys)]]
    for name, figures in deviations.items():
        for i, n in enumerate(images):
            cells = []
            for key in keys:
                s = figures.get(key)
                d = None if s is None else detectable(s, n, power=power, confidence=confidence, methods=methods)
                cells.append("-" if d is None or d >= 1 else number(d))
            rows.append([name if i == 0 else "", str(n), *cells])
    return (
        f"smallest paired difference, in points, that n images show with {100 * power:g} % power at "
        f"{100 * confidence:g} % confidence{shared}\n\n" + plain_table(rows)
    )


def planned_lines(images: Mapping[str, int], questions: float, *, methods: int) -> str:
    """Return two lines on what a planned run can show, at the assumed rates.

    Args:
        images: Images of each benchmark of the run, by its name; others than CHAIR and POPE have no assumed rates.
        questions: Distinct POPE questions per image, at least 1.
        methods: Rows that are compared with ``none``.

    Returns:
        The lines; empty where there is nothing to estimate from.
    """
    shown = []
    for key, deviation in assumed_deviations(questions).items():
        n = images.get(key.partition(".")[0], 0)
        if n > 1 and (least := detectable(deviation, n, methods=methods)) < 1:
            shown.append(f"{ASSUMED[key].title} {number(least)}")
    if not shown:
        return ""
    rows = f", {methods} rows by Holm" if methods > 1 else ""
    return (
        f"a run of this size shows differences of {', '.join(shown)} points\n"
        f"  (80 % power at 95 %{rows}; assumed: the rates of LLaVA-1.5-7B, see vlmfix power)"
    )


_ABOUT = """\
Print the smallest paired difference in CHAIR_s, CHAIR_i and POPE accuracy that n images would show.

  vlmfix power                                     at the rates of LLaVA-1.5-7B
  vlmfix power runs/pilot                          as a finished run has it, however short: nothing is assumed
  vlmfix power runs/pilot --images 500 2000 --methods 4
"""


def add_power(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_parser(verbs, "power", _ABOUT, "[RUN] [OPTIONS]")
    parser.add_argument("pilot", type=Path, nargs="?", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES), metavar="N", help="numbers of images")
    parser.add_argument("--power", type=float, default=0.8, metavar="P", help="chance to show it (default: 0.8)")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of the interval (default: 0.95)")
    parser.add_argument("--methods", type=int, default=1, metavar="M", help="methods to compare (default: 1)")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Show how small a difference can be seen.

    Raises:
        VlmfixError: No such run, or a number out of range.
    """
    if min(options.images) < 2:
        raise VlmfixError(f"--images must be at least 2, got {min(options.images)}")
    settings = {"power": options.power, "confidence": options.confidence, "methods": options.methods}
    if options.pilot is None:
        chair_s, chair_i, pope = ASSUMED.values()
        head = (
            f"assumed: CHAIR_s {chair_s.share:g}; CHAIR_i {chair_i.share:g}, {chair_i.items:g} mentions per caption, "
            f"correlated by {chair_i.clustering:g};\n  POPE accuracy {pope.share:g}, {pope.items:g} questions per "
            f"image, correlated by {pope.clustering:g}; methods correlated by {CORRELATION:g}"
        )
        show(f"{head}\n{power_table({'assumed rates': assumed_deviations()}, options.images, **settings)}")
        return
    pilot = read_pilot(options.pilot)
    table = power_table(pilot.deviations, options.images, **settings)
    known = f" (its deviations are known to about {100 / math.sqrt(2 * pilot.images - 2):.0f} %)"
    head = f"pilot: {options.pilot}, {pilot.images} images{known if pilot.images > 1 else ''}"
    show(f"{head}\n{table}\n\n-: the figure did not change in the pilot, or no difference is that large")
