"""The portable grouped products under Triton's interpreter, and their launch plans."""

from __future__ import annotations

import importlib.util
from typing import Any

import interpreted
import numpy as np
import portable_cases
import pytest
import torch

from moebius.core.kernels import plan_portable as plan
from moebius.core.kernels.plan import Launch

# Not bfloat16: the interpreter's `dot` multiplies its bits as integers.
DTYPES = ("float32", "float16")
A100, L40, H100 = (8, 0), (8, 9), (9, 0)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """Every case's error or None, from a process in which the interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("CUDA is there, on which these cases can run themselves")
    return interpreted.outcomes(portable_cases.__file__, *DTYPES)


@pytest.mark.parametrize(("case", "dtype"), portable_cases.pairs(*DTYPES))
def test_portable_kernel_under_the_interpreter_passes(outcomes: dict[str, str | None], case: str, dtype: str) -> None:
    error = outcomes[f"{case} {dtype}"]
    assert error is None, error


def product(n_rows: int = 1000, widths: tuple[int, int] = (2048, 1536), **options: Any) -> Launch:
    given = {"height": 64, "dtype": "bfloat16", "capability": A100} | options
    return plan.product(n_rows, 8, *widths, False, **given)


def test_product_of_another_number_of_rows_is_the_same_code() -> None:
    codes = [(launch.constants, launch.options()) for launch in (product(1), product(7), product(131072))]
    assert codes[0] == codes[1] == codes[2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_height_grows_with_the_rows_of_an_expert_up_to_a_tile_that_the_plan_has(dtype: str) -> None:
    heights = [plan.height(n_rows, 16, dtype) for n_rows in range(0, 4096, 16)]
    assert heights == sorted(heights) and heights[0] == 16
    assert heights[-1] == (64 if dtype == "float32" else 128)
    for height in set(heights):
        assert product(dtype=dtype, height=height).constants["ROWS"] == height


@pytest.mark.parametrize("height", [16, 32, 64, 128])
def test_tiles_are_enough_however_the_rows_are_spread(height: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        n_rows, n_experts = generator.integers(1, 8 * height), generator.integers(1, 12)
        sizes = np.diff(np.sort(generator.integers(0, n_rows + 1, n_experts + 1)))
        assert (-(-sizes // height)).sum() <= plan.tiles(int(n_rows), int(n_experts), height)


@pytest.mark.parametrize("widths", [(2048, 1536), (2880, 5760), (7168, 4096), (1536, 7168)])
def test_product_of_a_models_widths_wastes_few_columns(widths: tuple[int, int]) -> None:
    columns = product(widths=widths, height=128).constants["COLS"]
    assert columns >= 128 and -(-widths[1] // columns) * columns <= 1.07 * widths[1]


@pytest.mark.parametrize("widths", [(2048, 1536), (33, 70), (8, 16)])
def test_weight_gradient_has_a_program_for_every_tile_of_every_expert(widths: tuple[int, int]) -> None:
    launch = plan.weight_gradient(5, *widths, dtype="float16", capability=L40)
    down, across = (-(-width // launch.constants[name]) for width, name in zip(widths, ("ROWS", "COLS"), strict=True))
    assert launch.programs == 5 * down * across


def test_product_on_a_device_with_more_shared_memory_has_deeper_blocks() -> None:
    kept = {}
    for capability in (A100, L40, H100):
        c = product(widths=(4096, 14336), height=128, capability=capability).constants
        kept[capability] = 2 * (c["ROWS"] + c["COLS"]) * c["DEEP"] * c["STAGES"] / 1024
    assert kept[L40] <= 99 < kept[A100] <= 163 < kept[H100] <= 227
