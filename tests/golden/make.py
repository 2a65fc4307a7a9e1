"""Write the outputs on file anew, and say which figures changed: ``python tests/golden/make.py [CASE ...]``."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def make(names: list[str]) -> int:
    """Run the cases, write what differs from the files, and return the number of cases that differ."""
    import torch

    from golden.bench import Bench, as_json, lacking, on_file
    from golden.cases import CASES, NEED_SHARED
    from golden.compare import differences, dumps

    torch.set_num_threads(1)
    changed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLMFIX_CACHE"] = str(Path(folder) / "cache")
        bench = Bench(Path(folder))
        for name in names or list(CASES):
            reason = lacking() if name in NEED_SHARED else None
            if reason is not None:
                print(f"{name}: left as it was: {reason}")
                continue
            start, path = time.process_time(), HERE / f"{name}.json"
            found = as_json(CASES[name](bench))
            lines = differences(on_file(name), found) if path.exists() else ["is new"]
            changed += bool(lines)
            path.write_text(dumps(found) + "\n", encoding="utf-8")
            print(f"{name}: {len(lines) or 'nothing'} changed ({time.process_time() - start:.1f} s)")
            print("".join(f"  {line}\n" for line in lines), end="")
    print(f"FIGURES CHANGED in {changed} cases: say in the commit why" if changed else "no figure changed")
    return changed


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    make(sys.argv[1:])
