"""The benchmark of both frontends and that of few tokens, without a GPU: rows, tables, graphs, floors."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import gpu_all, gpu_check, gpu_command, gpu_experts, gpu_few, gpu_few_bench, gpu_flax, gpu_meter
from benchmarks.gpu_floors import Ceilings
from benchmarks.gpu_problem import SHAPES, Shape, draw
from benchmarks.gpu_tables import GIB
from benchmarks.peers import composite

TINY = SHAPES["qwen3"].tiny()


def _dry(suite: Any, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "figures.json"
    code = suite.main(["--dry", "--shapes", "qwen3", "--rounds", "2", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


# -------------------------------------------------------------------------------------------------------------- shapes
def test_sizes_of_a_shape_are_what_is_returned_and_what_may_be_held() -> None:
    sizes = Shape(name="", tokens=10, n_experts=4, k=2, dim=3, inter=5).sizes()
    assert sizes["result_bytes"] == 2 * (2 * 10 * 3 + 20) + sizes["weight_bytes"]
    assert sizes["work_bytes"] == 2 * 20 * (10 + 10 + 5 + 3)


def test_sizes_of_qwen3_allow_1_44_gib() -> None:
    assert SHAPES["qwen3"].work_bytes() / GIB == pytest.approx(1.44, abs=0.005)


# ------------------------------------------------------------------------------------------------------------- command
def test_parse_keeps_the_command_without_the_file() -> None:
    made = gpu_command.parser("gpu_few", "", ["a", "b"])
    options = gpu_command.parse(made, ["--only", "a", "--json", "somewhere/x.json", "--dry"])
    assert options.command == "python -m benchmarks gpu_few --only a --dry"
    assert options.json == Path("somewhere/x.json")


def test_rows_without_a_name_leaves_it_out() -> None:
    made = gpu_command.parser("gpu_all", "", gpu_all.ROWS)
    every = set(gpu_command.rows(gpu_all.ROWS, made.parse_args([])))
    assert every - set(gpu_command.rows(gpu_all.ROWS, made.parse_args(["--without", "gmm", "te"]))) == {"gmm", "te"}


def test_rows_also_named_run_beside_the_default_ones() -> None:
    made = gpu_command.parser("gpu_all", "", gpu_all.ROWS)
    every = set(gpu_command.rows(gpu_all.ROWS, made.parse_args([])))
    assert set(gpu_command.rows(gpu_all.ROWS, made.parse_args(["--also", "liger"]))) - every == {"liger"}


# ----------------------------------------------------------------------------------------------------- both frontends
def test_rows_of_both_frontends_are_those_of_both_tables() -> None:
    modules = [(row.module, dict(row.options)) for row in gpu_all.ROWS.values()]
    tables = [*gpu_experts.ROWS.values(), *(row for row in gpu_flax.ROWS.values() if row.kind != "torch")]
    assert len(modules) == len(tables)
    assert all((row.module, dict(row.options)) in modules for row in tables)
    assert {row.kind for row in gpu_all.ROWS.values()} == {"ours", "peer", "reference", "flax", "jax", "jax_gathers"}


def test_dry_run_of_both_frontends_times_both_and_zipf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_cpu = {"triton": {"experts": "loop"}, "flax_triton": {"backend": "loop"}}
    rows = {key: replace(gpu_all.ROWS[key], options=options) for key, options in on_a_cpu.items()}
    rows |= {key: gpu_all.ROWS[key] for key in ("composite", "jax_ragged_dot", "default")}
    monkeypatch.setattr(gpu_all, "ROWS", rows)
    code, figures = _dry(gpu_all, tmp_path, "--skew")
    assert code == 0 and {result["row"] for result in figures["results"]} == set(rows)
    assert all("reason" not in result and "both" in result for result in figures["results"])
    assert {result["row"] for result in figures["skew"]} == {"triton", "flax_triton"}
    assert all("both" in result for result in figures["skew"])
    printed = capsys.readouterr().out
    assert "- PyTorch, its own choice: grouped_mm (qwen3)" in printed.splitlines()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in reversed(printed.splitlines())}
    for title in (
        "PyTorch: triton / best peer",
        "Flax triton / PyTorch triton",
        "Flax: best of ours / best peer in JAX",
    ):
        assert "-" not in lines[title].removeprefix(f"| {title}"), lines[title]


def _measured() -> dict[str, Any]:
    """triton: 10 ms and 1 GiB more than it returns; Flax' 12.5 ms; a peer 12 ms; with Zipf routing 11 and 22 ms."""
    shape = SHAPES["qwen3"]
    floors = {name: {"compute_tflops": 800.0, "kernel_ms": 5.0, "kernel_tflops": 750.0} for name in ("forward", "both")}
    entry = {"name": shape.name, **shape.sizes(), "floors": floors, "busiest": 21.0}
    passes = {
        row: {"ms": ms, "tflops": 100.0, "drift": 0.0}
        for row, ms in (("triton", 10.0), ("flax_triton", 12.5), ("compiled", 12.0))
    }
    results = [
        {"shape": "qwen3", "row": row, "kind": gpu_all.ROWS[row].kind, "forward": found, "both": found}
        for row, found in passes.items()
    ]
    results[0]["memory"] = {"both": shape.result_bytes() + GIB, "forward": GIB}
    slow = [{**result, "both": {"ms": 22.0, "tflops": 50.0}} for result in results if result["row"] == "compiled"]
    quick = [{**result, "both": {"ms": 11.0, "tflops": 90.0}} for result in results if result["row"] == "triton"]
    rows = {row: gpu_all.ROWS[row].title for row in passes}
    return {"rows": rows, "shapes": {"qwen3": entry}, "results": results, "skew": slow + quick, "skew_exponent": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        "| PyTorch: best of ours / best peer | 1.20 / 1.20 |",
        "| PyTorch: triton / best peer | 1.20 / 1.20 |",
        "| PyTorch: triton / best peer | 1.20 / 2.00 |",
        "| Flax triton / PyTorch triton | 0.80 / 0.80 |",
        "| goal / stretch of triton, forward+backward | 570 / 600 |",
        "| PyTorch triton: the same, and over the bar (at most 1.02) | 1.00, 0.696 |",
        "| Flax triton: the same, and over the bar (at most 1.02) | -, - |",
        "| rows of the busiest expert / mean | 21.0 |",
    ],
)
def test_tables_of_both_frontends_hold_the_ratio(line: str) -> None:
    assert line in gpu_all.tables(_measured()).splitlines()


