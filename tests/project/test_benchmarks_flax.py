"""The Flax benchmark without a GPU: a dry run of every row, what is refused, and how calls are timed in groups."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

import jax

from benchmarks import gpu_check, gpu_flax, gpu_jax, gpu_wall
from benchmarks.gpu_problem import SHAPES, draw
from benchmarks.peers import composite_jax, ours_jax

TINY = SHAPES["qwen3"].tiny()
GEMM = "transformer_engine.jax.cpp_extensions.gemm"


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None), []
    vars(module).update(content)
    return module


def _grouped_dense(rows: Any, weight: Any, sizes: Any, contracting_dims: Any) -> Any:
    """Transformer Engine's, as documented: both operands in one dtype, the rows' last axis against the matrices'."""
    assert contracting_dims == ((1,), (1,)) and rows.dtype == weight.dtype
    return jax.lax.ragged_dot(rows, weight, sizes)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand-ins for tokamax and for Transformer Engine with a cuBLAS too old for its own choice; its GEMM module."""
    gemm = _module(GEMM, _v2_grouped_gemm_available=True)
    dense = _module("transformer_engine.jax.dense", grouped_dense=_grouped_dense)
    of_jax = _module("transformer_engine.jax", dense=dense)
    modules = {
        "tokamax": _module("tokamax", __version__="0", ragged_dot=jax.lax.ragged_dot),
        "transformer_engine": _module("transformer_engine", __version__="0", jax=of_jax),
        "transformer_engine.jax": of_jax,
        "transformer_engine.jax.dense": dense,
        "transformer_engine_jax": _module("transformer_engine_jax", get_cublasLt_version=lambda: 130100),
        GEMM: gemm,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return gemm


def _dry(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "figures.json"
    code = gpu_flax.main(["--dry", "--shapes", "qwen3", "--rounds", "2", "--json", str(path), *arguments])
    return code, json.loads(path.read_text())


def _everywhere(row: Any) -> Any:
    """The row with a backend that a CPU has."""
    there = {"backend": {"backend": "loop"}, "experts": {"experts": "loop"}}
    changed = {key: value for name, own in there.items() if name in row.options for key, value in own.items()}
    return replace(row, options={**row.options, **changed})


# --------------------------------------------------------------------------------------------------------------- run
# Rows that differ in an option alone, which another row gives or another test.
LEFT_OUT = {"choice", "loop", "remat_none", "jax_tokamax_gathers", "torch_loop"}


def test_dry_run_of_every_kind_of_row_times_both_passes(
    tmp_path: Path, peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_flax, "ROWS", {key: _everywhere(row) for key, row in gpu_flax.ROWS.items()})
    rows = set(gpu_flax.ROWS) - LEFT_OUT
    code, figures = _dry(tmp_path, "--only", *rows)
    assert code == 0
    assert {result["row"] for result in figures["results"]} == rows
    for result in figures["results"]:
        assert "reason" not in result, result["reason"]
        assert len(result["forward"]["rounds_ms"]) == len(result["both"]["rounds_ms"]) == 2
        assert max(result["errors"].values()) < gpu_check.TOLERANCE
    printed = capsys.readouterr().out
    assert "| best of Flax / best peer in JAX |" in printed and "| best of Flax / best of PyTorch |" in printed
    assert "| JAX composite, TE grouped_dense | reads group sizes (V1); " in printed
    assert not peers._v2_grouped_gemm_available


def test_dry_run_accounts_for_temporaries_and_outputs(tmp_path: Path) -> None:
    _, figures = _dry(tmp_path, "--only", "choice")
    (result,) = figures["results"]
    assert result["inputs"] == "inputs shared over dlpack"
    for name in ("forward", "both"):
        sizes = result["xla_bytes"][name]
        assert result["memory"][name] == sizes["temporary"] + sizes["output"]
    y, dweights = 2 * TINY.tokens * TINY.dim, 2 * TINY.tokens * TINY.k
    assert result["xla_bytes"]["forward"]["output"] == y
    assert 0 <= result["xla_bytes"]["both"]["output"] - (2 * y + dweights + TINY.weight_bytes()) < 256
    assert result["memory"]["both"] > result["memory"]["forward"] > y


def test_run_of_rows_that_cannot_serve_gives_the_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tokamax", "transformer_engine"):
        monkeypatch.setitem(sys.modules, name, None)
    code, figures = _dry(tmp_path, "--only", "tokamax", "te", "jax_te", "jax_tokamax", "torch_grouped_mm")
    found = {result["row"]: result for result in figures["results"]}
    assert code == 0 and "both" in found["torch_grouped_mm"]
    for row in ("tokamax", "te", "jax_te", "jax_tokamax"):
        assert found[row]["reason"] and "both" not in found[row]
    assert f"- JAX composite, tokamax.ragged_dot (qwen3): {found['jax_tokamax']['reason']}" in capsys.readouterr().out


def test_run_of_a_wrong_row_does_not_time_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = composite_jax.experts
    monkeypatch.setattr(composite_jax, "experts", lambda *inputs: 1.1 * right(*inputs))
    code, figures = _dry(tmp_path, "--only", "jax_ragged_dot")
    (wrong,) = figures["results"]
    assert code == 0 and wrong["reason"].startswith("ValueError: relative errors") and "forward" not in wrong


def test_run_of_a_gradient_that_is_wrong_does_not_time_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = composite_jax.experts

    def stopped(multiply: Any, x: Any, weights: Any, *rest: Any) -> Any:
        return right(multiply, x, jax.lax.stop_gradient(weights), *rest)

    monkeypatch.setattr(composite_jax, "experts", stopped)
    _, figures = _dry(tmp_path, "--only", "jax_ragged_dot")
    assert "above 0.02: dweights" in figures["results"][0]["reason"]


def test_run_out_of_time_says_so_in_every_row(tmp_path: Path) -> None:
    code, figures = _dry(tmp_path, "--only", "choice", "torch_grouped_mm", "--budget", "0")
    reasons = [result["reason"] for result in figures["results"]]
    assert code == 0 and reasons[0] == "TimeoutError: not traced, the run's 0 s were over"
    assert reasons[1] == "TimeoutError: not built, the run's 0 s were over"


@pytest.mark.parametrize("too_large", ["forward", "both"])
def test_run_of_a_program_that_would_not_fit_keeps_the_pass_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, too_large: str
) -> None:
    own = gpu_jax.Program.memory

    def memory(self: Any, name: str) -> dict[str, int]:
        return own(self, name) | {"temporary": 7 << 30 if name == too_large else 1}

    monkeypatch.setattr(gpu_jax.Program, "memory", memory)
    monkeypatch.setattr(gpu_jax, "device_bytes", lambda tensor: 10 << 30)
    code, figures = _dry(tmp_path, "--only", "jax_ragged_dot")
    (result,) = figures["results"]
    reason = f"{too_large} not run: out of memory, XLA asks for 7 of 10 GiB in temporaries"
    assert code == 0 and result["reason"].endswith(reason)
    assert ("forward" in result) == (too_large == "both") and "both" not in result


@pytest.mark.parametrize("step", ["compiled", "run"])
def test_run_of_a_program_whose_backward_pass_fails_keeps_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def lost(*given: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    lower, call = gpu_jax.Program.lower, gpu_jax.Program.call

    def lowered(self: Any) -> None:
        lower(self)
        self.lowered["both"] = SimpleNamespace(compile=lost)

    if step == "compiled":
        monkeypatch.setattr(gpu_jax.Program, "lower", lowered)
    else:
        monkeypatch.setattr(gpu_jax.Program, "call", lambda self, name: lost if name == "both" else call(self, name))
    code, figures = _dry(tmp_path, "--only", "jax_ragged_dot")
    (result,) = figures["results"]
    assert code == 0 and "forward" in result and "both" not in result
    assert result["reason"] == f"both not {step}: RuntimeError: RESOURCE_EXHAUSTED: out of memory"


def test_inputs_that_cannot_be_shared_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(TINY, "cpu")
    shifted = torch.empty(problem.up.numel() + 1, dtype=torch.bfloat16)[1:].view_as(problem.up).copy_(problem.up)
    found = gpu_jax.inputs(replace(problem, up=shifted))
    assert found.how == "copied: up"
    assert found.x.unsafe_buffer_pointer() == problem.x.data_ptr()
    assert torch.equal(torch.from_dlpack(found.up), problem.up)


# ------------------------------------------------------------------------------------------------------------- peers
@pytest.mark.parametrize("gathers", [False, True])
def test_composite_in_float32_agrees_with_float64(gathers: bool) -> None:
    problem = draw(TINY, "cpu", dtype=torch.float32)
    program = gpu_jax.Program(
        peer=composite_jax.build(problem, product="ragged_dot", gathers=gathers), inputs=gpu_jax.inputs(problem)
    )
    program.lower()
    program.compile()
    errors = gpu_check.errors(gpu_check.reference(problem), gpu_jax.found("both", program.call("both")()))
    assert set(errors) == {"y", "dx", "dweights", "dup", "ddown"} and max(errors.values()) < 1e-5


def test_composite_in_bfloat16_sums_the_gradient_of_the_routing_weights_in_float32() -> None:
    problem = draw(TINY, "cpu")
    program = gpu_jax.Program(peer=composite_jax.build(problem, product="ragged_dot"), inputs=gpu_jax.inputs(problem))
    program.lower()
    lines = [line for line in program.lowered["both"].as_text().splitlines() if "stablehlo.reduce(" in line]
    rows = f"tensor<{TINY.rows}x{TINY.inter}x"
    assert any(rows + "f32>" in line for line in lines) and not any(rows + "bf16>" in line for line in lines)


@pytest.mark.parametrize(("n_gib", "compiled"), [(120, {"forward"}), (20, set()), (1000, {"forward", "both"})])
def test_program_that_is_known_not_to_fit_is_not_compiled(n_gib: int, compiled: set[str]) -> None:
    made: list[str] = []

    def lowered(name: str) -> Any:
        made.append(name)
        sizes = SimpleNamespace(temp_size_in_bytes=0, output_size_in_bytes=0, argument_size_in_bytes=0)
        return SimpleNamespace(memory_analysis=lambda: sizes)

    least = {"forward": 64 << 30, "both": 112 << 30}
    program = gpu_jax.Program(
        peer=gpu_jax.Peer(call=max, note="", least=least), inputs=gpu_jax.inputs(draw(TINY, "cpu"))
    )
    program.seconds = dict.fromkeys(least, 0.0)
    program.lowered = {name: SimpleNamespace(compile=lambda name=name: lowered(name)) for name in least}
    program.compile(n_gib << 30)
    assert set(made) == set(program.compiled) == compiled
    first = next((name for name in least if name not in compiled), None)
    due = (
        f"{first} not compiled: out of memory, it needs {least[first] >> 30} of {n_gib} GiB in temporaries"
        if first
        else ""
    )
    assert program.reason == due


def test_ragged_dot_on_a_gpu_needs_its_rows_once_for_each_expert() -> None:
    problem = SimpleNamespace(shape=SHAPES["qwen3"], x=SimpleNamespace(element_size=lambda: 2))
    found = composite_jax._expanded(problem)  # type: ignore[arg-type]
    assert {name: size >> 30 for name, size in found.items()} == {"forward": 64, "both": 112}


def test_te_with_a_cublas_that_has_the_grouped_gemm_keeps_its_own_choice(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["transformer_engine_jax"], "get_cublasLt_version", lambda: 130801)
    peer = composite_jax.build(draw(TINY, "cpu"), product="te")
    assert peer.host == "" and peers._v2_grouped_gemm_available


@pytest.mark.parametrize(("name", "said"), [("V1", "reads group sizes (V1)"), ("V2", "")])
def test_ours_of_te_says_whether_the_host_waits(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    from moebius.jax_frontend import matmul_te
    from moebius.jax_frontend.matmul import BACKENDS

    monkeypatch.setattr(matmul_te, "path", lambda dtype: matmul_te.Path(name, "why"))
    assert ours_jax.host(BACKENDS["te"]) == said


def test_without_xprof_makes_the_module_that_tokamax_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool"):
        monkeypatch.setitem(sys.modules, name, None)  # so that it is put back
        del sys.modules[name]
    gpu_jax.without_xprof()
    from xprof.cli.tools import get_kernel_stats_tool

    assert get_kernel_stats_tool is sys.modules["xprof.cli.tools.get_kernel_stats_tool"]


# ------------------------------------------------------------------------------------------------------------ timing
@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds on the clock, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(gpu_wall.time, "perf_counter", lambda: now[0])
    yield now


def _timed(clock: list[float], ms: float, groups: int) -> tuple[list[float], list[int]]:
    """What `grouped` finds of calls of so many ms within 100 ms after 20 ms of warm-up, and the calls of each group."""
    waiting, sizes = [0], []

    def call() -> int:
        waiting[0] += 1
        return waiting[0]

    def wait(result: int) -> None:
        assert result == waiting[0], "waited for another call than the last"
        clock[0] += ms / 1e3 * waiting[0]
        sizes.append(waiting[0])
        waiting[0] = 0

    return gpu_wall.grouped(call, wait, warmup_ms=20, rep_ms=100, groups=groups), sizes


@pytest.mark.parametrize(
    ("ms", "groups", "sizes"),
    [
        (1.0, 5, [1, 1, 20] + [20] * 5),
        (10.0, 5, [1, 1, 2] + [2] * 5),
        (22.0, 5, [1, 1, 1] + [1] * 4),
        (500.0, 5, [1, 1, 1] + [1] * 3),
        (0.0, 1, [1, 1, 1000, 1000]),
    ],
)
def test_grouped_divides_the_time_into_groups_of_calls(
    clock: list[float], ms: float, groups: int, sizes: list[int]
) -> None:
    found, seen = _timed(clock, ms, groups)
    assert seen == sizes
    assert found == pytest.approx([ms] * (len(sizes) - 3))


def test_tokens_that_are_asked_for_are_shapes_of_their_own() -> None:
    shapes = gpu_flax._shapes(gpu_flax._options(["--shapes", "qwen3", "--tokens", "1", "16"]))
    assert {key: (shape.name, shape.tokens, shape.n_experts) for key, shape in shapes.items()} == {
        "qwen3-1": ("Qwen3-30B-A3B, T = 1", 1, 128),
        "qwen3-16": ("Qwen3-30B-A3B, T = 16", 16, 128),
    }
