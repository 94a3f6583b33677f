"""How the sides look in every panel of a figure, and how numbers are drawn that have no place on an axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moebius.compare import verdict as v
from moebius.compare.sheet import INFORMATION, counts

# Okabe and Ito's colours, which the colour-blind tell apart; each side has a marker of its own besides.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "D", "^", "v", "P")
GREY, EXPLAINED, WARNED = "#666666", "#DCE9F5", "#FBE8B0"
SPREAD = 0.66  # of the distance between two rows, taken by the sides
SMALL = 8.5
_SIZE = 5.5
Pair = tuple[float, float]  # place, value


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How a side is drawn; `shift` and `width` give it a place of its own beside the others."""

    label: str
    color: str
    marker: str
    shift: float
    width: float


def looks(layers: Sequence[v.Layer], sides: Sequence[str]) -> dict[str, Look]:
    """A look per side; those for information say so."""
    found = {}
    for i, side in enumerate(sides):
        counted = any(counts(layer, side) for layer in layers)
        found[side] = Look(
            label=side if counted else f"{side}{INFORMATION} (information only)",
            color=_COLORS[i % len(_COLORS)],
            marker=_MARKERS[i % len(_MARKERS)],
            shift=SPREAD * ((i + 0.5) / len(sides) - 0.5),
            width=SPREAD / len(sides),
        )
    return found


def points(ax: Any, places: Sequence[float], values: Sequence[float], look: Look, **how: Any) -> None:
    """Markers at values of a logarithmic axis y; zero stands at its lower edge, what is not finite at its upper.

    Args:
        how: of Axes.plot; `sideways=True` puts the values on x.
    """
    sideways = how.pop("sideways", False)
    how = {"color": look.color, "ls": "", "ms": _SIZE, "marker": look.marker, "zorder": 3} | how
    kinds: Mapping[str, list[Pair]] = {"inside": [], "zero": [], "off": []}
    for place, value in zip(places, values, strict=True):
        kinds["inside" if 0 < value < math.inf else "zero" if value == 0 else "off"].append((place, value))
    _plot(ax, kinds["inside"], sideways, ax.transData, how)
    edge = ax.get_yaxis_transform() if sideways else ax.get_xaxis_transform()
    outside = how | {"clip_on": False}
    _plot(ax, [(place, 0.0) for place, _ in kinds["zero"]], sideways, edge, outside | {"mfc": "white"})
    _plot(ax, [(place, 1.0) for place, _ in kinds["off"]], sideways, edge, outside | {"marker": "X", "ms": 9})


def _plot(
    ax: Any, pairs: Sequence[tuple[float, float]], sideways: bool, transform: Any, how: Mapping[str, Any]
) -> None:
    if pairs:
        places, values = zip(*pairs, strict=True)
        xy = (values, places) if sideways else (places, values)
        ax.plot(*xy, **how, **({} if transform is None else {"transform": transform}))


def handle(**how: Any) -> Any:
    """A legend's line or marker."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **how)


def patch(**how: Any) -> Any:
    """A legend's patch."""
    from matplotlib.patches import Patch

    return Patch(**how)


def span(values: Sequence[float], least: tuple[float, float]) -> tuple[float, float]:
    """Limits of a logarithmic axis that holds all positive finite values, and at least the range `least`."""
    finite = [value for value in values if 0 < value < math.inf]
    return min([least[0], *(value / 2 for value in finite)]), max([least[1], *(value * 2 for value in finite)])
