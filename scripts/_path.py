"""Imported first by the scripts beside it: makes the modules of the repository importable. While a
script imports them, Ctrl-C ends it without a traceback."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internals.startup import exit_on_interrupt  # noqa: E402

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # no test imports it
    exit_on_interrupt()
