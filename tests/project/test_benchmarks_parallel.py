"""The benchmark of experts over ranks without a GPU: what it counts, its bars, and a dry run of both frontends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks is no part of the package

from benchmarks import __main__ as command
from benchmarks import gpu_parallel as parallel
from benchmarks.gpu_parallel_bench import Clock, Lane, leaving, rounds

# Of 4 experts on 2 ranks: rank 0's tokens stay, go over, do both; of rank 1's none stays at home alone.
IDS = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3], [1, 1], [3, 0]])


def test_leaving_counts_a_token_once_a_rank_out_and_home_and_both_again() -> None:
    # Rank 0 sends two of its three and returns three of the other's; rank 1 the other way round: as many.
    assert leaving(True, IDS, 2, 4) == 2 * (2 + 3)
    # Every token to the other rank, and every one of the other's back.
    assert leaving(False, IDS, 2, 4) == 2 * (3 + 3)


def test_leaving_of_more_ranks_is_that_of_the_one_that_sends_most() -> None:
    ids = torch.tensor([[0], [0], [0], [0]])  # all to rank 0, which sends none and returns three
    assert leaving(True, ids, 4, 4) == 2 * 3
    assert leaving(False, ids, 4, 4) == 2 * (3 + 3)


def test_clock_makes_as_many_calls_on_every_rank_and_takes_the_slowest() -> None:
    made = []
    clock = Clock(wait=lambda _: None, slowest=lambda ms: max(ms, 2.0), rep_ms=10.0, warmup_ms=4.0)
    assert clock.time(lambda: made.append(1)) == 2.0
    assert len(made) == 1 + 1 + 2 + 5  # twice to see how long it takes, the warm-up, the group


def test_rounds_after_the_budget_start_nothing_and_leave_no_figure() -> None:
    clock, lane = Clock(wait=lambda _: None, slowest=lambda ms: ms, rep_ms=0.01, warmup_ms=0.01), Lane(key="a")
    lane.steps = {"layer": lambda: None}
    rounds([lane], clock, 2, over=lambda: True)
    assert lane.result == {}
    rounds([lane], clock, 2, over=lambda: False)
    assert len(lane.result["layer"]["rounds_ms"]) == 2


# --------------------------------------------------------------------------------------------------------------- bars
def _figures(k: int = 8, **ms: tuple[float, float]) -> dict[str, Any]:
    """Of one shape: the layer's time and its rows' by row. A rank sends 1000 rows of 2000 bytes, in 1 ms by NCCL."""
    shape = {"name": "Q", "k": k, "dim": 1000, "ranks": 2, "rate": 2e9, "alone": {"ms": 18.0}}
    shape["leaving"] = {"True": 1000, "False": 2000}
    found = [
        {"shape": "qwen3", "row": row, "layer": {"ms": layer}, "still": {"ms": still}}
        for row, (layer, still) in ms.items()
    ]
    return {"shapes": {"qwen3": shape}, "rows": {row: row for row in ms}, "results": found, "skew": []}


def _bars(*words: str, **settings: Any) -> list[tuple[float, float, bool]]:
    found = [bar for bar in parallel.bars(_figures(**settings)) if all(word in bar.name for word in words)]
    return [(pytest.approx(bar.found), pytest.approx(bar.limit), bar.met) for bar in found]


def test_bars_hold_a_dispatcher_against_its_rows_and_its_bytes_at_nccls_rate() -> None:
    ms = {"alltoall": (11.2, 10.0), "allgather": (12.6, 10.0), "flax_alltoall": (12.4, 10.0)}
    assert _bars("alltoall, ms", "PyTorch", **ms) == [(11.2, 11.25, True)]
    assert _bars("allgather, ms", **ms) == [(12.6, 12.5, False)]  # twice the bytes
    assert _bars("Flax alltoall, ms", **ms) == [(12.4, 12.5, True)]  # blocks of one size: as allgather


@pytest.mark.parametrize(("k", "limit", "met"), [(8, 1.5, True), (2, 1.1, False)])
def test_bars_hold_alltoall_against_the_best_dispatcher_by_routes(k: int, limit: float, met: bool) -> None:
    ms = {"alltoall": (11.4, 10.0), "allgather": (11.0, 10.0), "flax_ragged": (10.1, 10.0)}
    assert _bars("alltoall / best", k=k, **ms) == [(1.4, limit, met)]
    assert not _bars("alltoall / best", k=4, **ms) and not _bars("alltoall / best", k=k, allgather=(11.0, 10.0))


def test_bars_hold_two_ranks_against_one_and_flax_against_the_same_collective() -> None:
    ms = {"allgather": (10.0, 9.0), "flax_allgather": (10.9, 9.0), "flax_ragged": (9.0, 8.0), "deepep": (12.0, 9.0)}
    assert _bars("2 ranks / one GPU", **ms) == [(1.8, 1.65, True)]
    assert _bars("one GPU", allgather=(11.0, 9.0)) == [(18 / 11, 1.65, False)]
    assert _bars("/ PyTorch's", **ms) == [(1.09, 1.1, True)]  # no alltoall to hold the ragged one to


def test_tables_leave_a_dash_and_a_reason_where_a_row_did_not_run() -> None:
    figures = _figures(alltoall=(11.0, 10.0), te=(1.0, 1.0))
    figures["results"][1] = {"shape": "qwen3", "row": "te", "reason": "Unsupported: no"}
    printed = parallel.tables(figures)
    assert "| alltoall | 11.000 / 10.000 / 1.000 |" in printed and "| te | - / - / - |" in printed
    assert "| alltoall | 2 MB; 2 GB/s; 0.00; 1.00 |" in printed and "- te (qwen3): Unsupported: no" in printed
    assert "- met: Q, alltoall / best: 1 of 1.5" in printed


# ---------------------------------------------------------------------------------------------------------- processes
def test_processes_of_which_one_fails_are_all_ended_at_once() -> None:
    started = [
        subprocess.Popen([sys.executable, "-S", "-c", code])
        for code in ("import time; time.sleep(60)", "raise SystemExit(3)")
    ]
    begin = time.monotonic()
    assert not parallel._ended(started, 30.0, lambda: None) and time.monotonic() - begin < 20.0
    assert started[0].returncode == -9 and started[1].returncode == 3


def test_processes_that_are_too_slow_are_ended() -> None:
    slow = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    looked: list[None] = []
    assert not parallel._ended([slow], 0.2, lambda: looked.append(None)) and slow.returncode == -9
    assert looked


def test_run_that_is_lost_keeps_the_shapes_that_were_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(framework: str, file: Path, options: object) -> list[subprocess.Popen[bytes]]:
        asked = json.loads(file.read_text())
        results = [{"shape": "qwen3", "row": next(iter(asked["rows"])), "reason": "none"}]
        found = {"results": results, "shapes": _figures()["shapes"]}
        code = "import sys, time; open(sys.argv[1], 'w').write(sys.argv[2]); time.sleep(1); raise SystemExit(3)"
        return [subprocess.Popen([sys.executable, "-S", "-c", code, asked["figures"], json.dumps(found)])]

    monkeypatch.setattr(parallel, "_started", started)
    out, kept = tmp_path / "one.json", []
    monkeypatch.setattr(parallel, "_keep", lambda figures, path: kept.append((len(figures["results"]), path)))
    arguments = ["--dry", "--shapes", "qwen3", "--only", "alltoall", "flax_ragged", "--json", str(out)]
    assert parallel.main(arguments) == 1
    assert kept == [(1, out), (2, out), (2, out)]  # as it went on, and at the end


def test_command_without_as_many_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="needs 2 NVIDIA GPUs, found 1; --dry"):
        parallel.main([])


def test_dry_run_measures_every_row_that_is_there_and_says_why_another_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = tmp_path / "out" / "one.json", ["allgather_static", "alltoall", "deepep", "flax_ragged"]
    asked = ["gpu_parallel", "--dry", "--shapes", "mixtral", "--only", *rows, "--rounds", "1", "--rep", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *asked, "--warmup", "1", "--json", str(out)])
    assert command.main() == 0
    figures = json.loads(out.read_text())
    found = {result["row"]: result for result in figures["results"]}
    assert sorted(found) == sorted(rows) and "not installed: deep_ep" in found["deepep"]["reason"]
    for name in ("allgather_static", "alltoall", "flax_ragged"):
        assert found[name]["layer"]["ms"] > 0 and found[name]["still"]["ms"] > 0, name
        assert found[name]["errors"].keys() == {"y", "dx", "dweights", "dup", "ddown"}, name
        assert max(found[name]["errors"].values()) < 0.02, name
    shape = figures["shapes"]["mixtral"]
    assert shape["alone"]["ms"] > 0 and shape["rate"] > 0 and shape["tokens"] == 64 and shape["ranks"] == 2
    assert 0 < shape["leaving"]["True"] < shape["leaving"]["False"] == 4 * 64
    printed = capfd.readouterr().out
    assert "PyTorch alltoall, ms: " in printed and "Flax ragged_all_to_all / PyTorch's" in printed
