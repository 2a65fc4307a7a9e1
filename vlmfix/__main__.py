"""``python -m vlmfix``: the same as the ``vlmfix`` command."""

from __future__ import annotations

import sys

from vlmfix.cli import main

if __name__ == "__main__":
    sys.exit(main())
