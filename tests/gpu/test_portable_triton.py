"""The grouped products for any GPU, on one: every case of the interpreter, and layers that they alone serve."""

from __future__ import annotations

import on_gpu
import portable_cases
import pytest
import torch
from kernel_draws import Where
from sides import Side, assert_correct, cached_problem

pytestmark = on_gpu.MARKS
SIDE = Side("torch", "triton", "cuda")


@pytest.mark.parametrize(("case", "dtype"), portable_cases.pairs("float32", "bfloat16", "float16"))
def test_portable_product_on_a_gpu_passes(case: str, dtype: str) -> None:
    portable_cases.CASES[case](Where("cuda", getattr(torch, dtype)))


@pytest.mark.parametrize(("dtype", "dim", "inter"), [("float32", 64, 48), ("bfloat16", 37, 21), ("bfloat16", 64, 12)])
def test_experts_of_float32_or_odd_widths_agree_with_reference(dtype: str, dim: int, inter: int) -> None:
    assert_correct(SIDE, cached_problem(dtype=dtype, dim=dim, inter=inter, expert_bias=True))
