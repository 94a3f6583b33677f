"""What every view of a report shows: cells of text, each with its verdict, before a table or a page draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from moebius.compare import verdict as v
from moebius.core.stages import GRADIENT, OUTPUT

INFORMATION = "*"
ABSENT = "-"
MARKS = {v.PASS: "pass", v.WARN: "warn", v.FAIL: "FAIL"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Some text; its verdict is "" where none counts."""

    text: str
    verdict: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Columns that stand together under one head. `rows` hold a cell per name; numbers stand on the right."""

    head: str
    names: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: bool = True

    @property
    def counts(self) -> bool:
        """Whether any cell has a verdict."""
        return any(cell.verdict for row in self.rows for cell in row)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """A table: the block that names the rows, then blocks that may be spread over several tables.

    `marked`: each row ends with the severest verdict of its cells.
    """

    lead: Block
    blocks: tuple[Block, ...]
    marked: bool = True


def plain(text: object) -> str:
    """Text of which every character can be printed: a file's name may hold any."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def row_name(name: str) -> str:
    """
    >>> row_name("up"), row_name("grad.experts.down_projs")
    ('up', 'gradient of down_projs')
    """
    if not name.startswith(GRADIENT):
        return name
    return f"gradient of {name.removeprefix(GRADIENT).removeprefix('experts.')}"


def fault_text(fault: str) -> str:
    """A fault of `Layer.faults` with its row's readable name."""
    name, comma, rest = fault.partition(",")
    return plain(f"{row_name(name)}{comma}{rest}")


def number(value: float | None) -> str:
    """A z in at most five characters; "-" of None.

    >>> number(0.7355), number(12.34), number(812.0), number(31234.0), number(float("inf"))
    ('0.74', '12.3', '812', '3e+04', 'inf')
    """
    if value is None:
        return ABSENT
    if not math.isfinite(value) or abs(value) >= 999.5:
        return f"{value:.0e}"
    if value == 0:
        return "0"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def share(value: float) -> str:
    """A share in at most five characters; only all is 100 % and only none is 0 %.

    >>> share(1.0), share(0.99999), share(0.5), share(1e-6), share(0.0)
    ('100%', '99.9%', '50.0%', '<0.1%', '0%')
    """
    if not 0.0 < value < 1.0:
        return f"{value:.0%}"
    return f"{math.floor(1000 * value) / 10:.1f}%" if value >= 0.001 else "<0.1%"


def counts(layer: v.Layer, column: str) -> bool:
    """Whether any of a column's scores counts in the verdict."""
    scores = [scores.get(column) for row in layer.rows for scores in (row.whole, row.step)]
    return any(found is not None and found.counts for found in (*scores, layer.routing.get(column)))


def head(layer: v.Layer, column: str) -> str:
    """A column's name, marked where it is for information only."""
    return column if counts(layer, column) else f"{column}{INFORMATION}"


def is_gradient(row: v.Row) -> bool:
    """Whether the row is of the backward pass."""
    return row.name.startswith(GRADIENT)


def all_sides(layers: Sequence[v.Layer]) -> tuple[str, ...]:
    """The sides of any layer, in order."""
    return tuple(dict.fromkeys(side for layer in layers for side in layer.sides))


def stage_sheet(layer: v.Layer) -> Sheet:
    """A row per stage and gradient; per side z_rms, z_max and the z_rms of the step alone, per pair z_rms and share
    of equal elements."""
    names = tuple((Cell(text=row_name(row.name)),) for row in layer.rows)
    blocks = [_side(layer, c) if c in layer.sides else _pair(layer, c) for c in layer.columns]
    return Sheet(lead=Block(head="", names=("stage",), rows=names, numbers=False), blocks=tuple(blocks))


def routing_sheet(layer: v.Layer) -> Sheet:
    """A row per column: tokens with equal experts, ties, and differences that no rounding explains."""
    found = [(column, layer.routing[column]) for column in layer.columns if column in layer.routing]
    lead = tuple((Cell(text=head(layer, column)),) for column, _ in found)
    rows = []
    for _, a in found:
        verdict = a.verdict if a.counts else ""
        last = Cell(text=str(a.unexplained), verdict=verdict)
        rows.append((Cell(text=str(a.tokens)), Cell(text=str(a.equal)), Cell(text=str(a.ties)), last))
    names = ("tokens", "same experts", "ties", "unexplained")
    return Sheet(
        lead=Block(head="", names=("routing",), rows=lead, numbers=False),
        blocks=(Block(head="", names=names, rows=tuple(rows)),),
    )


def layer_sheet(layers: Sequence[v.Layer]) -> Sheet:
    """A row per layer: the worst of its routing, stages and gradients, and its output's relative error per side."""
    verdicts = [layer.verdict for layer in layers]
    lead = tuple(
        (Cell(text=str(layer.index)), Cell(text=MARKS[verdict], verdict=verdict))
        for layer, verdict in zip(layers, verdicts, strict=True)
    )
    routing = Block(head="", names=("routing",), rows=tuple((_worst_routing(layer),) for layer in layers))
    blocks = [routing, *(_side_of_layers(layers, side) for side in all_sides(layers))]
    if any(layer.faults for layer in layers):
        faults = [fault_text(layer.faults[0]) if layer.faults else ABSENT for layer in layers]
        rows = tuple((Cell(text=fault),) for fault in faults)
        blocks.append(Block(head="", names=("first fault",), rows=rows, numbers=False))
    return Sheet(lead=Block(head="", names=("layer", ""), rows=lead), blocks=tuple(blocks), marked=False)


