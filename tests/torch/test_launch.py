"""The kernels under Triton's interpreter, what they serve, and their launch plans."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import numpy as np
import pytest
import torch

from moebius.core.activations import ACTIVATIONS
from moebius.core.kernels import plan
from moebius.torch_frontend import launch, matmul

# Not bfloat16: the interpreter of triton 3.6 cuts digits off instead of rounding. tests/gpu has it.
DTYPES = ("float32", "float16")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Every case's error or None, from a process in which the interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("CUDA is there: tests/gpu/test_kernels.py runs these cases on it")
    command = [sys.executable, "-W", "ignore", kernel_cases.__file__, *DTYPES]
    source = str(Path(launch.__file__).parents[2])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("case", "dtype"), kernel_cases.pairs(*DTYPES))
def test_kernel_under_the_interpreter_passes(outcomes: dict[str, str | None], case: str, dtype: str) -> None:
    error = outcomes[f"{case} {dtype}"]
    assert error is None, error


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing but a dtype can stand in the way."""
    monkeypatch.setattr(launch, "_has_triton", lambda: True)
    monkeypatch.setattr(launch, "_device_serves", lambda device: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_serves_a_dtype_of_the_kernels_is_true(everywhere: None, dtype: torch.dtype) -> None:
    assert launch.serves(torch.zeros(1, dtype=dtype), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_serves_another_dtype_is_false(everywhere: None, dtype: torch.dtype) -> None:
    assert not launch.serves(torch.zeros(1), torch.zeros(1, dtype=dtype))


def test_serves_without_triton_is_false(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_triton", lambda: False)
    assert not launch.serves(torch.zeros(1))


def test_serves_a_cpu_tensor_without_the_interpreter_is_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launch._device_serves.cache_clear()
    assert not launch.serves(torch.zeros(1))


SWIGLU = ACTIVATIONS["swiglu"]
PLANS = {
    "sort_routes": lambda rows: plan.sort_routes(rows, 5),
    "gather_rows": lambda rows: (plan.gather_rows(rows, 2, 100),),
    "sum_slots": lambda rows: (plan.sum_slots(rows, 2, 100, True, True, False),),
    "activate_rows": lambda rows: (plan.activate_rows(rows, 100, SWIGLU, 5, True),),
    "activate_rows_backward": lambda rows: (plan.activate_rows_backward(rows, 100, SWIGLU, 5, True),),
    "sum_rows": lambda rows: plan.sum_rows(rows, 5, 100, True),
    "dot_rows": lambda rows: (plan.dot_rows(rows, 5, 100),),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan_of_another_number_of_rows_is_the_same_code(name: str) -> None:
    def code(rows: int) -> list:
        return [(launch.kernel, launch.constants, launch.options()) for launch in PLANS[name](rows)]

    assert code(1) == code(7) == code(4096) == code(131072)


@pytest.mark.parametrize("width", [1, 31, 62, 100, 768, 2048, 2880, 5760, 7168, 28672])
def test_tile_wastes_little(width: int) -> None:
    rows, columns = plan.tile(width, 1024)
    assert rows * columns == 1024
    blocks = -(-width // columns)
    assert blocks * columns <= max(32, 1.07 * width) or (width < 128 and blocks * columns <= 2 * width)


def test_parts_are_enough_however_the_rows_are_spread() -> None:
    generator = np.random.default_rng(0)
    length = plan.sum_rows(1, 1, 1, False)[0].constants["LENGTH"]
    for _ in range(300):
        n_rows, n_experts = generator.integers(1, 8 * length), generator.integers(1, 12)
        sizes = np.diff(np.sort(generator.integers(0, n_rows + 1, n_experts + 1)))
        assert (-(-sizes // length)).sum() <= plan.parts(int(n_rows), int(n_experts))


def test_a_device_of_rocm_is_not_taken_for_one_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert matmul._kind(torch.device("cuda")) == "rocm" and matmul._kind(torch.device("cpu")) == "cpu"
    launch._device_serves.cache_clear()
    assert not launch._device_serves(torch.device("cuda"))
    launch._device_serves.cache_clear()
