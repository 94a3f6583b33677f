"""What tuning found, as Markdown: a table of each kernel of each layer, and which variants would win where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LEAST = 0.03  # what a variant has to gain before it is spoken of

Figures = dict[str, Any]


def tables(figures: Figures) -> str:
    """All tables, what was left out, and the last lines: see `wins`."""
    ceilings = figures["ceilings"]
    head = "ceilings: {:.0f} TFLOP/s, {:.2f} TB/s".format(ceilings["flops"] / 1e12, ceilings["bytes"] / 1e12)
    parts = [head, *(table(case, ceilings) for case in figures["cases"])]
    if figures["left_out"]:
        parts.append("not reached: " + "; ".join(figures["left_out"]))
    return "\n\n".join([*parts, "\n".join(wins(figures["cases"]))])


def table(case: Figures, ceilings: Figures) -> str:
    """One kernel of one layer; the plan's launch first, then by time, then what was not timed."""
    floor_ms = 1e3 * max(case["flops"] / ceilings["flops"], case["bytes"] / ceilings["bytes"])
    lines = [
        f"{case['kernel']} ({case['part']}): {place(case)}; {case['layer']}; the plan: {case['plan']}",
        "",
        "| variant | ms | TFLOP/s | GB/s | share of the floor | against the plan | results |",
        "|---|---|---|---|---|---|---|",
    ]
    plan, *others = case["rows"]
    for row in (plan, *sorted(others, key=lambda row: row.get("ms", float("inf")))):
        lines.append("| " + " | ".join(_cells(row, case, floor_ms)) + " |")
    return "\n".join(lines)


def place(case: Figures) -> str:
    """Where in its family a case is: by what the plan's rules may ask for, never by a model's name."""
    depth = f"depth {case['depth']}, " if case["depth"] else ""
    return f"{depth}width {case['width']}, {case['rows_per_expert']:.0f} rows an expert"


def wins(cases: Iterable[Figures]) -> list[str]:
    """One line for each variant that gains more than LEAST anywhere, with what it gives in all other cases of the same
    kernel and plan; one for each kernel and plan that no variant beats."""
    families: dict[tuple[str, str], list[Figures]] = {}
    for case in cases:
        families.setdefault((case["kernel"], case["plan"]), []).append(case)
    found = [f"would win by more than {LEAST:.0%}:"]
    for (kernel, plan), members in families.items():
        gains: dict[str, list[tuple[float, str]]] = {}
        for case in members:
            for row in case["rows"][1:]:
                if "gain" in row:
                    gains.setdefault(row["variant"], []).append((row["gain"], place(case)))
        winners = {name: given for name, given in gains.items() if max(given)[0] > LEAST}
        title = f"- {kernel}, {plan}"
        if not winners:
            found.append(f"{title}: no variant in {len(members)} case{'s' if len(members) > 1 else ''}")
        for name, given in sorted(winners.items(), key=lambda item: -max(item[1])[0]):
            by_place = "; ".join(f"{gain:+.1%} at {where}" for gain, where in sorted(given, reverse=True))
            found.append(f"{title}: {name}: {by_place}")
    return found


def _cells(row: Figures, case: Figures, floor_ms: float) -> list[str]:
    if "ms" not in row:
        return [row["variant"], *["-"] * 5, row.get("why", "")]
    ms = row["ms"]
    rates = f"{case['flops'] / ms / 1e9:.0f}" if case["flops"] else "-", f"{case['bytes'] / ms / 1e6:.0f}"
    worst = max(row["errors"])
    said = "same bits" if worst == 0 else f"within {worst:.0e}"
    return [row["variant"], f"{ms:.4g}", *rates, f"{floor_ms / ms:.2f}", f"{row['gain']:+.1%}", said]
