"""Who computes: each kind of side turns a Problem into an Answer. One file a kind.

A side is written `kind`, `kind:backend`, `kind@device` or `kind:backend@device`: "torch:grouped_mm@cuda".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from moebius.compare.problem import Problem
from moebius.compare.sides.answer import Answer, Desk, shape_of
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError, MoEError, ShapeError, Unsupported

# kind -> the module with its `run(problem, desk, side)` and, where a backend or device can be named, its `check(side,
# config, dtype)`, which refuses what cannot be used; transformers' block runs where the model is loaded.
KINDS = {
    "torch": "torch_side",
    "flax": "flax_side",
    "transformers": "transformers_side",
    "reference": "reference_side",
    "automodel": "automodel_side",
}
TRANSFORMERS = "transformers"
FRONTENDS = ("torch", "flax")
DEFAULT = (*FRONTENDS, TRANSFORMERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side as a user named it.

    Attributes:
        name: of the column. kind: key of KINDS, or "callable". backend, device: None for the kind's own choice.
        call: what a callable side calls.
    """

    name: str
    kind: str
    backend: str | None = None
    device: str | None = None
    call: Any = None


def parse(sides: Sequence[str] | Mapping[str, Any] | str) -> list[Side]:
    """The sides that a user asked for.

    Args:
        sides: names as above; or a mapping of a column's name to such a name or to a callable (see
            callable_side.run), added to torch and flax where it holds callables alone.
    Raises:
        ConfigError: an unknown kind, a name twice or misleading, or nothing to compare.
    """
    if isinstance(sides, str):
        sides = [sides]
    if isinstance(sides, Mapping):
        parsed = [_named(str(name), what) for name, what in sides.items()]
        if parsed and all(side.kind == "callable" for side in parsed):
            parsed = [_parsed(name) for name in FRONTENDS] + parsed
    elif isinstance(sides, Iterable):
        parsed = [_parsed(name) for name in sides]
    else:
        raise ConfigError("sides to compare", f"a {type(sides).__name__}", _DO)
    names = [side.name for side in parsed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ConfigError("sides to compare", f"{', '.join(twice)} twice" if twice else "none", "name each side once")
    return parsed


def check(sides: Sequence[Side], config: MoEConfig, dtype: str) -> None:
    """Refuse, before anything runs, a backend or device that was named and cannot be used.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: says why.
    """
    for side in sides:
        home = _home(side)
        if hasattr(home, "check"):
            home.check(side, config, dtype)


def run(p: Problem, side: Side, desk: Desk) -> Answer:
    """What a side computes of a problem; named backends and devices are used or refused.

    Raises:
        ShapeError, ConfigError: it holds another layer than the problem's. Unsupported: it failed.
    """
    started = time.perf_counter()
    runner: Callable[[Problem, Desk, Side], Answer] = _home(side).run
    try:
        answer = runner(p, desk, side)
    except MoEError:
        raise
    except Exception as error:  # of a framework, out of memory among them
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        do = "leave the side out; where memory ran out, ask for fewer tokens"
        raise Unsupported(f"side {side.name!r} on {p.tokens} tokens in {p.dtype}", words, do) from error
    _require_same_layer(p, side, answer)
    return replace(answer, seconds=time.perf_counter() - started)


def _home(side: Side) -> Any:
    return import_module(f"moebius.compare.sides.{KINDS.get(side.kind, 'callable_side')}")


def _require_same_layer(p: Problem, side: Side, answer: Answer) -> None:
    """Every tensor is one that the problem's layer has, in its shape."""
    shapes = {name: answer.shape(name) for name in answer.tensors}
    if answer.ids_TK is not None:
        shapes["ids"] = answer.ids_TK.shape
    for name, shape in shapes.items():
        due = shape_of(name, p)
        if due is None:
            raise ConfigError(f"the tensors of this layer from side {side.name!r}", f"also {name!r}", _SAME)
        if shape != due:
            raise ShapeError(f"{name!r} of side {side.name!r} of shape {due}", f"shape {shape}", _SAME)


_DO = "name them, e.g. ['torch', 'flax:ragged_dot'], or map names of columns to such names or to callables"
_SAME = "give every side the same layer: sizes, experts per token, biases"


def _named(name: str, what: Any) -> Side:
    if not name or "~" in name or name != name.strip():
        found = "no name, blanks around it, or '~', which joins the names of a pair"
        raise ConfigError(f"a side named {name!r}", found, "rename it")
    if isinstance(what, str):
        side = replace(_parsed(what), name=name)
    elif callable(what):
        side = Side(name=name, kind="callable", call=what)
    else:
        found = f"a {type(what).__name__}"
        raise ConfigError(f"side {name!r}", found, "give a name such as 'torch:loop', or something to call")
    kind = name.partition("@")[0].partition(":")[0]
    if kind in KINDS and kind != side.kind:
        raise ConfigError(f"a {side.kind} side named {name!r}", "a side of moebius' own with that name", "rename it")
    return side


def _parsed(text: Any) -> Side:
    if not isinstance(text, str):
        raise ConfigError("a side's name", f"a {type(text).__name__}", _DO)
    body, at, device = text.partition("@")
    kind, colon, backend = body.partition(":")
    if kind not in KINDS or (at and not device) or (colon and not backend):
        raise ConfigError(f"side {text!r}", f"the kinds {tuple(KINDS)}", "write kind, kind:backend or kind@device")
    if kind not in ("torch", "flax", "automodel") and (backend or device):
        raise ConfigError(f"side {text!r}", f"{kind} has neither backends nor devices", f"write {kind}")
    return Side(name=text, kind=kind, backend=backend or None, device=device or None)
