"""The axes in the annotations are those that arrive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = str(ROOT / "tests/support")


def _typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_calls_of_both_frontends_and_the_reference_fit_their_annotations() -> None:
    picked = "before_down-torch or base-before_down-jax or test_moe_output and (plain or sigmoid) and float32"
    done = _typed(
        *("-m", "pytest", "-q", "-p", "typed", "-p", "no:xdist", "-p", "no:cacheprovider"),
        *("tests/cross/test_experts.py", "tests/cross/test_moe.py", "-k", picked),
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_a_wrong_axis_is_caught() -> None:
    code = """
import typed, torch
from moebius.torch_frontend import add_bias
add_bias(torch.zeros(5, 4), torch.zeros(2, 3), torch.zeros(5, dtype=torch.int32))
"""
    done = _typed("-c", code)
    assert done.returncode != 0 and "TypeCheckError" in done.stderr
