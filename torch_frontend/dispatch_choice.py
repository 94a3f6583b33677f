"""Which dispatcher a layer gets: one answer on all ranks, though what each asks for and has installed may differ.

Each rank tells the others what it was asked for and what it can use, through the group's store, when a layer is set up.
Then all take the same, or all raise the same error, which names the ranks that differ or lack it. What ranks have
agreed on once, for a layer of the same sizes and settings, they do not tell one another again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moebius.core import dispatchers, preflight
from moebius.core.errors import BackendUnavailable, ConfigError, MoEError, Unsupported
from moebius.core.registry import Backend, Problem
from moebius.core.store import Members
from moebius.torch_frontend.dispatch import DISPATCHERS
from moebius.torch_frontend.dispatch_limits import Options, require
from moebius.torch_frontend.liveness import peers
from moebius.torch_frontend.preflight import exchange

_KINDS: dict[str, type[MoEError]] = {kind.__name__: kind for kind in (BackendUnavailable, ConfigError, Unsupported)}
_CHOOSES = "chooses the dispatcher of a layer"


def agreed(
    name: str | None, problem: Problem, options: Options, group: Any = None, combine_dtype: str | None = None
) -> Backend:
    """The row of DISPATCHERS that `name` means for all ranks of `group`, which can serve such a layer on each of them.

    The ranks exchange a small object, once for all layers of which the same is asked; all of them call. Where
    MOEBIUS_PREFLIGHT is "off" only those exchange it whose name is a library's or None.

    Args:
        name: of DISPATCHERS; None for the first of moebius.core.dispatchers.order that all ranks can use.
        options: of the layer. combine_dtype: see BackendConfig.
        group: the process group over which the experts are spread; None for one rank.
    Raises:
        ConfigError: no dispatcher of that name; or the ranks ask for different ones, or for different layers: the same
            error on every rank, which says which rank asks for what.
        BackendUnavailable, Unsupported: a rank cannot use it; on every rank, and says which rank and why.
        RankLost: a rank did not ask.
    """
    if group is None:
        return _served(name, problem, options, combine_dtype)
    here, asks = peers(group), _asks(name, problem, options, combine_dtype)
    # Without what this rank can use, which is the same next time, and may not be what decides on another.
    key = json.dumps([asks, problem.dtype, problem.device])
    if key not in here.chosen:
        own = {"asks": asks, **_can(name, problem, options, combine_dtype)}
        alone = preflight.timeout() is None and not _may_be_a_library(name)
        said = [own] if alone else exchange(_CHOOSES, own, group, f": {asks['dispatcher']}")
        here.chosen[key] = _answer(name, said, here.members)
    return DISPATCHERS[here.chosen[key]]


def candidates(
    problem: Problem, k: int, options: Options | None = None, combine_dtype: str | None = None
) -> tuple[dispatchers.Choice, ...]:
    """What None tries for `problem`, the best first, wherever their packages are installed.

    Args:
        k: routes of a token. options, combine_dtype: as in `agreed`; None for the usual ones.
    """
    asked = Options(problem.dim, problem.n_experts * problem.ranks, k) if options is None else options
    could = [name for name in DISPATCHERS.names if _could(name, problem, asked, combine_dtype)]
    return dispatchers.order(problem.ranks, k, available=could)


def _asks(name: str | None, problem: Problem, options: Options, combine_dtype: str | None) -> dict[str, Any]:
    """What this rank asks for: the others have to ask for the same."""
    asks = {
        "dispatcher": "not named" if name is None else name,
        "D": problem.dim,
        "E": options.n_experts,
        "K": options.k,
        "I": problem.inter_dim,
        "combine_dtype": combine_dtype,
        "max_tokens": options.max_tokens,
    }
    if _may_be_a_library(name):  # whose buffers all ranks make alike
        asks |= {"num_sms": options.num_sms, "share": options.share, "asynchronous": options.asynchronous}
    return asks


def _can(name: str | None, problem: Problem, options: Options, combine_dtype: str | None) -> dict[str, Any]:
    """Why this rank cannot use it, None where it can; of None what it can use, the best first."""
    if name is not None:
        return {"refusal": _refusal(name, problem, options, combine_dtype)}
    wanted = [choice.name for choice in candidates(problem, options.k, options, combine_dtype)]
    return {"usable": [each for each in wanted if _refusal(each, problem, options, combine_dtype) is None]}


def _answer(name: str | None, said: Sequence[Mapping[str, Any]], members: Members) -> str:
    """The name that all take."""
    differ = preflight.differing([one["asks"] for one in said], members)
    if differ:
        do = f"name the same dispatcher, for the same layer, on every {members.kind}"
        raise ConfigError(f"one dispatcher for a layer over {members.counted}", "; ".join(differ), do)
    if name is None:
        for each in said[0]["usable"]:
            if all(each in one["usable"] for one in said):
                return str(each)
        found = members.grouped([", ".join(one["usable"]) or "none" for one in said])
        raise Unsupported(f"a dispatcher that {members.counted} can use", found, "install the same on all of them")
    refused = [one["refusal"] for one in said]
    if any(refused):
        kind, asked, _, do = next(filter(None, refused))
        raise _KINDS[kind](asked, members.grouped([refusal and refusal[2] for refusal in refused]), do)
    return name


def _may_be_a_library(name: str | None) -> bool:
    return name is None or (name in DISPATCHERS.names and bool(DISPATCHERS[name].needs))


def _served(name: str | None, problem: Problem, options: Options, combine_dtype: str | None) -> Backend:
    """The row of that name, where it serves; raises why it does not."""
    row = DISPATCHERS.choose(name, problem)
    require(row.name, problem, options, combine_dtype)
    return row


def _refusal(name: str, problem: Problem, options: Options, combine_dtype: str | None) -> tuple[str, ...] | None:
    """Why this rank cannot use it: the error's kind and words."""
    try:
        _served(name, problem, options, combine_dtype)
    except MoEError as error:
        return (type(error).__name__, *error.args)
    return None


def _could(name: str, problem: Problem, options: Options, combine_dtype: str | None) -> bool:
    """Whether it serves, wherever its packages are installed."""
    if DISPATCHERS[name].supports(problem) is not None:
        return False
    try:
        require(name, problem, options, combine_dtype)
    except (ConfigError, Unsupported):
        return False
    return True
