"""Where the code is, for processes of their own."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
"""PYTHONPATH of a process that imports this checkout from anywhere."""
