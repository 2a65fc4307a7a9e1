"""Which of transformers' own tests pass on a stock model and fail on a patched one: ``scripts/test_upstream``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "idefics3", "phi4_multimodal")
METHODS = ("pai", "vhr", "act", "vista", "deco", "vcd")
"""One of each kind: scores, heads, weights, blocks, early logits, a second branch."""

KNOWN: Mapping[str, str] = {
    "test_attn_implementation_composite_models": "reads the name of the attention implementation, which is ours",
}
"""Tests that fail by what a patch is."""

STOCK = "Stock"


def stand_in_for_missing(tests: Path) -> None:
    """Write what ``test_modeling_common`` imports and a source distribution lacks: mixins, without their tests."""
    text = (tests / "test_modeling_common.py").read_text(encoding="utf-8")
    (tests / "__init__.py").touch()
    for package, module, name in re.findall(r"^from \.(\w+)\.(\w+) import (\w+)$", text, re.MULTILINE):
        path = tests / package / f"{module}.py"
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        if not path.exists():
            path.write_text(f"class {name}:\n    pass\n")


def outcomes(sources: Path, extra: Path, family: str, methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Class of tests -> test -> empty if it passes, else why not; skipped tests are left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = (sources, extra, HERE.parent, os.environ.get("PYTHONPATH", ""))
        words = ("-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--noconftest", "--rootdir", str(sources))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words, "-c", os.devnull, f"--junitxml={report}", str(HERE / "models.py")],
            cwd=sources,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "FAMILY": family,
                "METHODS": ",".join(methods),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists() or done.returncode not in (0, 1):
            raise SystemExit(f"{family}: pytest did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    found: dict[str, dict[str, str]] = {}
    for case in cases:
        if case.find("skipped") is None:
            failures = [failure.text or "" for failure in (*case.findall("failure"), *case.findall("error"))]
            name = str(case.get("name")).split(" ")[0]
            of_class = found.setdefault(str(case.get("classname")).rpartition("Test")[2], {})
            of_class[name] = of_class.get(name, "") or "\n".join(failures)
    return found


def main(sources: str, extra: str, *words: str) -> int:
    """Compare families, and methods among the words; returns the number of tests that fail and are not explained."""
    root = Path(sources).resolve()
    stand_in_for_missing(root / "tests")
    methods = [word.partition("=")[2] for word in words if word.startswith("method=")] or METHODS
    unexplained = 0
    for family in [word for word in words if "=" not in word] or FAMILIES:
        found = outcomes(root, Path(extra).resolve(), family, methods)
        passing = {name for name, why in found[STOCK].items() if not why}
        print(f"{family}: {len(passing)} of {len(found[STOCK])} tests pass unpatched", flush=True)
        for method in methods:
            of_method = found[method.title().replace("_", "")]
            lost = {name: why for name, why in of_method.items() if why and name in passing}
            told = {name: explained(name, why) for name, why in lost.items()}
            unexplained += sum(reason is None for reason in told.values())
            print(f"  {method}: {len(passing) - len(lost)} pass", flush=True)
            for reason in dict.fromkeys(told.values()):
                names = [name for name in told if told[name] == reason]
                some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                print(f"    {some}: {reason or 'UNEXPLAINED'}", flush=True)
                if reason is None:
                    print("\n".join(f"    {name}: {lost[name][-300:]}" for name in names), flush=True)
    return unexplained


def explained(name: str, why: str) -> str | None:
    """Why a test may fail: it is about what a patch is, or vlmfix refuses with the reason."""
    refusals: Sequence[str] = re.findall(r"vlmfix\.errors\.\w+: (.+)", why)
    return KNOWN.get(name) or (f"refused: {refusals[-1][:100]}" if refusals else None)


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
