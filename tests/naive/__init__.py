"""One file per method: its formula, naive and slow, for ``reference.Reference``."""
