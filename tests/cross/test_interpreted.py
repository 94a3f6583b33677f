"""Experts of both frontends whose every step is a kernel, without a GPU: near the reference, and equal bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import interpreted
import pytest
import torch

CASES = ("swiglu", "biased and clamped", "one half", "weights after down", "no token")
DTYPES = ("float32", "float16")  # not bfloat16, in which the interpreter cuts digits off


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Every case's error or None."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("CUDA is there: tests/gpu/test_flax_triton.py compares on it")
    return interpreted.outcomes(str(Path(interpreted.__file__).with_name("interpreted_cases.py")), *DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_experts_of_both_frontends_in_the_interpreter_have_the_same_bits(
    outcomes: dict[str, str | None], case: str, dtype: str
) -> None:
    error = outcomes[f"{case} {dtype}"]
    assert error is None, error
