"""A report as one HTML page that needs nothing else, and as a fragment for a notebook."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from moebius.compare import verdict as v
from moebius.compare.lines import Line, footer, header
from moebius.compare.plot import image
from moebius.compare.sheet import MARKS, Cell, Sheet, layer_sheet, plain, routing_sheet, stage_sheet, worst_sheet

if TYPE_CHECKING:
    from moebius.compare.result import Report

_DPI = 150
_WORST = 20  # elements shown of one layer
# Colours that stand out on white and on black; everything else is the reader's own.
_STYLE = """
.moebius { font: 14px/1.45 system-ui, sans-serif; }
.moebius .wide { overflow-x: auto; margin: 1em 0; }
.moebius table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.moebius th, .moebius td { padding: .15em .6em; text-align: right; white-space: nowrap; }
.moebius thead tr:last-child th { border-bottom: 1px solid #888; }
.moebius .first { border-left: 1px solid #8886; }
.moebius .words { text-align: left; }
.moebius tbody tr:hover { background: #8882; }
.moebius dl { display: grid; grid-template-columns: max-content 1fr; gap: .1em 1em; }
.moebius dt { font-weight: bold; }
.moebius dd { margin: 0; overflow-wrap: anywhere; }
.moebius img { width: 100%; max-width: 1200px; background: white; }
.moebius .warn, .moebius .fail, .moebius b.pass { color: #fff; border-radius: .2em; }
.moebius b { padding: 0 .4em; }
.moebius b.pass { background: #1b7f3b; }
.moebius .warn { background: #9a6200; }
.moebius .fail { background: #b3261e; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>body {{ max-width: 1200px; margin: 2em auto; padding: 0 1em; }}{style}</style>
</head>
<body class="moebius">
<h1>{title} {badge}</h1>
{body}
</body>
</html>
"""


def page(report: Report) -> str:
    """A page with the figure, every table, the worst elements, faults and versions; it loads nothing.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    title = f"Numerics of {plain(report.checkpoint)}"
    figure = b64encode(image(report, "png", _DPI)).decode("ascii")
    many = len(report.layers) != 1
    body = [
        _lines(header(report)),
        f'<img alt="Errors, distribution of z, routing and gradients." src="data:image/png;base64,{figure}">',
        *([_table(layer_sheet(report.layers))] if many else []),
        _lines(footer(report)),
        *(_layer(layer, folded=many) for layer in report.layers),
    ]
    return _PAGE.format(title=escape(title), style=_STYLE, badge=_badge(report.verdict), body="\n".join(body))


def fragment(report: Report) -> str:
    """Verdict, faults and tables without the figure: what a notebook shows of a report."""
    one = report.layers[0] if len(report.layers) == 1 else None
    sheets = [layer_sheet(report.layers)] if one is None else [routing_sheet(one), stage_sheet(one)]
    lines = (*header(report), *footer(report))
    return "\n".join(
        [
            f'<div class="moebius"><style>{_STYLE}</style>',
            f"<p>{escape(plain(report.checkpoint))} {_badge(report.verdict)}</p>",
            *map(_table, sheets),
            _lines([line for line in lines if line.verdict or line.name in ("input", "*", "note", "z", "columns")]),
            "</div>",
        ]
    )


def _layer(layer: v.Layer, folded: bool) -> str:
    """Tables of one layer, to be unfolded where there are many."""
    worst = sorted(layer.worst, key=lambda element: -abs(element.z))[:_WORST]
    name = f"Layer {layer.index} {_badge(layer.verdict)}"
    body = "\n".join([_table(routing_sheet(layer)), _table(stage_sheet(layer))])
    elements = f"<h3>Elements that are furthest off</h3>\n{_table(worst_sheet(worst))}" if worst else ""
    if folded:
        return f"<details><summary>{name}</summary>\n{body}\n{elements}\n</details>"
    return f"<section>\n<h2>{name}</h2>\n{body}\n{elements}\n</section>"


def _table(sheet: Sheet) -> str:
    shown = (sheet.lead, *sheet.blocks)
    marked = sheet.marked and any(block.counts for block in sheet.blocks)
    heads = "".join(f'<th class="first" colspan="{len(b.names)}">{escape(b.head)}</th>' for b in shown)
    names = "".join(_cells([Cell(text=name) for name in b.names], b.numbers, "th") for b in shown)
    rows = [f"<tr>{heads}{'<th></th>' * marked}</tr>"] if any(block.head for block in shown) else []
    rows.append(f"<tr>{names}{'<th></th>' * marked}</tr>")
    body = []
    for i in range(len(sheet.lead.rows)):
        cells = "".join(_cells(block.rows[i], block.numbers, "td") for block in shown)
        verdicts = [cell.verdict for block in sheet.blocks for cell in block.rows[i] if cell.verdict]
        mark = f"<td>{_badge(v.worst_of(verdicts)) if verdicts else ''}</td>" if marked else ""
        body.append(f"<tr>{cells}{mark}</tr>")
    head, foot = "\n".join(rows), "\n".join(body)
    return f'<div class="wide"><table>\n<thead>\n{head}\n</thead>\n<tbody>\n{foot}\n</tbody>\n</table></div>'


def _cells(cells: Sequence[Cell], numbers: bool, tag: str) -> str:
    made = []
    for i, cell in enumerate(cells):
        classes = ["first"] * (i == 0) + ["words"] * (not numbers) + ([cell.verdict] if cell.verdict else [])
        made.append(f'<{tag} class="{" ".join(classes)}">{escape(cell.text)}</{tag}>')
    return "".join(made)


def _lines(lines: Sequence[Line]) -> str:
    rows = [f"<dt>{_named(line)}</dt><dd>{escape(line.text)}</dd>" for line in lines]
    return "<dl>\n" + "\n".join(rows) + "\n</dl>"


def _named(line: Line) -> str:
    return f'<b class="{line.verdict}">{escape(line.name)}</b>' if line.verdict else escape(line.name)


def _badge(verdict: str) -> str:
    return f'<b class="{verdict}">{MARKS[verdict]}</b>'