# ----------------------------------------------------------------------------------------------------------- few tokens
def test_dry_run_of_few_tokens_times_eager_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, figures = _dry(gpu_few, tmp_path, "--only", "grouped_mm", "composite", "--tokens", "1", "16")
    assert code == 0 and set(figures["shapes"]) == {"qwen3-1", "qwen3-16"}
    for result in figures["results"]:
        assert "reason" not in result and "capture" not in result
        assert all(len(result[name]["rounds_ms"]) == 2 for name in ("forward", "both", "forward_graph", "both_graph"))
    printed = capsys.readouterr().out
    assert "| Qwen3-30B-A3B, eager, us: forward / forward+backward | T = 1 | T = 16 |" in printed
    assert "| Qwen3-30B-A3B, replayed from a CUDA graph, us: forward / forward+backward | T = 1 | T = 16 |" in printed
    assert "| best peer | composite / composite | composite / composite |" in printed


def test_dry_run_of_a_row_that_waits_is_not_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_meter.Dry, "syncs", lambda self, call: ["peer.py:12"])
    code, figures = _dry(gpu_few, tmp_path, "--only", "composite", "--tokens", "4")
    (result,) = figures["results"]
    assert code == 0 and "both" in result and "both_graph" not in result
    said = "- not captured: PyTorch composite (qwen3-4): the host waits for the device at peer.py:12"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("broken", ["y", "gradients"])
def test_dry_run_of_a_replay_that_does_not_fill_its_results_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    own = gpu_meter.Dry.capture

    def capture(self: Any, call: Any, leaves: Any) -> Any:
        replay, y = own(self, call, leaves)
        if broken == "y":
            return (lambda: None), y
        held = [leaf.grad for leaf in leaves]
        return (lambda: [replay(), *(g.fill_(0.5) for g in held if g is not None)]), y

    monkeypatch.setattr(gpu_meter.Dry, "capture", capture)
    _, figures = _dry(gpu_few, tmp_path, "--only", "composite", "--tokens", "4")
    (result,) = figures["results"]
    assert result["capture"].startswith({"y": "forward: ValueError", "gradients": "both: ValueError"}[broken])
    assert "both" in result and "both_graph" not in result


def test_dry_run_with_a_profile_prints_where_the_time_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--only", "composite", "--tokens", "4", "--profile", "4", "--profile-rows", "composite")
    code, _ = _dry(gpu_few, tmp_path, *given)
    printed = capsys.readouterr().out
    assert code == 0
    assert "PyTorch composite, Qwen3-30B-A3B, T = 4, five times forward+backward, by self_cpu_time_total" in printed
    assert "aten::" in printed


def test_floors_of_few_tokens_are_the_weights_that_are_touched() -> None:
    problem = draw(replace(TINY, tokens=1), "cpu")
    touched = problem.shape.k
    found = gpu_few_bench.floors(problem, touched, Ceilings(flops=1e30, bytes=1e9))
    expert = problem.shape.weight_bytes() / problem.shape.n_experts / 1e6
    assert found == pytest.approx(
        {"forward": touched * expert, "both": (2 * touched + problem.shape.n_experts) * expert}
    )


def test_floors_of_a_slow_product_are_its_flops() -> None:
    problem = draw(TINY, "cpu")
    found = gpu_few_bench.floors(problem, problem.shape.n_experts, Ceilings(flops=1e3, bytes=1e30))
    assert found["both"] == pytest.approx(problem.shape.flops(True))


def test_capture_on_a_cpu_replays_into_the_same_memory() -> None:
    problem = draw(TINY, "cpu", dtype=torch.float32)
    candidate = composite.build(problem)
    leaves = [problem.x, problem.routing.weights, *candidate.parameters]

    def both() -> torch.Tensor:
        y = candidate.call(problem.x, problem.routing.weights, problem.routing.indices)
        y.backward(problem.dy)
        return y.detach()

    replay, y = gpu_meter.Dry(1, 1).capture(both, leaves)
    with torch.no_grad():
        for tensor in (y, *(leaf.grad for leaf in leaves)):
            tensor.fill_(float("nan"))
    replay()
    errors = gpu_check.errors(gpu_check.reference(problem), gpu_check.left_by(problem, candidate, y))
    assert max(errors.values()) < 1e-5
