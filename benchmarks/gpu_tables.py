"""The GPU benchmark's figures as Markdown tables: one column a shape, one line a candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

GIB = 2**30
PASSES = ("forward", "both")
COMPILED = "compiled"  # the peer whose memory ours is held against

Figures = dict[str, Any]


def tables(figures: Figures) -> str:
    """All tables and, below them, why a cell is empty."""
    parts = [_speed(figures), _memory(figures), _health(figures)]
    if figures["skew"]:
        parts.append(_skew(figures))
    return "\n\n".join([*parts, "\n".join(_reasons(figures))]).rstrip()


def best(results: Iterable[dict[str, Any]], shape: str, kind: str, name: str) -> dict[str, Any] | None:
    """The fastest result of a kind ("ours", "peer") for a shape in one pass."""
    there = [r for r in results if r["shape"] == shape and r["kind"] == kind and name in r]
    return min(there, key=lambda r: float(r[name]["ms"]), default=None)


def _speed(figures: Figures) -> str:
    def cell(result: dict[str, Any]) -> str:
        return _pair(result.get(name, {}).get("tflops") for name in PASSES)

    def floor(kind: str) -> list[str]:
        return [_pair(shape["floors"][name][f"{kind}_tflops"] for name in PASSES) for shape in _shapes(figures)]

    lines = _lines(figures, "forward / forward+backward, TFLOP/s", cell)
    lines += [
        _line("floor of the products alone", floor("compute")),
        _line("floor of separate kernels", floor("kernel")),
    ]
    share, ahead = [], []
    for key, shape in figures["shapes"].items():
        ours = {name: best(figures["results"], key, "ours", name) for name in PASSES}
        peer = {name: best(figures["results"], key, "peer", name) for name in PASSES}
        floors = shape["floors"]
        share.append(_pair((_over(floors[n]["kernel_ms"], _ms(ours[n], n)) for n in PASSES), "{:.2f}"))
        ahead.append(_pair((_over(_ms(peer[n], n), _ms(ours[n], n)) for n in PASSES), "{:.2f}"))
    lines += [_line("best of ours, share of that floor", share), _line("best of ours / best peer", ahead)]
    return "\n".join(lines)


def _memory(figures: Figures) -> str:
    def cell(result: dict[str, Any]) -> str:
        return _pair((result.get("memory", {}).get(name) for name in ("both", "kept")), "{:.2f}", GIB)

    lines = _lines(figures, "peak of forward+backward / kept by forward, GiB above the inputs", cell)
    shapes = figures["shapes"].items()
    lines.append(_line("of the peak: weight gradients", [f"{s['weight_bytes'] / GIB:.2f}" for _, s in shapes]))
    lines.append(
        _line("rows, pre-activations, y and dx, each once", [f"{s['least_bytes'] / GIB:.2f}" for _, s in shapes])
    )
    with_gradients, without = [], []
    for key, shape in shapes:
        ours = best(figures["results"], key, "ours", "both") or {}
        theirs: dict[str, Any] = next((r for r in figures["results"] if (r["shape"], r["row"]) == (key, COMPILED)), {})
        mine, peak = (r.get("memory", {}).get("both") for r in (ours, theirs))
        least, gradients = shape["least_bytes"], shape["weight_bytes"]
        with_gradients.append(_number(_over(mine, None if peak is None else max(peak, least)), "{:.2f}"))
        pair = (None, None) if None in (mine, peak) else (mine - gradients, max(peak - gradients, least))
        without.append(_number(_over(*pair), "{:.2f}"))
    lines.append(_line("fastest of ours / larger of compiled and that", with_gradients))
    lines.append(_line("the same without weight gradients", without))
    return "\n".join(lines)


def _health(figures: Figures) -> str:
    def cell(result: dict[str, Any]) -> str:
        if "errors" not in result:
            return "-"
        drift = max((result[name]["drift"] for name in PASSES if name in result), default=float("nan"))
        waits = _pair((len(result["syncs"][name]) for name in PASSES), "{:d}") if "syncs" in result else "-"
        return f"{waits}; {max(result['errors'].values()):.1e}; {100 * drift:.1f} %; {result['first_s']:.0f} s"

    title = "host syncs forward / both; largest relative error; drift between rounds; first call"
    return "\n".join(_lines(figures, title, cell))


def _skew(figures: Figures) -> str:
    lines = [f"| Zipf routing ({figures['skew_exponent']}), TFLOP/s |" + _heads(figures), _rule(figures)]
    for row, title in figures["rows"].items():
        there = {r["shape"]: r for r in figures["skew"] if r["row"] == row}
        if there:
            cells = [_pair(there.get(k, {}).get(n, {}).get("tflops") for n in PASSES) for k in figures["shapes"]]
            lines.append(_line(title, cells))
    busiest = [f"{shape['busiest']:.1f}" if "busiest" in shape else "-" for shape in _shapes(figures)]
    lines.append(_line("rows of the busiest expert / mean", busiest))
    return "\n".join(lines)


def _reasons(figures: Figures) -> list[str]:
    """One line for each reason, with the shapes it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in [*figures["results"], *figures["skew"]]:
        if "reason" in result:
            found.setdefault((figures["rows"][result["row"]], result["reason"]), []).append(result["shape"])
    return [f"- {title} ({', '.join(dict.fromkeys(shapes))}): {reason}" for (title, reason), shapes in found.items()]


def _lines(figures: Figures, title: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
    lines = [f"| {title} |" + _heads(figures), _rule(figures)]
    for row, name in figures["rows"].items():
        there = {r["shape"]: r for r in figures["results"] if r["row"] == row}
        lines.append(_line(name, [cell(there.get(key, {})) for key in figures["shapes"]]))
    return lines


def _shapes(figures: Figures) -> Iterable[dict[str, Any]]:
    shapes: Iterable[dict[str, Any]] = figures["shapes"].values()
    return shapes


def _heads(figures: Figures) -> str:
    return "".join(f" {shape['name']} |" for shape in _shapes(figures))


def _rule(figures: Figures) -> str:
    return "|---|" + "---|" * len(figures["shapes"])


def _line(title: str, cells: Iterable[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def _pair(values: Iterable[float | None], form: str = "{:.0f}", unit: float = 1) -> str:
    return " / ".join(_number(value, form, unit) for value in values)


def _number(value: float | None, form: str, unit: float = 1) -> str:
    if value is None:
        return "-"
    return form.format(value if unit == 1 else value / unit)


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _ms(result: dict[str, Any] | None, name: str) -> float | None:
    return None if result is None else float(result[name]["ms"])
