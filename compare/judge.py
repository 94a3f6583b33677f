"""Answers against the reference: every stage and gradient, from the layer's input on and step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moebius.compare import walks
from moebius.compare.agreement import Choices
from moebius.compare.columns import Pair, Side
from moebius.compare.cores import at_once
from moebius.compare.elements import worst
from moebius.compare.noise.permute import Routes
from moebius.compare.problem import Problem
from moebius.compare.sides.answer import Answer
from moebius.compare.verdict import Agreement, Layer, Row
from moebius.core.errors import ConfigError
from moebius.core.folder import listed
from moebius.core.stages import GRADIENT


def judge(p: Problem, answers: Mapping[str, Answer], index: int = 0) -> Layer:
    """Hold every side against the reference, and the first side against every other that counts.

    Each side's reference takes that side's own experts, so that a token routed otherwise counts as routing and not as
    arithmetic, and the side's own placement of the routing weight.

    Args:
        p: what the sides were given. answers: by the sides' names, in the order of the columns.
        index: of the layer, for the report.
    Raises:
        ConfigError: a side's experts are out of range.
    """
    choices = Choices.of(p)
    sides = [_side(p, name, answer, choices) for name, answer in answers.items()]
    first, *others = sides
    pairs = [
        Pair(name=f"{first.name}~{other.name}", one=first, other=other)
        for other in others
        if first.answer.counts and other.answer.paired
    ]
    pieces: list[Any] = [partial(walks.whole, p, some, _inside(pairs, some)) for some in _together(sides, pairs)]
    pieces += [partial(walks.step, p, side) for side in sides if side.answer.traced]
    clamped, *_ = at_once(pieces)
    return Layer(
        index=index,
        sides=tuple(side.name for side in sides),
        columns=tuple(column.name for column in (*sides, *pairs)),
        routing=_routing(choices, sides, pairs),
        load=_load(choices, sides, p.config.n_routed_experts),
        rows=_rows(sides, pairs),
        clamped=clamped,
        worst=worst([*sides, *pairs], index),
        notes=tuple(note for side in sides for note in (*side.answer.notes, *_missing(side, p))),
        dropped={side.name: side.answer.dropped for side in sides if side.answer.dropped and side.answer.counts},
    )


def _routing(choices: Choices, sides: list[Side], pairs: list[Pair]) -> dict[str, Agreement]:
    """Column -> agreement on the experts, of those that show them."""
    found = {
        side.name: choices.agreement(side.ids_TK, choices.ids_TK, counts=side.answer.counts)
        for side in sides
        if side.answer.routed
    }
    return found | {
        pair.name: choices.agreement(pair.one.ids_TK, pair.other.ids_TK)
        for pair in pairs
        if pair.one.answer.routed and pair.other.answer.routed
    }


def _load(choices: Choices, sides: list[Side], n_experts: int) -> dict[str, tuple[int, ...]]:
    """Side -> tokens per expert."""
    found = {side.name: tuple(side.routes.sizes_e.tolist()) for side in sides if side.answer.routed}
    return found | {"reference": tuple(np.bincount(choices.ids_TK.ravel(), minlength=n_experts).tolist())}


def _inside(pairs: list[Pair], sides: list[Side]) -> list[Pair]:
    return [pair for pair in pairs if pair.one in sides]


def _side(p: Problem, name: str, answer: Answer, choices: Choices) -> Side:
    ids_TK = np.sort(choices.ids_TK, axis=-1).astype(np.int64)
    if answer.ids_TK is not None:
        ids_TK = np.ascontiguousarray(answer.ids_TK, np.int64)
        outside = np.flatnonzero(((ids_TK < 0) | (ids_TK >= p.config.n_routed_experts)).any(-1))
        if outside.size:
            raise ConfigError(
                f"experts 0 to {p.config.n_routed_experts - 1} of side {name!r}",
                f"{ids_TK[outside[0]].tolist()} at token {outside[0]}",
                "give every token as many experts of the layer as the config says",
            )
    else:
        unsettled = int((~choices.settled_T).sum())
        if unsettled:
            note = (
                f"{name} does not show its experts; for {unsettled} tokens rounding may choose others than the "
                "reference, so it is information only"
            )
            answer = replace(answer, counts=False, notes=(*answer.notes, note))
    after = p.config.apply_router_weight_after_down if answer.weight_after is None else answer.weight_after
    config = replace(p.config, apply_router_weight_after_down=after)
    routes = Routes.of(ids_TK, p.config.n_routed_experts)
    return Side(name=name, answer=answer, ids_TK=ids_TK, config=config, routes=routes)


def _missing(side: Side, p: Problem) -> list[str]:
    """What to note where a side that gives gradients leaves out those of some parameters."""
    names = [name for name in p.parameters if GRADIENT + name not in side.answer.tensors]
    if not names:
        return []
    if not any(name.startswith(GRADIENT) for name in side.answer.tensors):
        return [f"{side.name} gives no gradient: its backward pass is not compared"]
    return [f"{side.name} gives no gradient of {listed(names)}: not compared"]


def _together(sides: list[Side], pairs: list[Pair]) -> list[list[Side]]:
    """The sides whose walks go side by side: those in pairs, and those that share a reference. The first side first."""
    paired = [side for side in sides if side is sides[0] or any(side is pair.other for pair in pairs)]
    groups = [[side for side in sides if side in paired or side.reference in {one.reference for one in paired}]]
    for side in sides:
        if not any(side in group for group in groups):
            groups.append([other for other in sides if other.reference == side.reference])
    return groups


def _rows(sides: list[Side], pairs: list[Pair]) -> tuple[Row, ...]:
    """One row per name, in the order of the pass; gradients of parameters last."""
    names = list(dict.fromkeys(name for side in sides for name in side.whole))
    is_parameter = {name: name.startswith(GRADIENT) and "." in name.removeprefix(GRADIENT) for name in names}
    return tuple(
        Row(
            name=name,
            whole={part.name: part.whole[name].score() for part in (*sides, *pairs) if name in part.whole},
            step={side.name: side.step[name].score() for side in sides if name in side.step},
        )
        for name in sorted(names, key=lambda name: is_parameter[name])
    )
