"""`moebius doctor` as a command: standard library alone, rich where it is there."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from moebius import __version__
from moebius.compare.doctor import backends, choice, devices, packages, settings
from moebius.compare.doctor.machine import Machine, ask_choice, ask_support, examine
from moebius.compare.doctor.record import Report, Row
from moebius.compare.doctor.support import markdown
from moebius.compare.doctor.text import written
from moebius.core.errors import ConfigError

_TIMEOUT = 60.0  # a first import from a cold disk takes half a minute
_JUDGES = (packages.judge, devices.judge, backends.judge, settings.judge)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    Args:
        arguments: after "doctor"; None for those of the process.
    Returns:
        0; 1 where something installed does not work or a name of --strict is not ok; 2 for bad arguments.
    """
    asked = _parser().parse_args(arguments)
    if asked.markdown:
        return _print_support(asked.timeout)
    if asked.explain:
        return _print_choice(asked.explain, asked.timeout)
    start = time.monotonic()
    found = rows(examine(timeout=asked.timeout))
    report = Report(
        moebius=__version__, rows=found, strict=tuple(asked.strict), seconds=round(time.monotonic() - start, 1)
    )
    unknown = [name for name in report.strict if not report.known(name)]
    if unknown:
        names = ", ".join(row.name for row in report.rows if row.section in ("package", "backend"))
        return _refuse(f"doctor --strict {' '.join(unknown)}", f"the names {names}", "name one of them")
    print(report.to_json() if asked.json else written(report, color=sys.stdout.isatty()))
    return 0 if report.passed else 1


def rows(machine: Machine) -> tuple[Row, ...]:
    """Every finding about a machine; asks nothing of the machine that this runs on."""
    return tuple(row for judge in _JUDGES for row in judge(machine))


def _print_support(timeout: float) -> int:
    answers = ask_support(timeout=timeout)
    for frontend, answer in answers.items():
        trouble = answer.trouble("support")
        if trouble:
            do = f"{packages.install(frontend)}; `moebius doctor` says what is here"
            return _refuse("doctor --markdown", f"the {frontend} frontend cannot be asked: {trouble}", do)
    print(markdown({frontend: answer.facts["support"] for frontend, answer in answers.items()}))
    return 0


def _print_choice(text: str, timeout: float) -> int:
    try:
        layer = choice.sizes(text)
    except ConfigError as error:
        return _refuse(error.asked, error.found, error.do)
    asked = f"doctor --explain {text}"
    found = {}
    for frontend, answer in ask_choice(layer, timeout=timeout).items():
        trouble = answer.trouble("explain")
        if trouble:
            do = "`moebius doctor` says what is here"
            return _refuse(asked, f"the {frontend} frontend cannot be asked: {trouble}", do)
        found[frontend] = answer.facts["explain"]
    if not found:
        return _refuse(asked, "neither torch nor jax and flax are installed", packages.install("torch"))
    print("\n".join(choice.lines(layer, found)))
    return 0


def _refuse(asked: str, found: str, do: str) -> int:
    print(f"asked: moebius {asked}\nfound: {found}\ndo: {do}", file=sys.stderr)
    return 2


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moebius doctor",
        description="What is installed and works here, what does not and why, and what would spoil a comparison.",
        epilog="Exit code 0; 1: something is broken, or a name of --strict is not ok; 2: bad arguments.",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--json", action="store_true", help="print JSON and nothing else")
    kind.add_argument("--markdown", action="store_true", help="print what each backend supports, on any machine")
    kind.add_argument(
        "--explain",
        metavar=choice.SIZES,
        help="which backends a layer of these sizes gets in bfloat16 where none is named, here and on other GPUs that "
        "were measured, and why",
    )
    parser.add_argument(
        "--strict", nargs="+", default=[], metavar="NAME", help="packages and backends that have to be ok"
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=_TIMEOUT, metavar="SECONDS", help="for each round of probes (%(default)g)"
    )
    return parser
