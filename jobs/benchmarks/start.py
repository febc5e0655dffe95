"""How long a process takes to start."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from statistics import median

from benchmarks.timing import Rows, timed


def start() -> Rows:
    """Seconds of whole processes, median of five."""
    ways = {
        "import tda": [sys.executable, "-c", "import tda"],
        "tda --help": [sys.executable, "-m", "tda.cli", "--help"],
    }
    rows: Rows = [("start", "seconds")]
    for name, command in ways.items():
        once = partial(subprocess.run, command, check=True, capture_output=True)
        rows.append((name, f"{median(timed(once) for _ in range(5)):.2f}"))
    return rows
