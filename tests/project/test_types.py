"""The axes in the annotations are those that arrive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELPERS = str(ROOT / "tests/support")
# What `typed` watches: tests of both frontends, then one wrong call.
CODE = """
import sys
import pytest
code = pytest.main(sys.argv[1:])
import torch
from moebius.torch_frontend import add_bias
try:
    add_bias(torch.zeros(5, 4), torch.zeros(2, 3), torch.zeros(5, dtype=torch.int32))
except Exception as error:
    print("caught:", type(error).__name__)
sys.exit(code)
"""
PICKED = "before_down-torch or base-before_down-jax or test_moe_output and (plain or sigmoid) and float32"


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """CODE in an interpreter of its own, where moebius is imported anew."""
    tests = "tests/cross/test_experts.py", "tests/cross/test_moe.py", "-k", PICKED
    command = [sys.executable, "-c", CODE, "-q", "-p", "typed", "-p", "no:xdist", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([HELPERS, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_calls_of_both_frontends_and_the_reference_fit_their_annotations(
    done: subprocess.CompletedProcess[str],
) -> None:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def test_a_wrong_axis_is_caught(done: subprocess.CompletedProcess[str]) -> None:
    assert done.stdout.endswith("caught: TypeCheckError\n")
