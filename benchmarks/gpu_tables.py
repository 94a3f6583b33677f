"""The GPU benchmark's figures as Markdown tables: one column a shape, one line a candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

GIB = 2**30
PASSES = ("forward", "both")
COMPILED = "compiled"  # the peer whose memory ours is held against

Figures = dict[str, Any]


def tables(figures: Figures) -> str:
    """All tables and, below them, why a cell is empty."""
    parts = [speed(figures, {"best of ours / best peer": "peer"}), _memory(figures), _health(figures)]
    if figures["skew"]:
        parts.append(skewed(figures))
    return "\n\n".join([*parts, "\n".join(reasons(figures))]).rstrip()


def best(results: Iterable[dict[str, Any]], shape: str, kind: str, name: str) -> dict[str, Any] | None:
    """The fastest result of a kind ("ours", "peer") for a shape in one pass."""
    there = [r for r in results if r["shape"] == shape and r["kind"] == kind and name in r]
    return min(there, key=lambda r: float(r[name]["ms"]), default=None)


def speed(figures: Figures, against: Mapping[str, str | tuple[str, str]]) -> str:
    """TFLOP/s, the floors, and the ratio of the fastest of ours to the fastest of each kind in `against`, by title.

    Args:
        against: title -> a kind; or two kinds, the first in the place of ours.
    """

    def cell(result: dict[str, Any]) -> str:
        return pair(result.get(name, {}).get("tflops") for name in PASSES)

    def floor(kind: str) -> list[str]:
        return [pair(shape["floors"][name][f"{kind}_tflops"] for name in PASSES) for shape in _shapes(figures)]

    table = lines(figures, "forward / forward+backward, TFLOP/s", cell)
    table += [
        line("floor of the products alone", floor("compute")),
        line("floor of separate kernels", floor("kernel")),
    ]

    def ms(key: str, kind: str, name: str) -> float | None:
        found = best(figures["results"], key, kind, name)
        return None if found is None else float(found[name]["ms"])

    share = []
    for key, shape in figures["shapes"].items():
        floors = shape["floors"]
        share.append(pair((over(floors[n]["kernel_ms"], ms(key, "ours", n)) for n in PASSES), "{:.2f}"))
    table.append(line("best of ours, share of that floor", share))
    for title, kinds in against.items():
        mine, theirs = ("ours", kinds) if isinstance(kinds, str) else kinds
        ratios = [[over(ms(key, theirs, n), ms(key, mine, n)) for n in PASSES] for key in figures["shapes"]]
        table.append(line(title, [pair(both, "{:.2f}") for both in ratios]))
    return "\n".join(table)


def _memory(figures: Figures) -> str:
    def cell(result: dict[str, Any]) -> str:
        return pair((result.get("memory", {}).get(name) for name in ("both", "kept")), "{:.2f}", GIB)

    table = lines(figures, "peak of forward+backward / kept by forward, GiB above the inputs", cell)
    table += least(figures)
    with_gradients, without = [], []
    for key, shape in figures["shapes"].items():
        ours = best(figures["results"], key, "ours", "both") or {}
        theirs: dict[str, Any] = next((r for r in figures["results"] if (r["shape"], r["row"]) == (key, COMPILED)), {})
        mine, peak = (r.get("memory", {}).get("both") for r in (ours, theirs))
        floor, gradients = shape["least_bytes"], shape["weight_bytes"]
        with_gradients.append(number(over(mine, None if peak is None else max(peak, floor)), "{:.2f}"))
        rest = (None, None) if None in (mine, peak) else (mine - gradients, max(peak - gradients, floor))
        without.append(number(over(*rest), "{:.2f}"))
    table.append(line("fastest of ours / larger of compiled and that", with_gradients))
    table.append(line("the same without weight gradients", without))
    return "\n".join(table)


def least(figures: Figures) -> list[str]:
    """Two lines on memory: the weight gradients, and what else nobody goes below."""
    titles = {
        "weight_bytes": "of the peak: weight gradients",
        "least_bytes": "rows, pre-activations, y and dx, each once",
    }
    return [line(title, [f"{s[key] / GIB:.2f}" for s in _shapes(figures)]) for key, title in titles.items()]


def _health(figures: Figures) -> str:
    def cell(result: dict[str, Any]) -> str:
        if "errors" not in result:
            return "-"
        drift = max((result[name]["drift"] for name in PASSES if name in result), default=float("nan"))
        waits = pair((len(result["syncs"][name]) for name in PASSES), "{:d}") if "syncs" in result else "-"
        return f"{waits}; {max(result['errors'].values()):.1e}; {100 * drift:.1f} %; {result['first_s']:.0f} s"

    title = "host syncs forward / both; largest relative error; drift between rounds; first call"
    return "\n".join(lines(figures, title, cell))


def skewed(figures: Figures) -> str:
    """TFLOP/s of the rows that also ran with experts of unequal popularity."""
    table = [f"| Zipf routing ({figures['skew_exponent']}), TFLOP/s |" + _heads(figures), _rule(figures)]
    for row, title in figures["rows"].items():
        there = {r["shape"]: r for r in figures["skew"] if r["row"] == row}
        if there:
            cells = [pair(there.get(k, {}).get(n, {}).get("tflops") for n in PASSES) for k in figures["shapes"]]
            table.append(line(title, cells))
    busiest = [f"{shape['busiest']:.1f}" if "busiest" in shape else "-" for shape in _shapes(figures)]
    table.append(line("rows of the busiest expert / mean", busiest))
    return "\n".join(table)


def reasons(figures: Figures) -> list[str]:
    """One line for each reason, with the shapes it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in [*figures["results"], *figures["skew"]]:
        if "reason" in result:
            found.setdefault((figures["rows"][result["row"]], result["reason"]), []).append(result["shape"])
    return [f"- {title} ({', '.join(dict.fromkeys(shapes))}): {reason}" for (title, reason), shapes in found.items()]


def lines(figures: Figures, title: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table: `title` and the shapes' names above, and of each row what `cell` makes of its result, {} for none."""
    table = [f"| {title} |" + _heads(figures), _rule(figures)]
    for row, name in figures["rows"].items():
        there = {r["shape"]: r for r in figures["results"] if r["row"] == row}
        table.append(line(name, [cell(there.get(key, {})) for key in figures["shapes"]]))
    return table


def _shapes(figures: Figures) -> Iterable[dict[str, Any]]:
    shapes: Iterable[dict[str, Any]] = figures["shapes"].values()
    return shapes


def _heads(figures: Figures) -> str:
    return "".join(f" {shape['name']} |" for shape in _shapes(figures))


def _rule(figures: Figures) -> str:
    return "|---|" + "---|" * len(figures["shapes"])


def line(title: str, cells: Iterable[str]) -> str:
    """One line of a table."""
    return f"| {title} | " + " | ".join(cells) + " |"


def pair(values: Iterable[float | None], form: str = "{:.0f}", unit: float = 1) -> str:
    """Numbers of both passes in one cell."""
    return " / ".join(number(value, form, unit) for value in values)


def number(value: float | None, form: str, unit: float = 1) -> str:
    """A number in its unit; a dash for none."""
    if value is None:
        return "-"
    return form.format(value if unit == 1 else value / unit)


def over(above: float | None, below: float | None) -> float | None:
    """A ratio; None where either is missing."""
    return None if above is None or not below else above / below
