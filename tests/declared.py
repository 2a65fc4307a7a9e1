"""What the benchmarks declare: their columns, and statistics by the names of their figures."""

from vlmfix.evals.benchmarks.chair.figures import ChairTable
from vlmfix.evals.benchmarks.chair.text_quality import TextTable
from vlmfix.evals.benchmarks.registry import benchmark_class, benchmark_names
from vlmfix.evals.benchmarks.yes_no import YesNoTable
from vlmfix.evals.stats.figures import Figure

CHAIR_STATISTICS = {figure.name: figure.statistic for figure in ChairTable.FIGURES if figure.name != "length_tokens"}
POPE_STATISTICS = {figure.name: figure.statistic for figure in YesNoTable.FIGURES if figure.name != "auc"}
TEXT_STATISTICS = {figure.name: figure.statistic for figure in TextTable.FIGURES if figure.name != "unfinished"}
STATISTICS = {"chair": CHAIR_STATISTICS, "pope": POPE_STATISTICS, "text": TEXT_STATISTICS}


def columns_of(*names: str) -> list[Figure]:
    """The columns of some benchmarks, or of all."""
    return [figure for name in names or benchmark_names() for figure in benchmark_class(name).figures if figure.column]
