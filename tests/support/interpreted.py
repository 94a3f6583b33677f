"""Programs whose kernels run in Triton's interpreter, which can be switched on only before triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def mend() -> None:
    """Let a loop's bound be a number from memory, in this process.

    The interpreter keeps scalars as arrays of one element and makes loop bounds of them by int(), which NumPy 2.4
    refuses: https://github.com/triton-lang/triton/issues/9171, mended in Triton 3.7.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
