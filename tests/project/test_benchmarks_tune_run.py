"""A run that tunes kernels, without a GPU: what is held against the plan and timed, and what is said of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import __main__ as command
from benchmarks import tune, tune_bench, tune_tables
from benchmarks.gpu_problem import SHAPES, Shape
from benchmarks.tune_bench import Dry, Lost, tuned
from benchmarks.tune_cases import Case, Layer
from benchmarks.tune_kernels import KERNELS, PORTABLE, of_dtype
from moebius.core.kernels.plan import Launch
from moebius.core.kernels.plan_grouped import Device

LIMIT = 227 * 1024
TINY = SHAPES["qwen3"].tiny()


# -------------------------------------------------------------------------------------------------------------- bench
def of_groups(kernel: str, shape: Shape = TINY) -> Case:
    """A case whose variants are other groups alone."""
    case = next(KERNELS[kernel](Layer(shape, "cpu", Device((9, 0), 132), LIMIT), kernel))
    case.changes[:] = [change for change in case.changes if "GROUP" in change]
    return case


class Kernel:
    """Stands in for Triton's, whose compiler takes no groups of 8."""

    warmed: ClassVar[list[tuple[int, ...]]] = []

    @staticmethod
    def warmup(*arguments: Any, grid: tuple[int], GROUP: int, **rest: Any) -> None:
        if GROUP == 8:
            raise ValueError("no groups of 8")
        blocks = [len(argument[1]) for argument in arguments if isinstance(argument, tuple)]
        Kernel.warmed.append((GROUP, rest["num_warps"], *grid, len(arguments), *blocks))


class Clock:
    """Stands in for torch.cuda.Event: what is played takes as long as `ms` says."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        self.at = 0.0

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Clock) -> float:
        return end.at - self.at


@pytest.fixture
def cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[tune_bench.Cuda, dict[int, tuple[float, float]], list[int]]]:
    """The GPU's bench on a CPU, what each GROUP writes and takes (1 and 10 ms by default), and the order of groups."""
    properties = type("Properties", (), {"major": 9, "minor": 0, "multi_processor_count": 132})
    monkeypatch.setattr(tune_bench, "shared_memory", lambda device: LIMIT)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    bench = tune_bench.Cuda(rounds=4, rep_ms=10, seconds=100, threads=2)
    bench.device = "cpu"
    written: dict[int, tuple[float, float]] = {}
    order: list[int] = []

    def run(launch: Launch, *arguments: Any) -> None:
        if launch.kernel.startswith("tiles"):
            return
        group = launch.constants["GROUP"]
        value, ms = written.get(group, (1.0, 10.0))
        arguments[-1].fill_(value)
        Clock.now += ms
        order.append(group)

    monkeypatch.setattr(tune_bench.play, "run", run)
    monkeypatch.setattr(tune_bench.play, "kernel_of", lambda name: Kernel)
    monkeypatch.setattr(tune_bench.play, "descriptor", lambda operand, block: (operand, block))
    Kernel.warmed.clear()
    yield bench, written, order


def test_tuned_ranks_variants_by_the_median_of_the_rounds_ratios(cuda: Any) -> None:
    bench, written, order = cuda
    written[4], written[8] = (1.0, 8.0), (1.0, 12.5)
    rows = tuned(of_groups("product"), bench)
    assert [row["variant"] for row in rows] == ["the plan", "GROUP 4", "GROUP 8", "GROUP 24"]
    assert [row["gain"] for row in rows] == pytest.approx([0.0, 0.25, -0.2, 0.0])
    assert [row["ms"] for row in rows] == pytest.approx([10.0, 8.0, 12.5, 10.0])
    assert order[-8:] == [16, 4, 8, 24, 24, 8, 4, 16]  # the last two rounds: one forwards, one backwards


def test_compile_goes_on_where_a_variant_does_not_compile(cuda: Any) -> None:
    bench, _, _ = cuda
    case = of_groups("product")
    bench.compile([case.launch, *map(case.launched, case.changes)], case)
    # Four arguments on 132 programs, of which two are descriptors, of blocks of two axes and of three.
    assert sorted(Kernel.warmed) == [(group, 4, 132, 4, 2, 3) for group in (4, 16, 24)]
    assert Kernel.warmed[0][0] == 16


def test_tuned_of_a_variant_with_other_bits_says_so_and_does_not_time_it(cuda: Any) -> None:
    bench, written, _ = cuda
    written[8] = (1.0078125, 1.0)  # the next bfloat16
    plan, _, other, _ = tuned(of_groups("product"), bench)
    assert other["why"] == "results differ from the plan's by 8e-03" and "ms" not in other
    assert plan["errors"] == [0.0] and "ms" in plan


def test_tuned_of_sums_in_another_order_takes_what_is_within_the_bound(cuda: Any) -> None:
    bench, written, _ = cuda
    written[8], written[4] = (1 + 2e-6, 10.0), (1 + 2e-3, 10.0)
    case = of_groups("portable_product", of_dtype(TINY, "float32"))
    found = {row["variant"]: row for row in tuned(case, bench)}
    assert "ms" in found["GROUP 8"] and found["GROUP 8"]["errors"][0] == pytest.approx(2e-6, rel=0.1)
    assert "differ" in found["GROUP 4"]["why"]


def test_tuned_of_a_plan_that_leaves_nan_times_nothing(cuda: Any) -> None:
    bench, written, _ = cuda
    written[16] = (float("nan"), 1.0)
    rows = tuned(of_groups("product"), bench)
    assert [row["why"] for row in rows] == ["results are not finite"]


