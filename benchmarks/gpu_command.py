"""What the command lines of the GPU benchmarks share: rows and shapes by name, the run, its figures and tables."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    names = list(rows)
    add("--only", nargs="*", choices=names, metavar="ROW", help=f"which of {', '.join(names)}")
    add("--also", nargs="*", choices=names, metavar="ROW", default=[], help="these beside those that run by default")
    add("--without", nargs="*", choices=names, metavar="ROW", default=[], help="which of them not")
    add("--rounds", type=int, default=2, help="how often each candidate's turn comes (default %(default)s)")
    add("--json", type=Path, help="write every figure here")
    add("--dry", action="store_true", help="tiny sizes on the CPU: does it run? The figures mean nothing")
    made.set_defaults(suite=name)
    return made


def walled(made: argparse.ArgumentParser, *, rep: float, warmup: float, rounds: int, budget: float) -> None:
    """The options of a run that is timed by the host's clock; see benchmarks.gpu_wall."""
    add = made.add_argument
    add("--rep", type=float, default=rep, help="ms of runs a candidate, pass and round (default %(default)s)")
    add("--warmup", type=float, default=warmup, help="ms of warm-up before them (default %(default)s)")
    add("--groups", type=int, default=1, help="groups that those runs come in (default 1)")
    add("--slow", type=float, default=200, help="ms of a pass that is timed in two rounds alone (default 200)")
    add("--budget", type=float, default=budget, help="seconds after which nothing new starts (default %(default)s)")
    made.set_defaults(skew=0.0, inference=True, rounds=rounds)


def parse(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, and as `command` the line that asks for them; without --json, which changes no figure."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = made.parse_args(given)
    if "--json" in given:
        at = given.index("--json")
        del given[at : at + 2]
    options.command = shlex.join(["python", "-m", "benchmarks", options.suite, *given])
    return options


def rows(table: Mapping[str, Row], options: argparse.Namespace) -> dict[str, Row]:
    """Those that were named, or those that run by default and beside them; less those that are not wanted."""
    given = options.only or [*options.also, *(key for key, row in table.items() if row.default)]
    named = {key: row for key, row in table.items() if key in given}
    return {key: row for key, row in named.items() if key not in options.without}


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
