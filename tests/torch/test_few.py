"""Experts of few rows, played from tapes under Triton's interpreter: bit for bit what the steps give."""

from __future__ import annotations

import importlib.util

import interpreted
import played_cases
import pytest
import torch

# Not bfloat16, in which the interpreter cuts digits off. tests/gpu has it.
DTYPES = ("float32",)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Every case's error or None, from a process in which the interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("CUDA is there: tests/gpu/test_few.py runs them on it")
    return interpreted.outcomes(played_cases.__file__, *DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", played_cases.CASES)
def test_played_experts_have_the_bits_of_the_steps(outcomes: dict[str, str | None], case: str, dtype: str) -> None:
    error = outcomes[f"{case} {dtype}"]
    assert error is None, error
