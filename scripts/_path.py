"""Imported first by the scripts beside it: makes the modules of the repository importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
