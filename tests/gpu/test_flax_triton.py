"""moebius' own kernels in PyTorch and in Flax on one NVIDIA GPU: the same code, and the same bits."""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
import on_gpu
import pytest
import torch
from sides import Problem, Side, cached_problem

from moebius.core.activations import CONFIG_ACTIVATIONS

pytestmark = on_gpu.MARKS
SMALL = {"tokens": 300, "dim": 136, "inter": 72, "n_experts": 6, "k": 2, "dtype": "bfloat16"}
WIDE = {"tokens": 1500, "dim": 512, "inter": 640, "n_experts": 8, "k": 4, "dtype": "bfloat16"}
SIDES = [Side(frontend, "triton", "cuda") for frontend in ("torch", "jax")]


@pytest.fixture(autouse=True)
def _both() -> None:
    on_gpu.require("triton")


def equal(p: Problem) -> None:
    one, other = (side.experts(p) for side in SIDES)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", CONFIG_ACTIVATIONS)
def test_experts_of_both_frontends_have_the_same_bits(activation: str, biased: bool) -> None:
    equal(cached_problem(expert_activation=activation, expert_bias=biased, **SMALL))


@pytest.mark.parametrize("settings", [{"swiglu_limit": 0.5}, {"apply_router_weight_after_down": True}], ids=str)
def test_experts_of_both_frontends_with_other_settings_have_the_same_bits(settings: dict[str, Any]) -> None:
    equal(cached_problem(**settings, **SMALL))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_of_both_frontends_of_several_tiles_have_the_same_bits(dtype: str) -> None:
    equal(cached_problem(expert_bias=True, **{**WIDE, "dtype": dtype}))


@pytest.mark.parametrize("case", ["masked", "all_masked", "one_expert", "no_token", "one_token"])
def test_experts_of_both_frontends_of_uneven_routes_have_the_same_bits(case: str) -> None:
    tokens = {"no_token": 0, "one_token": 1}.get(case, SMALL["tokens"])
    p = cached_problem(expert_bias=True, **{**SMALL, "tokens": tokens})
    if case.endswith("masked"):
        mask = np.zeros_like(p.token_mask)
        mask[: 0 if case == "all_masked" else 77] = True
        p = p.but(token_mask=mask)
    if case == "one_expert":
        p = p.but(ids=np.broadcast_to(np.array([4, 1], p.ids.dtype), p.ids.shape).copy())
    equal(p)


@pytest.mark.parametrize(
    ("dtype", "dim", "inter"), [("float32", 136, 72), ("float32", 37, 21), ("bfloat16", 37, 21), ("float16", 64, 12)]
)
def test_experts_of_both_frontends_by_portable_kernels_have_the_same_bits(dtype: str, dim: int, inter: int) -> None:
    equal(cached_problem(expert_bias=True, **{**SMALL, "dtype": dtype, "dim": dim, "inter": inter}))


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_experts_of_either_frontend_have_the_same_bits_on_every_repeat(side: Side) -> None:
    p = cached_problem(expert_bias=True, **WIDE)
    wanted = side.experts(p)
    for _ in range(5):
        for name, value in side.experts(p).items():
            np.testing.assert_array_equal(value, wanted[name], err_msg=name)


@cache
def code_of(ptx: str) -> str:
    """A hash of the instructions, without names of files and lines."""
    lines = (re.sub(r"//.*", "", line) for line in ptx.split("\t.section\t.debug")[0].splitlines())
    return sha256("\n".join(line for line in lines if not re.match(r"\s*\.(file|loc)\b", line)).encode()).hexdigest()


def test_kernels_of_both_frontends_are_the_same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from moebius.jax_frontend import older_triton
    from moebius.torch_frontend import launch, play

    made: dict[str, list[str]] = {}
    compiled = older_triton._Counting.TritonKernel

    def spied(self: Any, name: str, warps: int, ctas: int, shared: int, code: str, *rest: Any) -> Any:
        made.setdefault(name, []).append(code_of(code))
        return compiled(self, name, warps, ctas, shared, code, *rest)

    monkeypatch.setattr(older_triton._Counting, "TritonKernel", spied)
    names: set[str] = set()
    run = launch.run

    def noted(given: Any, *arguments: Any) -> None:
        names.add(given.kernel)
        run(given, *arguments)

    monkeypatch.setattr(launch, "run", noted)
    for biased, activation in [(False, "swiglu"), (True, "quick_geglu")]:  # sizes that no other test has compiled for
        sizes = {**SMALL, "dim": 152, "inter": 1032, "n_experts": 7}
        equal(cached_problem(expert_activation=activation, expert_bias=biased, **sizes))
    ours = {code_of(kernel.asm["ptx"]) for name in names for kernel in _compiled(play.kernel_of(name))}
    # Integers alone, which JAX masks and sorts itself.
    sorting = {"mask_routes", "count_routes", "scan_counts", "place_routes", "sort_few_routes"}
    assert {name.split(".")[1] for name in names} - sorting == made.keys()
    for name, codes in made.items():
        assert set(codes) <= ours, name


def _compiled(kernel: Any) -> list[Any]:
    return list(kernel.device_caches[torch.cuda.current_device()][0].values())
