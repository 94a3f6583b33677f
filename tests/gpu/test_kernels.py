"""The Triton kernels on an NVIDIA GPU: every case of the interpreter and what only a GPU can show."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import kernel_cases
import pytest
import torch
from kernel_cases import CASES, poisoned
from kernel_draws import NAN, Where
from torch import Tensor

from moebius.core.activations import ACTIVATIONS
from moebius.torch_frontend import launch
from moebius.torch_frontend.activate import activate_rows, activate_rows_backward
from moebius.torch_frontend.permute import Order

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible")]

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that a kernel should write and does not, or reads and should not, is NaN."""
    with poisoned():
        yield


@pytest.mark.parametrize(("case", "dtype"), kernel_cases.pairs("float32", "bfloat16", "float16"))
def test_kernel_on_a_gpu_passes(case: str, dtype: str) -> None:
    CASES[case](Where("cuda", getattr(torch, dtype)))


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def ordered(tokens: int, k: int, n_experts: int, seed: int = 0) -> tuple[Order, Tensor, Tensor]:
    """(order, ids, weights) of random routes, some missing."""
    generator = torch.Generator("cuda").manual_seed(seed)
    ids = torch.randint(0, n_experts + 1, (tokens, k), generator=generator, device="cuda", dtype=torch.int32)
    weights = torch.rand(tokens, k, generator=generator, device="cuda")
    return Order(*launch.sort_routes(ids, weights, n_experts)), ids, weights


def assert_near(found: Tensor, exact: Tensor) -> None:
    """A relative error, in the norm, of one rounding to found's dtype and a few in float32."""
    error = (found.double() - exact).norm() / exact.norm()
    assert error <= UNIT[found.dtype] + 20 * UNIT[torch.float32]


@pytest.mark.parametrize(
    ("tokens", "k", "n_experts"), [(16384, 8, 128), (70001, 2, 1500), (131072, 8, 64), (3, 64, 64)]
)
def test_sort_routes_of_many_tokens_agrees_with_a_stable_sort(tokens: int, k: int, n_experts: int) -> None:
    order, ids, weights = ordered(tokens, k, n_experts)
    experts, slots = ids.flatten().sort(stable=True)
    assert torch.equal(order.slot_of_row_R.long(), slots) and torch.equal(order.row_experts_R, experts)
    assert torch.equal(order.group_sizes_e.long(), ids.flatten().long().bincount(minlength=n_experts + 1)[:n_experts])
    assert torch.equal(order.row_weights_R, torch.where(experts < n_experts, weights.flatten()[slots], 0.0))
    rows = torch.empty_like(slots)
    rows[slots] = torch.arange(len(slots), device="cuda")
    assert torch.equal(order.row_of_slot_SK.flatten().long(), torch.where(ids.flatten() < n_experts, rows, -1))


