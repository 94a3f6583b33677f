"""A report as text of at most 100 columns, with terminal colours if asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from io import StringIO
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from moebius.compare import verdict as v
from moebius.compare.lines import Line, footer, header
from moebius.compare.sheet import MARKS, Block, Cell, Sheet, layer_sheet, routing_sheet, stage_sheet, worst_sheet
from moebius.core.errors import BackendUnavailable

if TYPE_CHECKING:
    from moebius.compare.result import Report

WIDTH = 100
_GAP = "  "  # between blocks; inside a block one space
_WRAPPED, _NARROW = 40, 12  # columns that a block of words takes at most, and at least where numbers need the room
_MARK = 6  # columns that a row's verdict takes, the gap before it included
_STYLES = {v.PASS: "green", v.WARN: "yellow", v.FAIL: "bold red", "": ""}

Piece = tuple[str, str]  # text, style


def table(report: Report, color: bool = False) -> str:
    """The report as text.

    One layer: how the sides routed, then a row per stage and gradient. Many: a row per layer. Tables that are too wide
    are split between sides; a number is never cut.

    Raises:
        BackendUnavailable: rich is not installed.
    """
    _need_rich()
    one = report.layers[0] if len(report.layers) == 1 else None
    sheets = [layer_sheet(report.layers)] if one is None else [routing_sheet(one), stage_sheet(one)]
    parts = [_lines(header(report)), *(part for sheet in sheets for part in _tables(sheet)), _lines(footer(report))]
    return _printed(parts, color)


def worst_table(elements: Iterable[v.Element], color: bool = False) -> str:
    """The elements, a line each, in the order given.

    Raises:
        BackendUnavailable: rich is not installed.
    """
    _need_rich()
    return _printed(_tables(worst_sheet(elements)), color)


def _need_rich() -> None:
    if find_spec("rich") is None:
        raise BackendUnavailable("a table as text", "rich is not installed", "pip install '.[compare]' in a clone")


def _printed(parts: Sequence[Any], color: bool) -> str:
    from rich.console import Console

    out = StringIO()
    console = Console(
        file=out,
        width=WIDTH,
        force_jupyter=False,  # inside a kernel rich would show the table itself and leave the text empty
        highlight=False,
        legacy_windows=False,
        force_terminal=color,
        color_system="standard" if color else None,
    )
    for i, part in enumerate(parts):
        if i:
            console.print()
        console.print(part, soft_wrap=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _tables(sheet: Sheet) -> list[Any]:
    """The sheet as tables of which each fits; each ends with the verdict on what it shows."""
    widest = max((_width(block) for block in sheet.blocks), default=0)
    lead = _widths(sheet.lead, at_most=max(_NARROW, min(_WRAPPED, WIDTH - _MARK * sheet.marked - widest - len(_GAP))))
    return [_table(sheet, blocks, lead) for blocks in _split(sheet, _total(lead) + _MARK * sheet.marked)]


def _split(sheet: Sheet, lead: int) -> list[list[Block]]:
    """The blocks, as many to a table as fit beside `lead` columns."""
    tables: list[list[Block]] = [[]]
    for block in sheet.blocks:
        taken = lead + sum(len(_GAP) + _width(b) for b in (*tables[-1], block))
        if tables[-1] and taken > WIDTH:
            tables.append([])
        tables[-1].append(block)
    return tables


def _widths(block: Block, at_most: int = _WRAPPED) -> list[int]:
    """Of each column: of its longest cell or name; words are wrapped."""
    widths = _needed(block)
    # The head stands over all columns: the first makes room for it.
    widths[0] += max(0, *(len(line) - _total(widths) for line in _head(block)))
    return widths if block.numbers else [min(width, at_most) for width in widths]


def _needed(block: Block) -> list[int]:
    """Of each column, by its name and cells."""
    return [
        max(len(text) for text in (name, *(row[i].text for row in block.rows))) for i, name in enumerate(block.names)
    ]


def _head(block: Block) -> list[str]:
    """The lines of the head: a pair's takes two where one would make its column wider than its numbers."""
    one, tilde, other = block.head.partition("~")
    return [one + tilde, other] if tilde and len(block.head) > _total(_needed(block)) else [block.head]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(widths) - 1


def _width(block: Block) -> int:
    return _total(_widths(block))


def _table(sheet: Sheet, blocks: list[Block], lead: list[int]) -> Any:
    shown = [(sheet.lead, lead), *((block, _widths(block)) for block in blocks)]
    lines: list[list[Piece]] = []
    if any(block.head for block in blocks):
        height = max(len(_head(block)) for block in blocks)
        heads = [(["", *_head(block)][-height:], _total(widths)) for block, widths in shown]
        lines += _side_by_side([[[(f"{line:>{width}}", "bold")] for line in head] for head, width in heads])
    names = [tuple(Cell(text=name) for name in block.names) for block, _ in shown]
    lines += _side_by_side([_drawn(cells, *one) for cells, one in zip(names, shown, strict=True)])
    marked = sheet.marked and any(block.counts for block in blocks)
    full = sum(_total(widths) + len(_GAP) for _, widths in shown) - len(_GAP) + _MARK * marked
    lines.append([("─" * full, "dim")])
    for i in range(len(sheet.lead.rows)):
        parts = [_drawn(block.rows[i], block, widths) for block, widths in shown]
        verdicts = [cell.verdict for block in blocks for cell in block.rows[i] if cell.verdict]
        if marked and verdicts:
            worst = v.worst_of(verdicts)
            parts.append([[(MARKS[worst], _STYLES[worst])]])
        lines += _side_by_side(parts)
    return _text([piece for line in lines for piece in (*line, ("\n", ""))][:-1])


def _drawn(cells: Sequence[Cell], block: Block, widths: list[int]) -> list[list[Piece]]:
    """The lines of one row of a block: one of numbers, one or more of words."""
    if not block.numbers:
        words = wrap(cells[0].text, widths[0]) or [""]
        return [[(f"{line:<{widths[0]}}", _STYLES[cells[0].verdict])] for line in words]
    padded = [(f"{cell.text:>{width}}", _STYLES[cell.verdict]) for cell, width in zip(cells, widths, strict=True)]
    return [[piece for pair in padded for piece in ((" ", ""), pair)][1:]]


def _side_by_side(parts: list[list[list[Piece]]]) -> list[list[Piece]]:
    """The lines of a row of the table, of the lines of its blocks; what a block lacks is filled with spaces."""
    blank = [" " * sum(len(text) for text, _ in part[0]) for part in parts]
    lines = []
    for pieces in zip_longest(*parts):
        filled = [piece or [(blank[i], "")] for i, piece in enumerate(pieces)]
        lines.append([piece for part in filled for piece in ((_GAP, ""), *part)][1:])
    return lines


def _lines(lines: Sequence[Line]) -> Any:
    """Names beside their values, wrapped values indented."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", min_width=11)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row(_text([(line.name, "")]), _text([(line.text, _STYLES[line.verdict])]))
    return grid


def _text(pieces: Sequence[Piece]) -> Any:
    """Text with styles; no markup, since a file's name may look like it."""
    from rich.text import Text

    return Text.assemble(*pieces)
