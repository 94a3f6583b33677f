"""GPT-OSS' layer, growth and the portable kernels in the GPU benchmarks, without a GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import gpu_check, gpu_gptoss, gpu_growth, gpu_meter, gpu_portable
from benchmarks.gpu_command import row
from benchmarks.gpu_problem import SHAPES, Candidate, Problem, draw, with_layer
from benchmarks.peers import ours, ours_layer
from moebius.core import MoEConfig
from moebius.core import reference as core_reference

TINY = SHAPES["gptoss"].tiny()


def _dry(suite: Any, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "figures.json"
    code = suite.main(["--dry", "--rounds", "2", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


def _errors(problem: Problem, candidate: Candidate, expected: gpu_check.Reference) -> dict[str, float]:
    gpu_meter.clear([problem.x, problem.routing.weights, *candidate.parameters])
    y = candidate.call(problem.x, problem.routing.weights, problem.routing.indices)
    y.backward(problem.dy)
    return gpu_check.errors(expected, gpu_check.left_by(problem, candidate, y.detach()))


# -------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize(("activation", "bias"), [layer[1:] for layer in gpu_gptoss.LAYERS.values()])
def test_reference_of_a_layer_is_the_cores(activation: str, bias: bool) -> None:
    problem = with_layer(draw(TINY, "cpu", dtype=torch.float64), activation, bias)
    s, held = problem.shape, {"gate_and_up_projs": problem.up, "down_projs": problem.down}
    held |= dict(zip(ours.BIASES, problem.biases or (), strict=False))
    config = MoEConfig(
        n_routed_experts=s.n_experts,
        n_activated_experts=s.k,
        dim=s.dim,
        moe_inter_dim=s.inter,
        expert_activation=activation,
        expert_bias=bias,
    )
    given = (problem.x, problem.routing.weights, problem.routing.indices)
    x, weights, ids = (tensor.detach().numpy() for tensor in given)
    parameters = {name: value.numpy() for name, value in held.items()}
    y = core_reference.experts(x, np.ones(s.tokens, bool), weights, ids, parameters, config).y_TD
    assert np.allclose(gpu_check.reference(problem).y.numpy(), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", gpu_gptoss.REAL)
def test_errors_of_a_layer_in_float32_are_roundings(name: str) -> None:
    _, activation, bias = gpu_gptoss.LAYERS[name]
    problem = draw(TINY, "cpu", dtype=torch.float32)
    candidate = ours_layer.build(problem, activation=activation, bias=bias, experts="grouped_mm")
    found = _errors(problem, candidate, gpu_check.reference(with_layer(problem, activation, bias)))
    assert set(found) == {"y", "dx", "dweights", *gpu_check.GRADIENTS[: 4 if bias else 2]}
    assert max(found.values()) < 1e-5


def test_require_of_a_layer_without_its_bias_gradient_refuses() -> None:
    problem = draw(TINY, "cpu", dtype=torch.float32)
    right = ours_layer.build(problem, activation="swigluoai", bias=True, experts="grouped_mm")
    stale = replace(right, gradients=lambda expert: (*right.gradients(expert)[:3], torch.zeros(TINY.dim)))
    expected = gpu_check.reference(with_layer(problem, "swigluoai", True))
    with pytest.raises(ValueError, match=r"above 0.02: ddown_bias 1.0e\+00$"):
        gpu_check.require(_errors(problem, stale, expected))


def test_require_of_float32_refuses_what_tf32_would_leave() -> None:
    gpu_check.require({"y": 3e-4}, "bfloat16")
    with pytest.raises(ValueError, match=r"above 2e-05: y 3\.0e-04"):
        gpu_check.require({"y": 3e-4}, "float32")


def test_dry_run_of_gptoss_gives_what_each_layer_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"grouped_mm_{name}" for name in gpu_gptoss.LAYERS]
    code, figures = _dry(gpu_gptoss, tmp_path, "--only", *rows)
    assert code == 0 and list(figures["shapes"]) == ["gptoss"]
    assert all("reason" not in result and "both" in result for result in figures["results"])
    printed = capsys.readouterr().out
    assert printed.count(" / SwiGLU (at most 1.03) |") == len(rows) - 1


def test_tables_of_gptoss_hold_the_ratio_to_the_same_backends_plain_layer() -> None:
    ms = {"triton_plain": 10.0, "triton_interleaved": 10.2, "grouped_mm_plain": 20.0, "grouped_mm_interleaved": 30.0}
    results = [
        {"shape": "gptoss", "row": row, "kind": "ours", "forward": {"ms": time}, "both": {"ms": 2 * time}}
        for row, time in ms.items()
    ]
    rows = {row: gpu_gptoss.ROWS[row].title for row in ms}
    lines = gpu_gptoss.tables(
        {"rows": rows, "shapes": {"gptoss": {"name": "GPT-OSS-20B"}}, "results": results, "skew": []}
    ).splitlines()
    assert "| triton: biases, clamped, interleaved / SwiGLU (at most 1.03) | 1.020 / 1.020 |" in lines
    assert "| grouped_mm: biases, clamped, interleaved / SwiGLU (at most 1.03) | 1.500 / 1.500 |" in lines


# -------------------------------------------------------------------------------------------------------------- growth
def test_shapes_of_growth_are_the_points_of_both_series() -> None:
    shapes = gpu_growth.shapes(dry=False)
    assert [s.tokens for key, s in shapes.items() if key[0] == "t"] == [1024, 4096, 16384, 65536]
    assert [s.n_experts for key, s in shapes.items() if key[0] == "e"] == [8, 32, 256]
    figures = {"shapes": {key: {"tokens": s.tokens, "n_experts": s.n_experts} for key, s in shapes.items()}}
    assert list(gpu_growth.series(figures, "tokens")) == ["t1024", "t4096", "t16384", "t65536"]
    assert list(gpu_growth.series(figures, "experts")) == ["e8", "e32", "t16384", "e256"]


def test_dry_run_of_growth_times_each_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, figures = _dry(gpu_growth, tmp_path, "--only", "grouped_mm")
    assert code == 0 and all("both" in result for result in figures["results"])
    printed = capsys.readouterr().out
    assert "| forward / forward+backward, TFLOP/s | T = 64 | T = 128 |" in printed
    assert "| forward / forward+backward, TFLOP/s | E = 8 | E = 16 |" in printed


# ------------------------------------------------------------------------------------------------------------ portable
def test_problems_of_the_portable_kernels_are_what_the_others_leave_them() -> None:
    for shape in gpu_portable.PROBLEMS.values():
        assert shape.dtype == "float32" or shape.dim % 8 or shape.inter % 8


def test_dry_run_of_the_portable_kernels_gives_their_ratio_to_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_cpu = row("triton", "ours", "ours", experts="grouped_mm")
    monkeypatch.setattr(gpu_portable, "ROWS", {**gpu_portable.ROWS, "triton": on_a_cpu})
    code, figures = _dry(gpu_portable, tmp_path, "--problems", "float32", "odd_bfloat16")
    assert code == 0 and [shape["dtype"] for shape in figures["shapes"].values()] == ["float32", "bfloat16"]
    assert all("reason" not in result and "both" in result for result in figures["results"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| triton's speed / loop's"))
    assert "-" not in line
