"""The report as text of at most 100 columns: tables where rich is, plain lines where it is not."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from itertools import groupby

from moebius.compare.doctor.record import Report, Row, Status

WIDTH = 100
_STYLES = {
    Status.OK: "green",
    Status.MISSING: "dim",
    Status.UNBUILT: "dim",
    Status.UNSUPPORTED: "dim",
    Status.WARNING: "bold yellow",
    Status.BROKEN: "bold red",
}
_STATUS_WIDTH = max(map(len, Status))
_GAP = "  "
# (name, status, what was found, what to do)
Line = tuple[str, Status, str, str]


def plain(report: Report) -> str:
    """Without rich."""
    out = []
    for title, lines in _sections(report):
        out += [title, *(cut for line in lines for cut in _plain_line(line, _name_width(report))), ""]
    return "\n".join([*out, *_wrapped(verdict(report), "")])


def tables(report: Report, color: bool = False) -> str:
    """With rich; raises ImportError where it is not."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=color, no_color=not color, highlight=False)
    for title, lines in _sections(report):
        table = Table.grid(padding=(0, len(_GAP), 0, 0))
        table.add_column(min_width=_name_width(report) + len(_GAP), no_wrap=True)
        table.add_column(min_width=_STATUS_WIDTH, no_wrap=True)
        table.add_column(overflow="fold")
        for name, status, found, remedy in lines:
            cell = escape(found) + (f"\n[bold]do:[/] {escape(remedy)}" if remedy else "")
            table.add_row(escape(_GAP + name), f"[{_STYLES[status]}]{status}[/]", cell)
        console.print(f"[bold]{escape(title)}[/]", table, "", sep="\n")
    console.print(escape(verdict(report)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def written(report: Report, color: bool = False) -> str:
    """By `tables` where rich can be imported, else by `plain`."""
    try:
        return tables(report, color)
    except ImportError:
        return plain(report)


def verdict(report: Report) -> str:
    """The last line: what makes the command fail, or how much there is to look at."""
    counts = Counter(row.status for row in report.rows)
    warnings = counts[Status.WARNING]
    seen = f"{warnings} warning{'' if warnings == 1 else 's'}"
    if report.faults:
        return f"verdict: {'; '.join(report.faults)}; {seen}"
    strict = f"; ok as asked: {', '.join(report.strict)}" if report.strict else ""
    return f"verdict: nothing is broken; {seen}{strict}"


def _sections(report: Report) -> Iterator[tuple[str, list[Line]]]:
    """Title and lines of each; backends by frontend and operation, and those of a later version in one line."""

    def title(row: Row) -> str:
        return " ".join(["backends of", *row.name.split(".")[:-1]]) if "." in row.name else f"{row.section}s"

    for name, rows in groupby(report.rows, title):
        yield name, list(_lines(rows))


def _name_width(report: Report) -> int:
    return max((len(line[0]) for _, lines in _sections(report) for line in lines), default=0)


def _lines(rows: Iterator[Row]) -> Iterator[Line]:
    def key(row: Row) -> tuple[object, ...]:
        return (row.status, row.detail) if row.status == Status.UNBUILT else (row.name,)

    return (_line(list(alike)) for _, alike in groupby(rows, key))


def _line(rows: list[Row]) -> Line:
    first = rows[0]
    found = ", ".join(text for text in (first.version, first.detail) if text)
    if first.status == Status.UNBUILT:
        return "of a later version", first.status, f"{', '.join(map(_short, rows))}: {found}", first.remedy
    return _short(first), first.status, found, first.remedy


def _short(row: Row) -> str:
    return row.name.split(".")[-1]


def _plain_line(line: Line, width: int) -> list[str]:
    name, status, found, remedy = line
    indent = _GAP + " " * width + _GAP + " " * _STATUS_WIDTH + _GAP
    first = f"{_GAP}{name:{width}}{_GAP}{status:{_STATUS_WIDTH}}{_GAP}"
    lines = [first + found_line if i == 0 else indent + found_line for i, found_line in enumerate(_cut(found, indent))]
    return [line.rstrip() for line in lines] + (_wrapped(f"do: {remedy}", indent) if remedy else [])


def _cut(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False) or [""]


def _wrapped(text: str, indent: str) -> list[str]:
    return [indent + line for line in _cut(text, indent)]
