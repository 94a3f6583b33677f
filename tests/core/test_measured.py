"""Which backend the measurements choose: the rule on points made up here, and the points of the file themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import pytest

from moebius.core import measured, measured_json
from moebius.core.config import EXPERT_BACKENDS
from moebius.core.errors import ConfigError
from moebius.core.registry import Problem

NAMES = ("vendor", "plain", "own")  # as declared
RUN = measured.Run(
    frontend="torch", date="2026-01-01", device="G", capability=(9, 0), dtype="bfloat16", versions="v 1", command="c"
)
LAYER = Problem(
    device="cuda",
    dtype="bfloat16",
    dim=1024,
    inter_dim=512,
    n_experts=64,
    capability=(9, 0),
    up_width=1024,
    rows=64 * 256,
)


def point(rows: int, run=RUN, dim=1024, inter_dim=512, **tflops) -> measured.Point:
    """A layer of 64 experts with `rows` rows each; one figure a backend stands for both passes."""
    figures = {name: both if isinstance(both, tuple) else (both, both) for name, both in tflops.items()}
    sizes = {"n_experts": 64, "k": 8, "dim": dim, "inter_dim": inter_dim, "tokens": rows * 8}
    return measured.Point(run=run, layer=f"{rows} rows", tflops=figures, **sizes)


def verdict(points, problem=LAYER, names=NAMES):
    return measured.verdict("torch", problem, names, points)


def test_verdict_takes_the_fastest_at_the_nearest_rows() -> None:
    points = [point(16, vendor=10.0, own=5.0), point(1024, vendor=400.0, own=500.0)]
    rows = {16: "vendor", 32: "vendor", 512: "own", 1024: "own"}
    for mean, wanted in rows.items():
        assert verdict(points, replace(LAYER, rows=64 * mean)).order[0] == wanted


def test_verdict_weighs_the_two_nearest_by_halves_for_each_doubling() -> None:
    points = [point(1024, vendor=1.0, own=1.0), point(128, vendor=1.0, own=8.0), point(16, vendor=9.0, own=1.0)]
    found = verdict(points)  # at 256 rows: one doubling from 128, two from 1024, four from 16
    assert [each.mean_rows for each, _ in found.points] == [128, 1024]
    assert [weight for _, weight in found.points] == pytest.approx([2 / 3, 1 / 3])
    assert found.speeds == pytest.approx({"own": 1, "vendor": 8 ** (-2 / 3)})


def test_verdict_counts_half_a_doubling_of_either_width() -> None:
    near = point(256, dim=2048, vendor=1.0, own=2.0)
    assert near.distance(LAYER) == 0.5
    assert point(256, inter_dim=128, vendor=1.0, own=2.0).distance(LAYER) == 1
    assert verdict([point(512, vendor=2.0, own=1.0), near]).points[0][0] is near


def test_verdict_of_both_passes_is_their_geometric_mean() -> None:
    found = verdict([point(256, vendor=(100.0, 100.0), own=(50.0, 400.0))])
    assert found.speeds == pytest.approx({"own": 1, "vendor": 100 / (50 * 400) ** 0.5})


def test_verdict_compares_only_the_passes_that_all_have() -> None:
    found = verdict([point(256, vendor=(100.0, 100.0), own=(120.0,))])
    assert found.speeds == pytest.approx({"own": 1, "vendor": 1 / 1.2})


@pytest.mark.parametrize(("own", "first"), [(101.0, "vendor"), (103.0, "own")])
def test_verdict_of_nearly_equal_speeds_takes_what_is_declared_first(own, first) -> None:
    assert verdict([point(256, vendor=100.0, own=own)]).order[0] == first


def test_verdict_leaves_out_what_was_not_measured() -> None:
    assert verdict([point(256, vendor=1.0, own=2.0)]).order == ("own", "vendor")
    assert verdict([point(256, vendor=1.0, own=2.0)], names=("plain", "own")).order == ("own",)
    assert verdict([point(256, vendor=1.0, own=2.0)], names=("plain",)) is None


def test_verdict_passes_over_points_that_measured_fewer_of_the_candidates() -> None:
    found = verdict([point(1024, vendor=1.0, own=2.0), point(256, vendor=9.0)])
    assert found.order == ("own", "vendor") and [each.mean_rows for each, _ in found.points] == [1024]


def test_verdict_of_one_alone_counts_only_where_it_was_never_compared() -> None:
    alone, compared = point(256, own=2.0), point(2**15, vendor=1.0, own=2.0)
    assert verdict([alone]).order == ("own",) and verdict([alone, compared]) is None
    assert verdict([alone, compared], names=("plain", "own")).order == ("own",)


def test_verdict_takes_the_later_of_two_points_of_the_same_sizes() -> None:
    again = replace(RUN, date="2026-02-02")
    points = [point(256, vendor=1.0, own=2.0), point(256, run=again, vendor=2.0, own=1.0)]
    found = verdict(points)
    assert found.order[0] == "vendor" and [each.run for each, _ in found.points] == [again]
    assert verdict([*points, point(256, run=again, own=9.0)]).order[0] == "vendor"  # which measured one alone


def test_verdict_of_no_rows_is_that_of_many() -> None:
    points = [point(8, vendor=2.0, own=1.0), point(1024, vendor=1.0, own=2.0)]
    assert verdict(points, replace(LAYER, rows=None)).order[0] == "own"


def test_verdict_in_float16_is_that_of_bfloat16() -> None:
    assert verdict([point(256, vendor=1.0, own=2.0)], replace(LAYER, dtype="float16")).order[0] == "own"


SILENT = {
    "float32": ({"dtype": "float32"}, "in float32 on compute capability 9.0"),
    "another GPU": ({"capability": (8, 0)}, "in bfloat16 on compute capability 8.0"),
    "a CPU": ({"device": "cpu", "capability": None}, "on cpu"),
    "a device that is not known yet": ({"device": "meta", "capability": None}, "on meta"),
    "odd widths": ({"inter_dim": 12, "up_width": 24}, "no multiples of 8"),
    "a product alone": ({"up_width": None}, "a product alone"),
    "few rows": ({"rows": 64}, "within 64 times these rows"),
    "many rows": ({"rows": 64 * 2**18}, "within 64 times these rows"),
}


@pytest.mark.parametrize("case", SILENT)
def test_verdict_where_nothing_was_measured_is_none_and_silence_says_why(case, monkeypatch) -> None:
    points = (point(1024, vendor=1.0, own=2.0),)
    changes, words = SILENT[case]
    problem = replace(LAYER, **changes)
    assert verdict(points, replace(LAYER, rows=64 * 1024)) and verdict(points, problem) is None
    monkeypatch.setattr(measured, "read", lambda: points)
    assert words in measured.silence("torch", problem, NAMES)
    assert measured.order("torch", problem, NAMES) == ()
    assert measured.order("jax", replace(LAYER, rows=64 * 1024), NAMES) == ()  # of the other frontend


def test_silence_of_what_was_never_measured_names_it(monkeypatch) -> None:
    monkeypatch.setattr(measured, "read", lambda: (point(256, vendor=1.0, own=2.0),))
    assert measured.silence("torch", LAYER, ["plain"]) == "plain was not measured on compute capability 9.0"


@pytest.mark.parametrize(("rows", "wanted"), [(None, None), (0, 1), (1, 1), (3, 4), (1000, 1024), (1 << 17, 1 << 17)])
def test_bucket_is_the_nearest_power_of_two(rows, wanted) -> None:
    assert measured.bucket(rows) == wanted


def of(point: measured.Point) -> Problem:
    """The problem that a point of the file measured."""
    sizes = {"dim": point.dim, "inter_dim": point.inter_dim, "n_experts": point.n_experts}
    rows = point.tokens * point.k
    kind = {"device": "cuda", "dtype": point.run.dtype, "capability": point.run.capability}
    return Problem(**sizes, **kind, up_width=2 * point.inter_dim, rows=rows)


@pytest.mark.parametrize("frontend", ["torch", "jax"])
def test_every_point_of_the_file_gets_what_was_fast_there(frontend) -> None:
    names = {"torch": ("grouped_mm", "loop", "triton"), "jax": ("tokamax", "loop", "triton")}[frontend]
    points = [each for each in measured.read() if each.run.frontend == frontend and "triton" in each.tflops]
    assert points
    for each in points:
        there = {name: prod(each.tflops[name]) ** (1 / len(each.tflops[name])) for name in names if name in each.tflops}
        chosen = measured.order(frontend, of(each), names)[0]
        assert there[chosen] >= 0.9 * max(there.values()), each


def test_every_point_of_the_file_names_backends_and_has_a_figure_for_each_pass() -> None:
    assert len(measured.read()) >= 14
    for each in measured.read():
        assert set(each.tflops) <= set(EXPERT_BACKENDS) and each.tflops
        assert all(len(figures) in (2, 4) and min(figures) > 0 for figures in each.tflops.values())
        assert each.run.frontend in ("torch", "jax") and each.run.device and each.run.versions and each.run.command


def test_capabilities_are_those_of_the_file() -> None:
    assert (9, 0) in measured.capabilities() and (8, 0) not in measured.capabilities()


# ------------------------------------------------------------------------------------------------ a benchmark's figures
def result(row, shape="s", kind="ours", **tflops):
    return {"shape": shape, "row": row, "kind": kind} | {name: {"tflops": value} for name, value in tflops.items()}


SHAPE = {"name": 'S "1"', "tokens": 16, "n_experts": 64, "k": 8, "dim": 1024, "inter": 512, "floors": {}}


def figures(rows, results):
    machine = {"GPU": "G", "Python": "3.12", "torch": "2.11"}
    return {"machine": machine, "rows": rows, "shapes": {"s": SHAPE}, "results": results}


def written(rows, results):
    text = measured_json.runs(figures(rows, results), capability="9.0", date="2026-01-02", command='run "it"')
    return list(measured.parse(text)) if text else []


def test_runs_of_a_benchmark_read_back_as_its_points() -> None:
    rows = {"a": "moebius triton", "b": "moebius grouped_mm"}
    (found,) = written(rows, [result("a", forward=498.76, both=521), result("b", forward=0.123456, both=472.0)])
    assert found.tflops == {"triton": (498.8, 521.0), "grouped_mm": (0.1235, 472.0)}
    assert found.run == measured.Run(
        frontend="torch",
        date="2026-01-02",
        device="G",
        capability=(9, 0),
        dtype="bfloat16",
        versions="Python 3.12, torch 2.11",
        command='run "it"',
    )
    assert (found.layer, found.mean_rows, found.dim, found.inter_dim) == ('S "1"', 2, 1024, 512)


def test_runs_of_a_benchmark_keep_replayed_passes() -> None:
    both = {"forward": 1, "both": 2, "forward_graph": 3, "both_graph": 4}
    (found,) = written({"a": "moebius triton"}, [result("a", **both)])
    assert found.tflops == {"triton": (1, 2, 3, 4)}


def test_runs_of_both_frontends_are_two() -> None:
    rows = {"a": "Flax triton", "b": "PyTorch triton", "c": "Flax tokamax, remat none", "d": "TE GroupedLinear"}
    found = written(rows, [result(row, kind="any", forward=1, both=2) for row in rows])
    assert [(each.run.frontend, dict(each.tflops)) for each in found] == [
        ("torch", {"triton": (1, 2)}),
        ("jax", {"triton": (1, 2)}),
    ]


def test_runs_without_both_passes_are_none() -> None:
    assert written({"a": "moebius triton"}, [result("a", forward=1)]) == []


def test_runs_are_of_the_capability_and_the_dtype_that_the_figures_say() -> None:
    told = figures({"a": "moebius triton"}, [result("a", forward=1, both=2), result("a", "t", forward=3, both=4)])
    told["machine"]["compute capability"] = "8.0"
    told["shapes"]["t"] = SHAPE | {"dtype": "float32"}
    found = list(measured.parse(measured_json.runs(told, capability="9.0", date="2026-01-02", command="c")))
    assert [(each.run.dtype, each.tflops["triton"]) for each in found] == [("bfloat16", (1, 2)), ("float32", (3, 4))]
    assert all(each.run.capability == (8, 0) and "capability" not in each.run.versions for each in found)


def test_main_prints_what_the_file_takes(tmp_path, capsys) -> None:
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(figures({"a": "Flax triton"}, [result("a", forward=1, both=2)])))
    with pytest.raises(ConfigError, match="figures that do not say the device's compute capability"):
        measured_json.main([str(file)])
    measured_json.main([str(file), "--date", "2026-01-02", "--capability", "9.0"])
    (*_, last) = measured.parse(measured.FILE.read_text() + capsys.readouterr().out)
    assert last.run.frontend == "jax" and last.tflops == {"triton": (1, 2)} and last.run.capability == (9, 0)
