"""Why a grouped matmul is chosen, in words: the measured points that decide, or why there are none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moebius.core import measured
from moebius.core.measured import Point, Verdict
from moebius.core.registry import Problem


def device(problem: Problem) -> str:
    """A problem in words, with the kind of its GPU."""
    if problem.capability is None:
        return str(problem)
    return f"{problem}, compute capability {_number(problem.capability)}"


def figures(frontend: str, problem: Problem, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({name: why it has its place}, lines with the figures that decide).

    Args:
        frontend: "torch" or "jax". problem: of a whole layer. names: the backends that None may mean, as declared.
    """
    verdict = measured.verdict(frontend, problem, names)
    if verdict is None:
        return dict.fromkeys(names[:1], f"declared first; {measured.silence(frontend, problem, names)}"), []
    return _places(verdict, names), list(_lines(problem, verdict))


def _places(verdict: Verdict, names: Sequence[str]) -> dict[str, str]:
    best, *others = verdict.order
    why = {name: "not measured there" for name in names if name not in verdict.order}
    for name in others:
        speed = verdict.speeds[name] / verdict.speeds[best]
        close = f", closer than {measured.TIE:.0%}, and declared later" if speed > 1 - measured.TIE else ""
        why[name] = f"{speed:.2f} of the speed of {best}{close}"
    alone = "alone was measured there" if not others else "the fastest of those that were measured there"
    return why | {best: alone}


def _lines(problem: Problem, verdict: Verdict) -> Iterator[str]:
    rows = f"{measured.mean_rows(problem):.4g} rows an expert"
    widths = f"D={problem.dim}, I={problem.inter_dim}"
    yield f"measured nearest to {rows}, {widths}; TFLOP/s, forward / forward and backward:"
    for point, weight in verdict.points:
        found = ", ".join(f"{name} {_both(point, name)}" for name in verdict.order)
        sizes = f"{point.mean_rows:.4g} rows an expert, D={point.dim}, I={point.inter_dim}"
        yield f"  {point.layer}, {sizes}, weight {weight:.2f}: {found}"
        run = point.run
        like = "" if run.dtype == problem.dtype else f", {run.dtype}"
        yield f"    {run.device}{like}, {run.date}, {run.versions}"


def _both(point: Point, name: str) -> str:
    return " / ".join(f"{figure:.4g}" for figure in point.tflops[name])


def _number(capability: Sequence[int]) -> str:
    return ".".join(map(str, capability))