def worst_sheet(elements: Iterable[v.Element]) -> Sheet:
    """A row per element: where it is, what was found, what was due, the deviation that rounding explains, and z."""
    elements = tuple(elements)
    many = len({e.layer for e in elements}) > 1
    where = tuple((Cell(text=(f"layer {e.layer}, " if many else "") + _where(e)),) for e in elements)
    names = ("z", "found", "due", "noise", "index", "token", "expert")
    rows = []
    for e in elements:
        verdict = v.PASS if abs(e.z) <= v.FAIL_MAX else v.FAIL
        index = ", ".join(map(str, e.index))
        numbers = (number(e.z), f"{e.found:.9g}", f"{e.due:.9g}", f"{e.noise:.1e}", f"({index})")
        owners = tuple(ABSENT if owner is None else str(owner) for owner in (e.token, e.expert))
        first, *rest = (*numbers, *owners)
        rows.append((Cell(text=first, verdict=verdict), *(Cell(text=text) for text in rest)))
    return Sheet(
        lead=Block(head="", names=("element of",), rows=where, numbers=False),
        blocks=(Block(head="", names=names, rows=tuple(rows)),),
        marked=False,
    )


def _where(e: v.Element) -> str:
    return plain(f"{row_name(e.row)}, {e.column}{', step' if e.step else ''}")


def _side(layer: v.Layer, side: str) -> Block:
    stepped = any(side in row.step for row in layer.rows)
    rows = []
    for row in layer.rows:
        cells = _z_cells(row.whole.get(side))
        rows.append((*cells, _rms_cell(row.step.get(side))) if stepped else cells)
    names = ("z_rms", "z_max", "step") if stepped else ("z_rms", "z_max")
    return Block(head=head(layer, side), names=names, rows=tuple(rows))


def _pair(layer: v.Layer, pair: str) -> Block:
    rows = []
    for row in layer.rows:
        score = row.whole.get(pair)
        equal = Cell(text=ABSENT if score is None else share(score.equal))
        rows.append((_rms_cell(score), equal))
    return Block(head=head(layer, pair), names=("z_rms", "equal"), rows=tuple(rows))


def _z_cells(score: v.Score | None) -> tuple[Cell, Cell]:
    """z_rms and z_max, each with its own part of the verdict; "bad" for both where elements are: they have no z."""
    if score is None:
        return Cell(text=ABSENT), Cell(text=ABSENT)
    verdict = score.verdict if score.counts else ""
    if score.bad:
        return Cell(text="bad", verdict=verdict), Cell(text="bad", verdict=verdict)
    # Either limit alone makes a failure: the number that is within its own is not to blame.
    rms = replace(score, z_max=0.0).verdict if verdict else ""
    largest = replace(score, z_rms=0.0).verdict if verdict else ""
    return Cell(text=number(score.z_rms), verdict=rms), Cell(text=number(score.z_max), verdict=largest)


def _rms_cell(score: v.Score | None) -> Cell:
    """z_rms with the whole verdict, where z_max is not shown."""
    return (
        _z_cells(score)[0] if score is None or not score.counts else replace(_z_cells(score)[0], verdict=score.verdict)
    )


def _worst_routing(layer: v.Layer) -> Cell:
    """The lowest share of tokens with equal experts or a tie, among what counts."""
    counted = [a for a in layer.routing.values() if a.counts]
    if not counted:
        return Cell(text=ABSENT)
    worst = min((a.equal + a.ties) / a.tokens if a.tokens else 0.0 for a in counted)
    return Cell(text=share(worst), verdict=v.worst_of([a.verdict for a in counted]))


def _side_of_layers(layers: Sequence[v.Layer], side: str) -> Block:
    rows = []
    for layer in layers:
        forward = [row.whole[side] for row in layer.rows if side in row.whole and not is_gradient(row)]
        backward = [row.whole[side] for row in layer.rows if side in row.whole and is_gradient(row)]
        cells = [_extreme(forward, lambda s: s.z_rms), _extreme(forward, lambda s: s.z_max)]
        outputs = [row.whole[side].relative for row in layer.rows if row.name == OUTPUT and side in row.whole]
        last = Cell(text=f"{outputs[0]:.1e}" if outputs else ABSENT)
        rows.append((*cells, _extreme(backward, lambda s: s.z_rms), last))
    head = side if any(counts(layer, side) for layer in layers) else f"{side}{INFORMATION}"
    return Block(head=head, names=("z_rms", "z_max", "grad.", "output"), rows=tuple(rows))


def _extreme(scores: list[v.Score], of: Callable[[v.Score], float]) -> Cell:
    """The largest of some scores; "bad" where any has bad elements."""
    if not scores:
        return Cell(text=ABSENT)
    values = [math.inf if math.isnan(of(score)) else of(score) for score in scores]
    verdict = v.worst_of([score.verdict for score in scores if score.counts]) if any(s.counts for s in scores) else ""
    return Cell(text="bad" if any(score.bad for score in scores) else number(max(values)), verdict=verdict)
