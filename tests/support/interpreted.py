"""Programs whose kernels run in Triton's interpreter, which can be switched on only before triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import moebius


def outcomes(program: str, *arguments: str) -> dict[str, str | None]:
    """What a program prints in its last line, a case's error or None by its name, run with the interpreter on."""
    source = str(Path(moebius.__file__).parents[1])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, "-W", "ignore", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found
