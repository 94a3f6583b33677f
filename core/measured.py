"""Which backend is the fastest for an expert layer, by what was measured: measured.toml, and one rule.

A point is a layer's sizes and, of each backend that ran in turns with the others, TFLOP/s. Its distance from a problem
in doublings is that between the mean rows of an expert, and half of those between D and between I. The two nearest
points decide, the nearer one more: a weight halves with each doubling. A backend's figure in a point is the geometric
mean over the passes, and its speed the weighted mean of its shares of the points' best. What lies farther away than
`REACH` says nothing.

Group sizes lie on the device and are not read: mean rows are those of even routing, all rows by all experts held here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, log, log2
from pathlib import Path
from typing import Any, NamedTuple

from moebius.core.registry import Problem

FILE = Path(__file__).with_name("measured.toml")
MANY = 1024.0  # rows of an expert where nobody says how many: as in training
REACH = 6.0  # doublings: 64 times as many rows
NEAREST = 2  # points that decide
TIE = 0.02  # of the speed: less is noise between two runs, and the declared order decides
# Whose figures hold for whom. float16 runs the same instructions as bfloat16 in moebius' kernels; torch's grouped_mm
# has its fast kernel for bfloat16 alone, so that those figures flatter it.
_AS = {"bfloat16": "bfloat16", "float16": "bfloat16"}
_WHOLE = 8  # what all widths are multiples of, in all points: others take other kernels, of which nothing is known


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where figures come from.

    Attributes:
        frontend: "torch" or "jax". date: ISO. device: its name. capability: compute capability.
        dtype: of rows and weights. versions, command: in words.
    """

    frontend: str
    date: str
    device: str
    capability: tuple[int, int]
    dtype: str
    versions: str
    command: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One layer, measured.

    Attributes:
        run: in which. layer: its name. n_experts, k, dim, inter_dim, tokens: E, K, D, I, T.
        tflops: of each backend (forward, forward + backward) and, of few tokens, both again replayed from CUDA graphs.
    """

    run: Run
    layer: str
    n_experts: int
    k: int
    dim: int
    inter_dim: int
    tokens: int
    tflops: Mapping[str, tuple[float, ...]]

    @property
    def mean_rows(self) -> float:
        """Of an expert, under even routing."""
        return self.tokens * self.k / self.n_experts

    def distance(self, problem: Problem) -> float:
        """In doublings; see above."""
        rows = log2(self.mean_rows / mean_rows(problem))
        return abs(rows) + abs(log2(self.dim / problem.dim)) / 2 + abs(log2(self.inter_dim / problem.inter_dim)) / 2


class Verdict(NamedTuple):
    """What the figures say of some backends for a problem.

    Attributes:
        order: those that were measured, the best first. speeds: of each, 1 for the fastest.
        points: that decided, the nearest first, and each one's weight.
    """

    order: tuple[str, ...]
    speeds: Mapping[str, float]
    points: tuple[tuple[Point, float], ...]


def bucket(n_rows: int | None) -> int | None:
    """The power of two nearest to a number of rows, so that few numbers are ever asked for."""
    return None if n_rows is None else 1 << round(log2(max(n_rows, 1)))


def mean_rows(problem: Problem) -> float:
    """Of an expert held here: MANY where the problem does not say."""
    return MANY if problem.rows is None else max(problem.rows, 1) / max(problem.n_experts, 1)


def order(frontend: str, problem: Problem, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that were measured near the problem, the best first; see `verdict`."""
    found = verdict(frontend, problem, names)
    return found.order if found else ()


def verdict(
    frontend: str, problem: Problem, names: Sequence[str], points: Sequence[Point] | None = None
) -> Verdict | None:
    """What was measured near a problem; None for nothing.

    Args:
        frontend: "torch" or "jax". problem: of a whole layer; of a product alone nothing was measured.
        names: the backends that can serve, in the order that decides between equals.
        points: to go by; None for those of the file.
    """
    if problem.up_width is None or 0 in problem.widths or any(width % _WHOLE for width in problem.widths):
        return None
    near = _nearest(problem, _comparable(read() if points is None else points, frontend, problem, names), names)
    if not near:
        return None
    measured = [name for name in names if name in near[0][0].tflops]
    speeds = _speeds(near, measured)
    leaders = [name for name in measured if speeds[name] >= 1 - TIE]
    rest = sorted((name for name in measured if name not in leaders), key=lambda name: -speeds[name])
    return Verdict((*leaders, *rest), speeds, near)


