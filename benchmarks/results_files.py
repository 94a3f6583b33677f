"""Figures on disk: made small, kept beside the benchmarks, and joined where a suite ran in several parts."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu_tables import Figures

FOLDER = Path(__file__).parent / "figures"
DIGITS = 5
# No table shows them.
DROPPED = ("json", "traceback", "low_ms", "high_ms", "runs", "xla_bytes", "inputs")
JOINED = ("shapes", "results", "skew")


def store(path: Path, known: Container[str], folder: Path | None = None) -> Path:
    """Keep a run's figures, small, under the file's own name; where they are kept.

    Raises:
        ValueError: they are of no suite in `known`, or the file's name is no part there; see `parts`.
    """
    figures, folder = small(json.loads(path.read_text())), folder or FOLDER
    suite, part = figures["options"].get("suite"), re.sub(r"_\d+$", "", path.stem)
    if suite not in known:
        raise ValueError(f"{path} holds figures of {suite}, which has no place in the document")
    if part not in known or not part.startswith(suite):
        raise ValueError(f"{path} holds figures of {suite}: name it {suite}.json, or {suite}_1.json")
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / path.name
    kept.write_text(_text(figures))
    return kept


def small(value: Any) -> Any:
    """Without what no table shows; numbers to DIGITS digits."""
    if isinstance(value, dict):
        return {key: small(inner) for key, inner in value.items() if key not in DROPPED}
    if isinstance(value, list):
        return [small(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def parts(folder: Path | None = None) -> dict[str, list[Figures]]:
    """What is kept, by part of the document: the runs in the order of their files' names.

    A file's part is its name without the number at its end: the suite, or the suite and what was set apart of it.

    Raises:
        ValueError: two files hold the same shape of one part.
    """
    found: dict[str, list[Figures]] = {}
    for path in sorted((folder or FOLDER).glob("*.json")):
        figures, part = reached(json.loads(path.read_text())), re.sub(r"_\d+$", "", path.stem)
        seen = {shape for run in found.get(part, []) for shape in run["shapes"]}
        both = sorted(seen & set(figures["shapes"]))
        if both:
            raise ValueError(f"{path} holds {', '.join(both)} of {part}, as another file does: remove one of them")
        found.setdefault(part, []).append(figures)
    return found


def reached(figures: Figures) -> Figures:
    """Without the shapes of which no row was timed in every round, one for want of time; "not_reached": their names.

    A row is of the kind that its suite says now, which decides what enters the ratios.
    """
    rows = import_module(f"benchmarks.{figures['options']['suite']}").ROWS
    results = [r | {"kind": rows[r["row"]].kind} if r["row"] in rows else r for r in figures["results"]]
    late = {r["shape"] for r in results if r.get("reason", "").startswith("TimeoutError")}
    whole = [r for r in results if "reason" not in r]
    timed = {r["shape"] for r in whole if any(isinstance(value, dict) and "ms" in value for value in r.values())}
    timed |= {key for key in figures["shapes"] if key not in late}
    names = [key for key in figures["shapes"] if key not in timed]
    kept = {"results": [r for r in results if r["shape"] in timed]}
    kept["skew"] = [r for r in figures["skew"] if r["shape"] in timed]
    return {
        **figures,
        **kept,
        "shapes": {k: s for k, s in figures["shapes"].items() if k in timed},
        "not_reached": names,
    }


def joined(runs: Sequence[Figures]) -> Figures:
    """The shapes of several runs side by side, each with the floors of its own run's ceilings."""
    first, *others = runs
    whole = {**first, **{key: type(first[key])(first[key]) for key in JOINED}, "rows": dict(first["rows"])}
    for run in others:
        whole["shapes"] |= run["shapes"]
        whole["results"] += run["results"]
        whole["skew"] += run["skew"]
        whole["rows"] |= run["rows"]
    return whole


def _text(figures: Figures) -> str:
    """JSON with a line for each entry of a list or dict at the top, so that a change shows where it is."""
    parts = []
    for key, value in figures.items():
        if isinstance(value, list) and value:
            parts.append(f"{json.dumps(key)}: [\n{_lines(json.dumps(v) for v in value)}\n]")
        elif key == "shapes":
            parts.append(
                f"{json.dumps(key)}: {{\n{_lines(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in value.items())}\n}}"
            )
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(entries: Iterable[str]) -> str:
    return ",\n".join(entries)
