"""The elements that are farthest off, with the token and the expert that each belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moebius.compare.columns import Column, Pair, Side
from moebius.compare.noise.permute import Routes
from moebius.compare.score import Kept
from moebius.compare.verdict import Element
from moebius.core.stages import GRADIENT, INPUT, STAGES

_AXES = {stage.name: stage.axes for stage in STAGES}


def worst(columns: Sequence[Column], layer: int) -> tuple[Element, ...]:
    """What the tallies kept, by falling |z|."""
    found = []
    for column in columns:
        for is_step, tallies in ((False, column.whole), (True, column.step)):
            for name, tally in tallies.items():
                found += [_element(name, column, is_step, kept, layer) for kept in tally.kept]
    return tuple(sorted(found, key=lambda element: -abs(element.z)))


def _element(name: str, column: Column, is_step: bool, kept: Kept, layer: int) -> Element:
    side = column.one if isinstance(column, Pair) else column
    assert isinstance(side, Side)
    shape, offset = side.answer.shape(name), 0
    if kept.index:
        number, slab = kept.index
        offset = (number * shape[1] + slab.start) * shape[2]
    index = tuple(int(i) for i in np.unravel_index(offset + kept.position, shape))
    token, expert = _place(name.removeprefix(GRADIENT), index, side.routes, side.ids_TK)
    return Element(
        row=name,
        column=column.name,
        step=is_step,
        layer=layer,
        index=index,
        token=token,
        expert=expert,
        found=kept.found,
        due=kept.due,
        noise=kept.noise,
        z=kept.z,
    )


def _place(name: str, index: tuple[int, ...], routes: Routes, ids_TK: np.ndarray) -> tuple[int | None, int | None]:
    """(token, expert) that an element belongs to."""
    if _AXES.get(name, "").startswith("R"):
        return int(routes.tokens_R[index[0]]), int(routes.experts_R[index[0]])
    if name == "logits":
        return index[0], index[1]
    if name == "weights":
        return index[0], int(ids_TK[index])
    if name.startswith(("experts.", "gate.")):
        return None, index[0]
    return (index[0], None) if name in _AXES or name == INPUT else (None, None)
