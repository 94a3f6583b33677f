"""Tuning of kernels, without a GPU: what is tried, what that needs, and what is played."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import tune_variants
from benchmarks.gpu_problem import SHAPES, Shape
from benchmarks.tune_cases import Case, Layer
from benchmarks.tune_kernels import HOPPER, KERNELS, of_dtype
from moebius.core.errors import Unsupported
from moebius.core.kernels.plan import Launch
from moebius.core.kernels.plan_grouped import Device
from moebius.torch_frontend import launch as frontend

HOPPERS = Device((9, 0), 132)
LIMIT = 227 * 1024
TINY = SHAPES["qwen3"].tiny()
ODD = {"portable_product": "odd", "portable_product_transposed": "float32", "portable_weight_gradient": "float32"}


def layer(shape: Shape = SHAPES["qwen3"], **options: Any) -> Layer:
    given = {"device": "meta", "target": HOPPERS, "limit": LIMIT} | options
    return Layer(shape, **given)


def case_of(kernel: str, shape: Shape = SHAPES["qwen3"], **options: Any) -> Case:
    return next(KERNELS[kernel](layer(shape, **options), kernel))


# ----------------------------------------------------------------------------------------------------------- variants
@pytest.mark.parametrize("kernel", HOPPER)
def test_blocks_and_programs_of_the_plans_constants_are_the_plans(kernel: str) -> None:
    for case in KERNELS[kernel](layer(), kernel):
        assert case.launched({}) == case.launch


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k not in HOPPER])
@pytest.mark.parametrize("tokens", [1, 77, 16384])
def test_programs_of_the_plans_constants_are_the_plans(kernel: str, tokens: int) -> None:
    shape = of_dtype(SHAPES["gptoss"], ODD.get(kernel, "bfloat16"))
    for case in KERNELS[kernel](layer(replace(shape, tokens=tokens)), kernel):
        assert case.launched({}) == case.launch


@pytest.mark.parametrize(
    ("kernel", "columns", "stages", "needed"),
    # By hand: (128 + COLS) * 64 * 2 a stage, 2 * 64 * COLS * 2 of halves, 4 * 8 * COLS * 2 of the pre-activation,
    # barriers, and 256 for the tasks.
    [
        ("product", 256, 3, 3 * 49152 + 65536 + 80 + 256),
        ("product", 128, 6, 6 * 32768 + 32768 + 128 + 256),
        ("weight_gradient", 256, 4, 4 * 49152 + 65536 + 96 + 256),
        ("differentiated_product", 256, 3, 3 * 49152 + 65536 + 16384 + 96 + 256),
        ("differentiated_product", 128, 6, 6 * 32768 + 32768 + 8192 + 144 + 256),
    ],
)
def test_hopper_bytes_are_ring_halves_barriers_and_what_is_read(
    kernel: str, columns: int, stages: int, needed: int
) -> None:
    assert tune_variants.hopper_bytes(case_of(kernel).launch, columns, stages) == needed


def test_variants_of_a_product_are_tiles_that_fit_one_that_does_not_and_groups() -> None:
    assert case_of("product").changes == [
        {"STAGES": 2},
        {"STAGES": 4},
        {"COLS": 128, "STAGES": 6},
        {"COLS": 128, "STAGES": 5},
        {"COLS": 128, "STAGES": 7},
        {"GROUP": 4},
        {"GROUP": 8},
        {"GROUP": 24},
    ]


def test_variants_of_few_rows_begin_at_the_plans_narrow_tiles() -> None:
    few = case_of("product", Shape(name="few", tokens=1, n_experts=8, k=2, dim=4096, inter=14336))
    assert few.launch.constants["COLS"] == 128
    assert {"COLS": 256, "STAGES": 3} in few.changes and {"STAGES": 6} in few.changes


@pytest.mark.parametrize("whole", [False, True])
def test_variants_of_the_derivative_unroll_what_divides_their_panels(whole: bool) -> None:
    case = case_of("differentiated_product", whole=whole)
    tried = [case.launched(change).constants for change in case.changes]
    assert all(constants["COLS"] // 64 % constants["UNROLL"] == 0 for constants in tried)
    assert {(c["COLS"], c["UNROLL"]) for c in tried} >= {(256, 1), (256, 2), (128, 2)}
    assert (max(len(change) for change in case.changes) > 3) == whole


@pytest.mark.parametrize("kernel", KERNELS)
def test_variants_of_every_kernel_are_distinct_and_other_than_the_plan(kernel: str) -> None:
    for case in KERNELS[kernel](layer(of_dtype(SHAPES["dsv3"], ODD.get(kernel, "bfloat16"))), kernel):
        launches = [case.launched(change) for change in case.changes]
        assert launches and case.launch not in launches
        assert all(launches.count(launch) == 1 for launch in launches)


def test_variants_of_every_combination_are_more() -> None:
    assert len(case_of("product", whole=True).changes) > 2 * len(case_of("product").changes)


def test_variants_of_large_portable_tiles_have_warps_for_their_sums() -> None:
    case = case_of("portable_product", of_dtype(SHAPES["mixtral"], "float32"))
    for change in case.changes:
        launch = case.launched(change)
        assert launch.constants["ROWS"] * launch.constants["COLS"] <= 128 * 32 * launch.num_warps


@pytest.mark.parametrize(
    ("constants", "needed", "said"),
    [
        ({}, LIMIT, ""),
        ({}, LIMIT + 1024, "228 KiB of shared memory, 227 are there"),
        ({"ROWS": 256, "COLS": 256}, 0, "256 sums a thread, which has 255 registers"),
    ],
)
def test_against_says_why_a_variant_is_not_tried(constants: dict[str, int], needed: int, said: str) -> None:
    launch = case_of("portable_product").launched(constants)
    assert tune_variants.against(launch, needed, LIMIT) == said


def test_hopper_kernels_on_another_device_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"compute capability 8\.0"):
        case_of("product", target=Device((8, 0), 108))


# -------------------------------------------------------------------------------------------------------------- cases
@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Launch, list[Any]]]:
    """What the PyTorch frontend plays from now on, as if on an H200."""
    found: list[tuple[Launch, list[Any]]] = []
    monkeypatch.setattr(frontend, "run", lambda launch, *given: found.append((launch, [described(v) for v in given])))
    monkeypatch.setattr(frontend, "_device", lambda device: HOPPERS)
    return found


def described(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


CALLS = {
    "product": lambda o, s: frontend.grouped_product(
        o.rows(s.inter), o.normal(s.n_experts, s.inter, s.dim), o.t, False
    ),
    "product_transposed": lambda o, s: frontend.grouped_product(
        o.rows(2 * s.inter), o.normal(s.n_experts, s.dim, 2 * s.inter), o.t, True
    ),
    "weight_gradient": lambda o, s: frontend.grouped_weight_gradient(o.rows(s.inter), o.rows(s.dim), o.listed(128)[1]),
    "activated_product": lambda o, s: frontend.activated_product(
        o.rows(s.dim), o.normal(s.n_experts, s.dim, 2 * s.inter), o.t, o.weights, o.activation
    ),
    "differentiated_product": lambda o, s: frontend.differentiated_product(
        o.rows(s.dim), o.normal(s.n_experts, s.inter, s.dim), o.t, o.rows(2 * s.inter), o.weights, o.activation
    ),
    "scatter_rows": lambda o, s: frontend.scatter_rows(o.normal(s.tokens, s.dim), o.row_of_slot),
    "sum_slots": lambda o, s: frontend.sum_slots(o.rows(s.dim), o.row_of_slot),
    "activate_rows": lambda o, s: frontend.activate_rows(o.rows(2 * s.inter), o.weights, o.activation),
}


@pytest.mark.parametrize("kernel", CALLS)
def test_a_case_is_what_the_frontend_plays(played: list[tuple[Launch, list[Any]]], kernel: str) -> None:
    operands = layer()
    operands.t = operands.listed(128)[0]  # type: ignore[attr-defined]
    case = next(KERNELS[kernel](operands, kernel))
    CALLS[kernel](operands, operands.shape)
    arguments = [*map(described, case.inputs(case.launch)), *case.outputs(case.launch)]
    assert played == [(case.launch, arguments)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_arguments_and_constants_of_every_variant_are_the_kernels(kernel: str) -> None:
    pytest.importorskip("triton")
    for case in KERNELS[kernel](layer(), kernel):
        file, function = case.launch.kernel.split(".")
        names = getattr(import_module(f"moebius.core.kernels.{file}"), function).arg_names
        for launch in (case.launch, *map(case.launched, case.changes)):
            n_given = len(case.inputs(launch)) + len(case.outputs(launch))
            assert set(names[n_given:]) == launch.constants.keys()


def test_dots_of_narrow_tiles_are_twice_as_many_and_compared_by_their_sums() -> None:
    case = case_of("differentiated_product")
    narrow = case.launched({"COLS": 128, "UNROLL": 2, "STAGES": 5})
    assert [case.outputs(launch)[2][0][1] for launch in (case.launch, narrow)] == [3, 6]
    dots = torch.arange(12.0).view(2, 6)
    assert case.compared([dots, dots, dots])[2].tolist() == [15.0, 51.0]


def test_rows_of_slots_are_in_the_order_of_their_experts() -> None:
    operands = layer(TINY, device="cpu")
    experts = operands._indices.flatten()
    sorted_experts = torch.empty_like(experts)
    sorted_experts[operands.row_of_slot.flatten().long()] = experts
    assert torch.equal(sorted_experts, experts.sort().values)
