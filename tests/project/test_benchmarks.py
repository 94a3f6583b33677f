"""The GPU benchmark without a GPU: its floors, its problems, its checks, its tables."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import gpu_check, gpu_experts, gpu_meter, gpu_tables
from benchmarks.gpu_bench import in_turn
from benchmarks.gpu_floors import Ceilings, kernel_floor, kernels
from benchmarks.gpu_problem import SHAPES, Candidate, Problem, Shape, draw, route
from benchmarks.peers import composite

TINY = SHAPES["qwen3"].tiny()
H200 = Ceilings(flops=790e12, bytes=4.3e12)


# ------------------------------------------------------------------------------------------------------------ floors
@pytest.mark.parametrize(
    ("key", "forward", "both"),
    # Worked out by hand: 6 T K D I (times 3) / 790 TFLOP/s, and (T K + T) D 2 bytes / 4.3 TB/s for each sum over K.
    [("qwen3", 1.707, 4.979), ("gptoss", 4.239, 12.61), ("mixtral", 14.71, 44.03), ("dsv3", 3.776, 11.21)],
)
def test_kernel_floor_of_four_models_is_their_products_and_two_sums(key: str, forward: float, both: float) -> None:
    found = [kernel_floor(SHAPES[key], backward, H200) for backward in (False, True)]
    assert found == pytest.approx([forward, both], rel=2e-3)


def test_kernel_floor_of_a_slow_memory_is_its_bytes() -> None:
    slow = Ceilings(flops=1e30, bytes=1e9)
    total = sum(kernel.bytes for kernel in kernels(TINY, True))
    assert kernel_floor(TINY, True, slow) == pytest.approx(total / 1e6)


@pytest.mark.parametrize("backward", [False, True])
def test_kernels_compute_the_flops_that_are_counted(backward: bool) -> None:
    assert sum(kernel.flops for kernel in kernels(TINY, backward)) == TINY.flops(backward)


# ----------------------------------------------------------------------------------------------------------- problem
@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_route_gives_each_token_k_experts(zipf: float) -> None:
    routing = route(TINY, "cpu", zipf=zipf)
    assert routing.indices.shape == routing.weights.shape == (TINY.tokens, TINY.k)
    assert all(len(set(row)) == TINY.k for row in routing.indices.tolist())
    assert int(routing.indices.min()) >= 0 and int(routing.indices.max()) < TINY.n_experts


def test_turns_go_there_and_back_and_every_two_have_an_order_of_their_own() -> None:
    orders = [tuple(in_turn("abcdef", turn)) for turn in range(8)]
    assert all(sorted(order) == list("abcdef") for order in orders)
    assert all(back == there[::-1] for there, back in zip(orders[::2], orders[1::2], strict=True))
    assert len(set(orders)) == 8 and len({order[0] for order in orders}) > 2


def test_route_of_a_zipf_exponent_is_more_uneven() -> None:
    wide = replace(TINY, tokens=4096, n_experts=64)
    busiest = [int(route(wide, "cpu", zipf=zipf).indices.flatten().bincount().max()) for zipf in (0.0, 1.0)]
    assert busiest[1] > 3 * busiest[0]


# ------------------------------------------------------------------------------------------------------------- check
def _checked(problem: Problem, candidate: Candidate) -> dict[str, float]:
    gpu_meter.clear([problem.x, problem.routing.weights, *candidate.parameters])
    y = candidate.call(problem.x, problem.routing.weights, problem.routing.indices)
    y.backward(problem.dy)
    found = gpu_check.left_by(problem, candidate, y.detach())
    return gpu_check.errors(gpu_check.reference(problem), found)


def test_errors_of_the_composite_in_float32_are_roundings() -> None:
    problem = draw(TINY, "cpu", dtype=torch.float32)
    found = _checked(problem, composite.build(problem))
    assert set(found) == {"y", "dx", "dweights", "dup", "ddown"}
    assert max(found.values()) < 1e-5
    gpu_check.require(found)


def _halves_swapped(problem: Problem, right: Candidate) -> Candidate:
    return composite.build(replace(problem, up=torch.cat(problem.up.chunk(2, -1)[::-1], -1)))


def _unweighted(problem: Problem, right: Candidate) -> Candidate:
    return replace(right, call=lambda x, weights, indices: right.call(x, 0 * weights + 0.25, indices))


def _one_slot_short(problem: Problem, right: Candidate) -> Candidate:
    mask = torch.tensor([1.0] * (problem.shape.k - 1) + [0.0])
    return replace(right, call=lambda x, weights, indices: right.call(x, weights * mask, indices))


def _neighbours_gradient(problem: Problem, right: Candidate) -> Candidate:
    return replace(right, gradients=lambda expert: right.gradients((expert + 1) % problem.shape.n_experts))


def _nan_in_one_token(problem: Problem, right: Candidate) -> Candidate:
    poison = torch.zeros(problem.shape.tokens, 1).index_fill(0, torch.tensor([1]), float("nan"))
    return replace(right, call=lambda x, weights, indices: right.call(x, weights, indices) + poison)


@pytest.mark.parametrize(
    ("wrong", "seen_in"),
    [
        (_halves_swapped, "y "),
        (_unweighted, "dweights "),
        (_one_slot_short, "y .*, dx .*, dweights "),
        (_neighbours_gradient, "above 0.02: dup .*, ddown [^,]*$"),
        (_nan_in_one_token, "above 0.02: values that are not finite"),
    ],
)
def test_require_of_a_wrong_candidate_refuses(wrong: Callable[[Problem, Candidate], Candidate], seen_in: str) -> None:
    # More tokens than the slice has: token 1 lies outside of it.
    problem = draw(replace(TINY, tokens=3 * gpu_check.N_TOKENS), "cpu", dtype=torch.float32)
    right = composite.build(problem)
    gpu_check.require(_checked(problem, right))
    with pytest.raises(ValueError, match=seen_in):
        gpu_check.require(_checked(problem, wrong(problem, right)))


def test_errors_of_an_expert_without_rows_want_a_zero_gradient() -> None:
    problem = draw(TINY, "cpu", dtype=torch.float32)
    indices = problem.routing.indices
    problem = replace(problem, routing=replace(problem.routing, indices=indices.where(indices != 3, 5)))
    right = composite.build(problem)
    assert max(_checked(problem, right).values()) < 1e-5
    stale = replace(right, gradients=lambda expert: tuple(g + 1e-3 for g in right.gradients(expert)))
    assert _checked(problem, stale)["dup"] == float("inf")


# ------------------------------------------------------------------------------------------------------------ tables
def _figures() -> dict[str, Any]:
    """Ours: 10 ms and 3 GiB; a peer 12 ms, the compiled one 15 ms and 2.5 GiB; 1 GiB is weight gradients."""
    results = []
    for row, kind, ms, gib in (("grouped_mm", "ours", 10.0, 3.0), ("te_layers", "peer", 12.0, 9.0)):
        results.append({"shape": "qwen3", "row": row, "kind": kind, "memory": {"both": gib * 2**30, "kept": 2**30}})
        results[-1] |= {name: {"ms": ms, "tflops": 4000 / ms, "drift": 0.01} for name in gpu_tables.PASSES}
    results.append({**results[1], "row": "compiled", "memory": {"both": 2.5 * 2**30, "kept": 2**30}})
    results[-1] |= {name: {"ms": 15.0, "tflops": 267.0, "drift": 0.01} for name in gpu_tables.PASSES}
    results.append({"shape": "qwen3", "row": "te", "kind": "ours", "reason": "ImportError: no such module"})
    floor = {"compute_ms": 4.0, "kernel_ms": 5.0, "compute_tflops": 1000.0, "kernel_tflops": 800.0}
    shape = {"name": "Qwen3-30B-A3B", "weight_bytes": 2**30, "least_bytes": 2**29}
    shape["floors"] = dict.fromkeys(gpu_tables.PASSES, floor)
    rows = {name: gpu_experts.ROWS[name].title for name in ("grouped_mm", "te", "compiled", "te_layers")}
    return {"rows": rows, "shapes": {"qwen3": shape}, "results": results, "skew": [], "skew_exponent": 0.0}


@pytest.mark.parametrize(
    "line",
    [
        "| moebius grouped_mm | 400 / 400 |",
        "| moebius te | - / - |",
        "| floor of separate kernels | 800 / 800 |",
        "| best of ours, share of that floor | 0.50 / 0.50 |",
        "| best of ours / best peer | 1.20 / 1.20 |",
        "| moebius grouped_mm | 3.00 / 1.00 |",
        "| fastest of ours / larger of compiled and that | 1.20 |",
        "| the same without weight gradients | 1.33 |",
        "- moebius te (qwen3): ImportError: no such module",
    ],
)
def test_tables_hold_the_figure_the_ratio_and_the_reason(line: str) -> None:
    assert line in gpu_tables.tables(_figures()).splitlines()


def test_tables_hold_the_memory_ratio_against_what_nobody_goes_below() -> None:
    figures = _figures()
    figures["shapes"]["qwen3"]["least_bytes"] = 4 * 2**30
    lines = gpu_tables.tables(figures).splitlines()
    assert "| fastest of ours / larger of compiled and that | 0.75 |" in lines
    assert "| the same without weight gradients | 0.50 |" in lines


# ------------------------------------------------------------------------------------------------------------ shapes
def test_shape_counts_the_bytes_of_its_weights_and_of_what_it_must_hold() -> None:
    shape = Shape(name="", tokens=10, n_experts=4, k=2, dim=3, inter=5)
    assert shape.weight_bytes() == 2 * 4 * (3 * 10 + 5 * 3)
    assert shape.least_bytes() == 2 * (20 * 3 + 20 * 10 + 2 * 10 * 3)
