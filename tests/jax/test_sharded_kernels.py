"""Backend "triton" on several devices: refused where JAX would gather what is split, and not in a shard_map."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import interpreted
import jax
import pytest

REFUSED = (
    "jit of sharded tokens",
    "jit of a gradient",
    "lowered for shardings",
    "no jit",
    "no jit, explicit",
    "a shard_map over one of two axes",
)
COMPUTED = (
    "one device",
    "one device of four",
    "a shard_map over all axes",
    "a shard_map without jit",
    "another backend",
)


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    """Every case's error or None, of a process with four devices and Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter computes on the CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4")
        return interpreted.outcomes(str(Path(interpreted.__file__).with_name("sharded_cases.py")))


@pytest.mark.parametrize("case", REFUSED)
def test_kernels_over_devices_outside_of_a_shard_map_are_refused(found: dict[str, str | None], case: str) -> None:
    assert found[case] is None, found[case]


@pytest.mark.parametrize("case", COMPUTED)
def test_kernels_on_one_device_and_in_a_shard_map_compute_what_another_backend_does(
    found: dict[str, str | None], case: str
) -> None:
    assert found[case] is None, found[case]


def test_every_case_over_devices_was_looked_at(found: dict[str, str | None]) -> None:
    assert sorted(found) == sorted(REFUSED + COMPUTED)