def test_tuned_of_a_variant_that_fails_says_why_and_times_the_others(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, _, _ = cuda
    run = tune_bench.play.run

    def failing(launch: Launch, *arguments: Any) -> None:
        if launch.constants.get("GROUP") == 8:
            raise RuntimeError("out of resource:\n shared memory")
        run(launch, *arguments)

    monkeypatch.setattr(tune_bench.play, "run", failing)
    rows = tuned(of_groups("product"), bench)
    assert [row.get("why", "timed") for row in rows] == [
        "timed",
        "timed",
        "RuntimeError: out of resource: shared memory",
        "timed",
    ]


def test_tuned_of_a_device_that_is_lost_stops(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, _, _ = cuda

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(Lost, match=r"product, .*illegal memory access"):
        tuned(of_groups("product"), bench)


def test_times_of_slow_kernels_are_fewer_rounds(cuda: Any) -> None:
    bench, written, _ = cuda
    written.update(dict.fromkeys((4, 8, 16, 24), (1.0, 10_000.0)))
    rows = tuned(of_groups("product"), bench)
    assert {len(row["rounds"]) for row in rows} == {3}


# ------------------------------------------------------------------------------------------------------------ command
CASE = {
    "kernel": "product",
    "part": "down",
    "depth": 64,
    "width": 32,
    "flops": 2e12,
    "bytes": 1e9,
    "layer": "a layer",
    "rows_per_expert": 12.5,
    "plan": "COLS 256, 4 warps",
}


def figures_of(*gains: float) -> dict[str, Any]:
    rows = [{"variant": "the plan", "ms": 4.0, "gain": 0.0, "errors": [0.0]}]
    rows += [{"variant": f"GROUP {n}", "ms": 4 / (1 + g), "gain": g, "errors": [2e-6]} for n, g in enumerate(gains)]
    return {**CASE, "rows": [*rows, {"variant": "STAGES 9", "why": "too many"}]}


def test_table_has_the_plan_first_then_the_fastest_then_what_was_not_timed() -> None:
    lines = tune_tables.table(figures_of(-0.2, 0.25), {"flops": 1e15, "bytes": 4e12}).splitlines()
    assert lines[0].startswith("product (down): depth 64, width 32, 12 rows an expert; a layer; the plan: COLS 256")
    assert lines[4:] == [
        "| the plan | 4 | 500 | 250 | 0.50 | +0.0% | same bits |",
        "| GROUP 1 | 3.2 | 625 | 312 | 0.62 | +25.0% | within 2e-06 |",
        "| GROUP 0 | 5 | 400 | 200 | 0.40 | -20.0% | within 2e-06 |",
        "| STAGES 9 | - | - | - | - | - | too many |",
    ]


def test_wins_says_what_a_winner_gives_everywhere_else() -> None:
    elsewhere = {**figures_of(-0.05, 0.02), "depth": 0, "rows_per_expert": 1000.0}
    other = {**figures_of(0.01), "kernel": "sum_slots"}
    assert tune_tables.wins([figures_of(0.04, 0.03), elsewhere, other]) == [
        "would win by more than 3%:",
        "- product, COLS 256, 4 warps: GROUP 0: +4.0% at depth 64, width 32, 12 rows an expert; "
        "-5.0% at width 32, 1000 rows an expert",
        "- sum_slots, COLS 256, 4 warps: no variant in 1 case",
    ]


def test_dry_run_of_the_command_prints_every_table_and_writes_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "tune.json"
    words = "tune --dry --shapes qwen3 mixtral --tokens 64 4096 --kernels".split()
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words, *KERNELS, "--dtypes", "odd", "--json", str(path)])
    assert command.main() == 0
    figures = json.loads(path.read_text())
    assert figures["command"] == " ".join(["python -m benchmarks", *words, *KERNELS, "--dtypes odd"])
    assert len(figures["cases"]) == 2 * 2 * (len(KERNELS) + 2)  # weight gradients are two
    said = capsys.readouterr().out
    assert said.count("| the plan |") == len(figures["cases"]) and "would win by more than 3%:" in said
    assert {case["depth"] for case in figures["cases"] if case["kernel"] in PORTABLE} == {0, 771, 1542, 14339, 28678}


def test_command_out_of_time_says_what_was_not_reached(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry", "--shapes", "dsv3", "--kernels", "sum_slots", "--budget", "-1"]) == 0
    assert "not reached: sum_slots of DeepSeek-V3 slice, T = 4096, bfloat16" in capsys.readouterr().out


def test_command_on_a_device_that_a_kernel_does_not_take_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Dry, "target", Device((8, 0), 108))
    assert tune.main(["--dry", "--shapes", "dsv3", "--kernels", "product", "sum_slots"]) == 0
    said = capsys.readouterr().out
    assert "compute capability 8.0" in said and "sum_slots (rows to tokens)" in said


def test_command_by_default_tunes_what_the_plan_takes_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Dry, "target", Device((8, 0), 108))
    tune.main(["--dry", "--shapes", "dsv3"])
    said = capsys.readouterr().out
    assert "portable_product_transposed (" in said and "activated_product" not in said


def test_command_that_loses_the_device_keeps_its_tables_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def lost(case: Case, bench: Dry) -> list[dict[str, Any]]:
        calls.append(case.kernel)
        if len(calls) > 1:
            raise Lost("sum_slots: no answer")
        return [{"variant": "the plan", "ms": 1.0, "gain": 0.0, "errors": [0.0]}]

    monkeypatch.setattr(tune, "tuned", lost)
    assert tune.main(["--dry", "--shapes", "dsv3", "--kernels", "scatter_rows", "sum_slots", "activate_rows"]) == 1
    said = capsys.readouterr().out
    assert "scatter_rows (tokens to rows)" in said and "not reached: all that comes after sum_slots: no answer" in said
    assert calls == ["scatter_rows", "sum_slots"]
