"""The experts on an NVIDIA GPU, both frontends: output and every gradient against the reference."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from sides import Side, assert_correct, cached_problem

from moebius.core.activations import CONFIG_ACTIVATIONS

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible")]

SIDES = tuple(
    Side(framework, backend, "cuda")
    for framework, backend in (
        *(("torch", name) for name in ("loop", "grouped_mm", "triton")),
        *(("jax", name) for name in ("loop", "ragged_dot")),
    )
)
sides = pytest.mark.parametrize("side", SIDES, ids=str)


def test_both_frameworks_see_the_gpu() -> None:
    import jax
    import torch  # before jax: the first to load cuDNN decides its version

    assert torch.cuda.is_available() and jax.default_backend() == "gpu"


@sides
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activation", CONFIG_ACTIVATIONS)
def test_experts_on_a_gpu_agree_with_reference(side: Side, activation: str, dtype: str) -> None:
    if dtype == "float64" and side.backend in ("grouped_mm", "triton"):
        pytest.skip(f"{side.backend} has no {dtype}")
    assert_correct(side, cached_problem(expert_activation=activation, expert_bias=True, dtype=dtype))


@sides
@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_experts_on_a_gpu_of_few_and_many_tokens_agree_with_reference(side: Side, tokens: int) -> None:
    p = cached_problem(tokens=tokens, dim=72, inter=40, n_experts=16, k=4, dtype="bfloat16", expert_bias=True)
    assert_correct(side, p)


@sides
def test_experts_on_a_gpu_keep_poison_in_masked_tokens_to_themselves(side: Side) -> None:
    clean = cached_problem(expert_bias=True, seed=1, dtype="bfloat16")
    mask = clean.token_mask.copy()
    mask[3] = False
    clean = clean.but(token_mask=mask)
    x = clean.x.copy()
    x[3] = np.nan
    found, wanted = side.experts(clean.but(x=x)), side.experts(clean)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
