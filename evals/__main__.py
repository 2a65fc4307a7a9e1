"""``python -m vlmfix.evals``: the same as ``vlmfix eval``."""

from __future__ import annotations

import sys

from vlmfix.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
