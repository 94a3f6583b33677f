"""What the command lines of the GPU benchmarks share: rows and shapes by name, the run, its figures and tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_bench import Bench, Row
from benchmarks.gpu_problem import SHAPES, Shape
from benchmarks.gpu_tables import Figures


def row(title: str, kind: str, module: str, /, default: bool = True, skew: bool = False, **options: Any) -> Row:
    """A row whose other arguments go to its module's `build`."""
    return Row(title=title, kind=kind, module=module, options=options, default=default, skew=skew)


def parser(name: str, description: str | None, rows: Iterable[str]) -> argparse.ArgumentParser:
    """With the options of every GPU benchmark but --budget, --rep and --warmup, whose defaults are each one's own."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    add = made.add_argument
    add("--shapes", nargs="*", choices=list(SHAPES), help="which; all by default")
    add("--only", nargs="*", choices=list(rows), metavar="ROW", help=f"which of {', '.join(rows)}")
    add("--rounds", type=int, default=2, help="how often each candidate's turn comes (default %(default)s)")
    add("--json", type=Path, help="write every figure here")
    add("--dry", action="store_true", help="tiny sizes on the CPU: does it run? The figures mean nothing")
    return made


def rows(table: Mapping[str, Row], options: argparse.Namespace) -> dict[str, Row]:
    """Those that were named, or those that run by default."""
    return {key: row for key, row in table.items() if (key in options.only if options.only else row.default)}


def shapes(options: argparse.Namespace) -> dict[str, Shape]:
    """Those that were named, or all; in a dry run tiny ones."""
    return {key: SHAPES[key].tiny() if options.dry else SHAPES[key] for key in options.shapes or SHAPES}


def run(bench: Bench, options: argparse.Namespace, tables: Callable[[Figures], str]) -> int:
    """The whole run, with figures on disk after each shape and tables at the end; the command's exit code."""
    whole = bench.run_all(lambda figures: _write(options.json, figures))
    say(f"{bench.seconds:.0f} s in all\n\n{tables(bench.figures)}")
    return int(not whole)


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, flush=True)


def _write(path: Path | None, figures: Figures) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1, default=str))