def silence(frontend: str, problem: Problem, names: Sequence[str]) -> str:
    """Why `verdict` knows nothing of these, in words."""
    if problem.device != "cuda" or problem.capability is None:
        return f"nothing was measured on {problem.device}"
    if problem.up_width is None:
        return "nothing was measured of a product alone"
    if any(width % _WHOLE for width in problem.widths):
        return f"nothing was measured with widths that are no multiples of {_WHOLE}"
    capability = ".".join(map(str, problem.capability))
    of_kind = [point for point in read() if _same_kind(point, frontend, problem)]
    if not of_kind:
        return f"nothing was measured in {problem.dtype} on compute capability {capability}"
    if not any(name in point.tflops for point in of_kind for name in names):
        return f"{' and '.join(names)} was not measured on compute capability {capability}"
    return f"nothing was measured within {2**REACH:.0f} times these rows and widths"


def capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capabilities of the devices in the file."""
    return tuple(sorted({point.run.capability for point in read()}))


@cache
def read() -> tuple[Point, ...]:
    """All points of the file."""
    return tuple(parse(FILE.read_text()))


def parse(text: str) -> Iterable[Point]:
    """The points of a text in the form of the file."""
    for stated in tomllib.loads(text)["run"]:
        points = stated.pop("points")
        major, minor = map(int, stated.pop("capability").split("."))
        run = Run(capability=(major, minor), date=str(stated.pop("date")), **stated)
        yield from (_point(run, dict(point)) for point in points)


def _point(run: Run, stated: dict[str, Any]) -> Point:
    names = {"n_experts": "E", "k": "K", "dim": "D", "inter_dim": "I", "tokens": "T", "layer": "layer"}
    own = {field: stated.pop(name) for field, name in names.items()}
    return Point(run=run, tflops={name: tuple(map(float, both)) for name, both in stated.items()}, **own)


def _same_kind(point: Point, frontend: str, problem: Problem) -> bool:
    run, dtype = point.run, _AS.get(problem.dtype)
    on_gpu = problem.device == "cuda"
    return on_gpu and (run.frontend, run.capability, run.dtype) == (frontend, problem.capability, dtype)


def _comparable(points: Iterable[Point], frontend: str, problem: Problem, names: Sequence[str]) -> list[Point]:
    """Within reach, of those that measured the most of `names`; of points of the same sizes the last."""
    latest: dict[tuple[int, ...], tuple[int, Point]] = {}
    for point in points:
        if not _same_kind(point, frontend, problem):
            continue
        sizes = point.n_experts, point.k, point.dim, point.inter_dim, point.tokens
        count = sum(name in point.tflops for name in names)
        if count >= max(1, latest.get(sizes, (0, point))[0]):
            latest[sizes] = count, point
    most = max((count for count, _ in latest.values()), default=0)
    return [point for count, point in latest.values() if count == most and point.distance(problem) <= REACH]


def _nearest(problem: Problem, points: Sequence[Point], names: Sequence[str]) -> tuple[tuple[Point, float], ...]:
    """Those that decide, with their weights: the nearest, and others that measured what it did."""
    nearest = sorted(points, key=lambda point: point.distance(problem))
    alike = [point for point in nearest if all(name in point.tflops for name in names if name in nearest[0].tflops)]
    weights = [2 ** -point.distance(problem) for point in alike[:NEAREST]]
    return tuple((point, weight / sum(weights)) for point, weight in zip(alike, weights, strict=False))


def _speeds(points: Sequence[tuple[Point, float]], names: Sequence[str]) -> dict[str, float]:
    """Of each backend: the weighted geometric mean of its shares of the best, 1 for the fastest."""
    logs = dict.fromkeys(names, 0.0)
    for point, weight in points:
        passes = min(len(point.tflops[name]) for name in names)
        figures = {name: sum(map(log, point.tflops[name][:passes])) / passes for name in names}
        for name, figure in figures.items():
            logs[name] += weight * (figure - max(figures.values()))
    return {name: exp(value - max(logs.values())) for name, value in logs.items()}
