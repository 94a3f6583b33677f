"""The documented functions on a GPU: gradients that are the same each time and equal to the rounded float64 sum."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from typing import Any

import pytest
import torch
from sides import cached_problem, expected

from moebius.core import BackendConfig, BackendUnavailable, Unsupported
from moebius.core.tolerance import within
from moebius.torch_frontend import automodel, load_parameters
from moebius.torch_frontend.automodel import _apply_bias, _permute_tokens_for_grouped_mm, _torch_mm_experts_fwd

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible")]

weighted = pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to("cuda", dtype)


def bias_gradient(dout: torch.Tensor, counts: list[int], probs: torch.Tensor | None) -> torch.Tensor:
    bias = torch.zeros(len(counts), dout.shape[1], dtype=dout.dtype, device="cuda", requires_grad=True)
    sizes = torch.tensor(counts, device="cuda")
    _apply_bias(torch.zeros_like(dout, memory_format=torch.contiguous_format), bias, sizes, probs).backward(dout)
    return bias.grad


def exact_gradient(dout: torch.Tensor, counts: list[int], probs: torch.Tensor | None) -> torch.Tensor:
    """The sum of the products in float32, which are what the row's gradient holds, in float64 and rounded."""
    terms = (dout.float() if probs is None else dout.float() * probs).double()
    return torch.stack([part.sum(0) for part in terms.split(counts)]).to(dout.dtype)


@weighted
def test_apply_bias_gradient_of_one_full_expert_is_the_rounded_float64_sum_ten_times(weighted: bool) -> None:
    counts = [0] * 64
    counts[17] = 4096
    dout = drawn(4096, 512, dtype=torch.bfloat16)
    probs = drawn(4096, 1, seed=1).abs() if weighted else None
    wanted = exact_gradient(dout, counts, probs)
    for _ in range(10):
        assert torch.equal(bias_gradient(dout, counts, probs), wanted)


@weighted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_apply_bias_gradient_of_sums_that_cancel_is_the_rounded_float64_sum(dtype: torch.dtype, weighted: bool) -> None:
    dout = torch.full((4096, 64), 0.9999, device="cuda")
    dout[1::2] *= -1.0
    dout[::2] += drawn(2048, 64) * 1e-3
    probs = drawn(4096, 1, seed=1).abs() if weighted else None
    counts = [4000, 0, 96]
    assert torch.equal(bias_gradient(dout.to(dtype), counts, probs), exact_gradient(dout.to(dtype), counts, probs))


@weighted
def test_apply_bias_gradient_of_odd_segments_and_a_transposed_gradient_is_the_rounded_float64_sum(
    weighted: bool,
) -> None:
    counts = [0, 1, 127, 128, 129, 4096, 17, 0]
    dout = drawn(40, sum(counts), dtype=torch.bfloat16).T
    probs = drawn(sum(counts), 1, seed=1).abs() if weighted else None
    assert not dout.is_contiguous()
    assert torch.equal(bias_gradient(dout, counts, probs), exact_gradient(dout, counts, probs))


def test_apply_bias_does_not_wait_for_the_gpu() -> None:
    value, bias, probs = drawn(64, 32), drawn(4, 32, seed=1).requires_grad_(), drawn(64, 1, seed=2).requires_grad_()
    sizes = torch.tensor([10, 0, 50, 4], device="cuda")
    _apply_bias(value, bias, sizes, probs).sum().backward()  # compiles what there is to compile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        _apply_bias(value, bias, sizes, probs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_mm_experts_fwd_on_a_gpu_equals_one_product_an_expert(dtype: torch.dtype) -> None:
    hidden, up, down = drawn(96, 64, dtype=dtype), drawn(3, 64, 64, seed=1, dtype=dtype) / 8, drawn(3, 32, 64, seed=2)
    down, probs, counts = (down / 6).to(dtype), drawn(96, 1, seed=3).abs(), [40, 0, 56]
    swiglu = automodel.weighted_bias_swiglu_impl
    found = _torch_mm_experts_fwd(hidden, up, down, torch.tensor(counts, device="cuda"), probs, swiglu)
    parts = zip(hidden.split(counts), probs.split(counts), up, down, strict=True)
    wanted = torch.cat([swiglu((x @ w1), p) @ w2 for x, p, w1, w2 in parts])
    assert found.dtype == dtype
    # float32 products run in TF32 where that is allowed, or in another order; bfloat16 rounds the same sums once.
    torch.testing.assert_close(found, wanted, rtol=1e-3 if dtype == torch.float32 else 1.6e-2, atol=1e-3)


def test_permute_tokens_on_a_gpu_equals_the_cpu() -> None:
    indices = torch.randint(-1, 9, (300, 4), generator=torch.Generator().manual_seed(0))
    weights, mask = torch.rand(300, 4, generator=torch.Generator().manual_seed(1)), torch.arange(300) % 7 != 0
    wanted = _permute_tokens_for_grouped_mm(indices, weights, mask, 4, 2, return_slot_ids=True)
    on_gpu = [value.cuda() for value in (indices, weights, mask)]
    for found, value in zip(_permute_tokens_for_grouped_mm(*on_gpu, 4, 2, return_slot_ids=True), wanted, strict=True):
        assert found.dtype == value.dtype and torch.equal(found.cpu(), value)


def test_mxfp8_below_compute_capability_10_is_refused_in_words() -> None:
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this GPU has MXFP8")
    hidden, up, down = (drawn(*shape, dtype=torch.bfloat16) for shape in ((4, 32), (2, 32, 64), (2, 32, 32)))
    sizes, probs = torch.tensor([2, 2], device="cuda"), torch.ones(4, 1, device="cuda")
    # The former without torchao.
    with pytest.raises((BackendUnavailable, Unsupported), match=r"MXFP8 needs CUDA compute capability 10\.0, not"):
        _torch_mm_experts_fwd(hidden, up, down, sizes, probs, automodel.weighted_bias_swiglu_impl, use_mxfp8=True)


KINDS = {
    "experts-loop": (automodel.GroupedExperts, "torch"),
    "experts-grouped": (automodel.GroupedExperts, "torch_mm"),
    "deepep-gmm": (automodel.GroupedExpertsDeepEP, "gmm"),
    "deepep-grouped": (automodel.GroupedExpertsDeepEP, "torch_mm"),
    "te": (automodel.GroupedExpertsTE, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_on_a_gpu_agree_with_reference(kind: str, dtype: str) -> None:
    if (kind, dtype) == ("te", "float32"):
        pytest.skip("Transformer Engine multiplies float32 in TF32")
    cls, backend = KINDS[kind]
    p = cached_problem(tokens=40, dim=64, inter=32, n_experts=8, expert_bias=True, dtype=dtype)
    try:
        with torch.device("cuda"):
            module: Any = cls(p.config, BackendConfig(experts=backend))
    except (BackendUnavailable, Unsupported) as error:
        pytest.skip(error.found)
    load_parameters(module, {name: torch.from_numpy(value) for name, value in p.parameters.items()})
    x, dy = (torch.from_numpy(value).to("cuda", getattr(torch, dtype)) for value in (p.x, p.dy))
    weights = torch.from_numpy(p.weights).float().cuda().requires_grad_()
    y = module(x.requires_grad_(), torch.from_numpy(p.token_mask).cuda(), weights, torch.from_numpy(p.ids).cuda())
    y.backward(dy)
    grads = {name: value.grad for name, value in module.named_parameters()}
    exact, limits = expected(p)
    for name, value in {"y": y, "dx": x.grad, "dweights": weights.grad, **grads}.items():
        assert within(value.detach().double().cpu().numpy(), exact[name], limits[name]), name