@pytest.mark.parametrize(("tokens", "k", "width"), [(4096, 8, 2048), (4096, 4, 2880), (2048, 8, 7168)])
@pytest.mark.parametrize("dtype", UNIT)
def test_rows_of_many_tokens_go_and_come_back(tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    order = ordered(tokens, k, 32)[0]
    x = drawn(tokens, width, dtype=dtype)
    rows = launch.gather_rows(x, order.slot_of_row_R, k)
    assert torch.equal(rows, x[order.slot_of_row_R.long() // k])
    rows = drawn(tokens * k, width, dtype=dtype, seed=1)
    rows[int(order.group_sizes_e.sum()) :] = NAN
    there = order.row_of_slot_SK >= 0
    terms = torch.where(there[..., None], rows[order.row_of_slot_SK.clamp(min=0).long()].double(), 0.0)
    found = launch.sum_slots(rows, order.row_of_slot_SK)
    assert_near(found, terms.sum(1))


@pytest.mark.parametrize("inter", [768, 2880, 14336])
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_many_rows_agrees_with_float64(name: str, dtype: torch.dtype, inter: int) -> None:
    activation = ACTIVATIONS[name]
    hidden = drawn(3000, activation.up_width(inter), dtype=dtype) * 3
    dact, weights = drawn(3000, inter, dtype=dtype, seed=1), torch.rand(3000, device="cuda")
    doubles = [t.double() for t in (dact, hidden, weights)]
    assert_near(launch.activate_rows(hidden, weights, activation), activate_rows(*doubles[1:], activation))
    exact = activate_rows_backward(*doubles, activation)
    for in_place in (False, True):
        found = launch.activate_rows_backward(dact, hidden.clone(), weights, activation, in_place=in_place)
        assert_near(found[0], exact[0])
        assert_near(found[1], exact[1])


@pytest.mark.parametrize("spread", ["even", "one expert"])
@pytest.mark.parametrize("dtype", UNIT)
def test_sum_rows_of_many_rows_is_the_rounded_float64_sum(dtype: torch.dtype, spread: str) -> None:
    sizes = torch.full((32,), 1000, dtype=torch.int32, device="cuda")
    if spread == "one expert":
        sizes = torch.zeros_like(sizes).index_fill_(0, torch.tensor([5], device="cuda"), 32000)
    values, weights = drawn(33000, 2880, dtype=dtype), torch.rand(33000, device="cuda")
    values[32000:], weights[32000:] = NAN, NAN
    found = launch.sum_rows(values, sizes, weights)
    groups = (values.float() * weights[:, None]).double().split([*sizes.tolist(), 1000])
    exact = torch.stack([group.sum(0) for group in groups[:32]])
    # Elementwise: half a unit of each sum and what float64 leaves open.
    assert ((found.double() - exact).abs() <= (1 + 1e-6) * UNIT[dtype] * exact.abs()).all()


@pytest.mark.parametrize("dtype", UNIT)
def test_dot_rows_of_many_rows_agrees_with_float64(dtype: torch.dtype) -> None:
    order = ordered(4096, 8, 32)[0]
    values, bias = drawn(32768, 2880, dtype=dtype), drawn(32, 2880, dtype=dtype, seed=1)
    end = int(order.group_sizes_e.sum())
    values[end:] = NAN
    terms = values[:end].double() * bias.double()[order.row_experts_R[:end].long()]
    found = launch.dot_rows(values, bias, order.row_experts_R)
    assert_near(found[:end], terms.sum(1))
    assert (found[end:] == 0).all()


def test_kernels_reach_past_two_to_the_31st_element() -> None:
    R, D = 300_000, 7168
    x = drawn(100, D, dtype=torch.bfloat16)
    slots = torch.arange(R, dtype=torch.int32, device="cuda") % 100
    rows = launch.gather_rows(x, slots, 1)
    assert torch.equal(rows[-200:], x.repeat(2, 1))
    assert torch.equal(launch.sum_slots(rows, torch.arange(R, dtype=torch.int32, device="cuda")[:, None])[-100:], x)
    swiglu = ACTIVATIONS["swiglu"]
    assert torch.equal(launch.activate_rows(rows, None, swiglu)[-100:], launch.activate_rows(x, None, swiglu))
    dact = rows[:, : D // 2].contiguous()
    found = launch.activate_rows_backward(dact, rows, None, swiglu)[0][-100:]
    assert torch.equal(found, launch.activate_rows_backward(dact[-100:], rows[-100:], None, swiglu)[0])
    sizes = torch.tensor([R - 100, 100], dtype=torch.int32, device="cuda")
    assert torch.equal(launch.sum_rows(rows, sizes)[1], launch.sum_rows(x, sizes[1:])[0])
    experts = torch.zeros(R, dtype=torch.int32, device="cuda")
    assert torch.equal(launch.dot_rows(rows, x[:1], experts)[-100:], launch.dot_rows(x, x[:1], experts[:100]))


class Everything:
    """Every function once, in bfloat16, on drawn inputs and given ids."""

    K, N_EXPERTS, INTER = 4, 8, 96

    def __init__(self, tokens: int):
        self.values = torch.rand(tokens, self.K, device="cuda")
        self.x = drawn(tokens, self.INTER, dtype=torch.bfloat16)
        self.hidden = drawn(tokens * self.K, 2 * self.INTER, dtype=torch.bfloat16, seed=1)
        self.bias = drawn(self.N_EXPERTS, 2 * self.INTER, dtype=torch.bfloat16, seed=2)
        self.down = drawn(self.N_EXPERTS, self.INTER, dtype=torch.bfloat16, seed=3)

    def ids(self) -> Tensor:
        shape = self.values.shape
        return torch.randint(0, self.N_EXPERTS + 1, shape, device="cuda", dtype=torch.int32)

    def run(self, ids: Tensor) -> list[Tensor]:
        """All results; rows and their weights' gradients in the tail too, for nothing here is NaN."""
        order = Order(*launch.sort_routes(ids, self.values, self.N_EXPERTS))
        activation, weights, experts = ACTIVATIONS["quick_geglu"], order.row_weights_R, order.row_experts_R
        options = {"bias_eU": self.bias, "row_experts_R": experts}
        rows = launch.gather_rows(self.x, order.slot_of_row_R, self.K)
        act = launch.activate_rows(self.hidden, weights, activation, **options)
        backward = launch.activate_rows_backward(rows, self.hidden, weights, activation, **options)
        sums = launch.sum_rows(self.hidden, order.group_sizes_e, weights)
        dots = launch.dot_rows(self.hidden, self.bias, experts)
        y = launch.sum_slots(act, order.row_of_slot_SK, bias_eD=self.down, row_experts_R=experts, row_weights_R=weights)
        return [*order, rows, act, *backward, sums, dots, y]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_kernels_give_the_same_bits_every_time() -> None:
    everything = Everything(5000)
    ids = everything.ids()
    wanted = everything.run(ids)
    assert all(same(everything.run(ids), wanted) for _ in range(5))


def test_kernels_never_wait_for_the_device() -> None:
    everything = Everything(100)
    ids = everything.ids()
    everything.run(ids)  # compiles
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        everything.run(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_in_a_cuda_graph_follow_other_routes() -> None:
    everything = Everything(100)
    ids = everything.ids()
    everything.run(ids)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = everything.run(ids)
    for other in (everything.ids(), torch.full_like(ids, 3), torch.full_like(ids, everything.N_EXPERTS)):
        ids.copy_(other)
        graph.replay()
        assert same(found, everything.run(ids))


def test_kernels_of_another_number_of_tokens_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    for tokens in (1, 100):  # few routes are sorted by one program, and more by three kernels
        first = Everything(tokens)
        first.run(first.ids())
    compiled: list[Any] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(given))
    for tokens in (1, 2, 16, 99, 4096):
        everything = Everything(tokens)
        everything.run(everything.ids())
    assert not compiled
    launch.gather_rows(drawn(3, 77), torch.zeros(3, dtype=torch.int32, device="cuda"), 1)
    assert compiled, "the hook sees what is compiled"
