"""Backend "triton" under JAX's transformations: computed as by another backend, or refused naming the switch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import interpreted
import jax
import pytest

COMPUTED = (
    "jit",
    "no jit",
    "scan of remat",
    "vmap",
    "vmap of grad",
    "grad of vmap",
    "a gradient in a loss",
    "a gradient in a loss under vmap",
    "the switch",
)
REFUSED = (
    "grad of grad",
    "jit of grad of grad",
    "grad of grad under vmap",
    "grad of grad of vmap",
    "hessian",
    "jvp",
    "jit of jvp",
    "jvp of grad",
    "jit of jvp of grad",
    "linearize",
    "grad of a kernel",
    "vmap of jvp of a kernel",
    "grad of two kernels",
)


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """Every case's error or None, of a process with Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter computes on the CPU")
    return interpreted.outcomes(str(Path(interpreted.__file__).with_name("transformed_cases.py")))


@pytest.mark.parametrize("case", COMPUTED)
def test_experts_by_kernels_under_a_transformation_are_those_of_another_backend(
    found: dict[str, str | None], case: str
) -> None:
    assert found[case] is None, found[case]


@pytest.mark.parametrize("case", REFUSED)
def test_experts_by_kernels_refuse_a_second_derivative_and_forward_mode_and_name_the_switch(
    found: dict[str, str | None], case: str
) -> None:
    assert found[case] is None, found[case]


def test_every_case_under_a_transformation_was_looked_at(found: dict[str, str | None]) -> None:
    assert sorted(found) == sorted(COMPUTED + REFUSED)
