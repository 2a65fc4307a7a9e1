"""``python -m vlmfix.evals``: the same as ``vlmfix eval``."""

import sys

from vlmfix.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
