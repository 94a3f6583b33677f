"""Which of moebius' own kernels serve a problem, and in what words they refuse one."""

from __future__ import annotations

from typing import Any

import pytest

from moebius.core.errors import Unsupported
from moebius.core.kernels import interpreter, plan_grouped, plan_hopper, plan_portable
from moebius.core.kernels.plan_grouped import Device
from moebius.core.registry import Problem

H200, A100, MI300 = Device((9, 0), 132), Device((8, 0), 108), Device((9, 4), 304)
SERVED: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "dim": 64, "inter_dim": 64, "n_experts": 4}


@pytest.fixture(params=[False, True], ids=["device", "interpreter"])
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param else "0")
    return bool(request.param)


@pytest.mark.parametrize(
    ("changes", "device", "interpreter"),
    [
        ({}, None, "interpreter is on"),
        ({"dtype": "float32", "dim": 7}, None, "interpreter is on"),
        ({"dtype": "float64"}, "not float64", "not float64"),
        ({"device": "cpu"}, "not on cpu", "cuts digits off"),
        ({"device": "cpu", "dtype": "float16"}, "not on cpu", None),
        ({"device": "rocm"}, "not on rocm", "not on rocm"),
        ({"capability": (7, 5)}, "need CUDA compute capability 8.0, not 7.5", "interpreter is on"),
        ({"capability": (8, 0)}, None, "interpreter is on"),
    ],
)
def test_against_says_why(
    interpreted: bool, changes: dict[str, Any], device: str | None, interpreter: str | None
) -> None:
    found = plan_grouped.against(Problem(**{**SERVED, **changes}))
    wanted = interpreter if interpreted else device
    assert (found is None) == (wanted is None)
    assert wanted is None or wanted in str(found)


@pytest.mark.parametrize(
    ("dtype", "widths", "device", "file"),
    [
        ("bfloat16", (64, 72), H200, "matmul_hopper"),
        ("float16", (64, 72), H200, "matmul_hopper"),
        ("float32", (64, 72), H200, "matmul_portable"),
        ("bfloat16", (64, 70), H200, "matmul_portable"),
        ("bfloat16", (64, 72), A100, "matmul_portable"),
        ("bfloat16", (64, 72), MI300, "matmul_portable"),
    ],
)
def test_products_are_hoppers_where_they_serve(dtype: str, widths: tuple[int, int], device: Device, file: str) -> None:
    product = plan_grouped.product(1000, 4, *widths, False, dtype, device)
    gradient = plan_grouped.weight_gradient(4, *widths, dtype, device)
    assert product.kernel == f"{file}.product" and gradient.kernel == f"{file}.weight_gradient"
    height = plan_grouped.height(1000, 4, *widths, dtype, device)
    hopper = file == "matmul_hopper"
    assert height == (plan_hopper.HEIGHT if hopper else plan_portable.height(1000, 4, dtype))
    assert plan_grouped.fuses(dtype, device, *widths) == hopper


def test_equal_launches_have_one_hash_whatever_the_order_of_their_constants() -> None:
    launch = plan_grouped.product(1000, 4, 64, 72, False, "bfloat16", H200)
    turned = type(launch)(
        kernel=launch.kernel,
        programs=launch.programs,
        constants=dict(reversed(launch.constants.items())),
        registers=launch.registers,
        blocks=launch.blocks,
    )
    assert turned == launch and hash(turned) == hash(launch)


def test_play_of_a_kernel_in_gluon_is_refused() -> None:
    launch = plan_grouped.product(1000, 4, 64, 72, False, "bfloat16", H200)
    with pytest.raises(Unsupported, match="no Gluon"):
        interpreter.play(launch, [], [])
