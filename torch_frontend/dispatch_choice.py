"""Which dispatcher a layer gets: one answer on all ranks, though what is installed differs from rank to rank.

Each rank tells the others what it can use, once, when a layer is set up, through the group's store. Then all take the
same, or all raise the same error, which names the ranks that lack it.
"""

from __future__ import annotations

from typing import Any

from moebius.core import dispatchers
from moebius.core.errors import BackendUnavailable, MoEError, Unsupported
from moebius.core.registry import Backend, Problem
from moebius.torch_frontend.dispatch import DISPATCHERS
from moebius.torch_frontend.dispatch_limits import DTYPE, LIMITS, against
from moebius.torch_frontend.preflight import exchange

_KINDS: dict[str, type[MoEError]] = {kind.__name__: kind for kind in (BackendUnavailable, Unsupported)}


def agreed(name: str | None, problem: Problem, k: int, group: Any = None, combine_dtype: str | None = None) -> Backend:
    """The row of DISPATCHERS that `name` means for all ranks of `group`.

    The ranks exchange a small object, where a library could be meant; all of them call.

    Args:
        name: of DISPATCHERS; None for the first of moebius.core.dispatchers.order that all ranks can use.
        k: routes of a token. group: the process group over which the experts are spread; None for one rank.
        combine_dtype: see BackendConfig.
    Raises:
        ConfigError: no dispatcher of that name.
        BackendUnavailable, Unsupported: a rank cannot use it; on every rank, and says which rank and why.
        RankLost: a rank did not ask.
    """
    if group is not None and name is None:
        return _first(problem, k, group, combine_dtype)
    if group is None or name not in DISPATCHERS.names or not DISPATCHERS[name].needs:
        return DISPATCHERS.choose(name, problem)
    failed = {rank: error for rank, error in enumerate(exchange(_refusal(name, problem), group)) if error is not None}
    if failed:
        kind, asked, _, do = next(iter(failed.values()))
        raise _KINDS[kind](asked, _words({rank: error[2] for rank, error in failed.items()}), do)
    return DISPATCHERS[name]


def _refusal(name: str, problem: Problem) -> tuple[str, ...] | None:
    """Why this rank cannot use it: the error's kind and words."""
    try:
        DISPATCHERS.choose(name, problem)
    except MoEError as error:
        return (type(error).__name__, *error.args)
    return None


def candidates(problem: Problem, k: int, combine_dtype: str | None = None) -> tuple[dispatchers.Choice, ...]:
    """What None tries for `problem`, the best first, wherever their packages are installed."""
    could = [name for name in DISPATCHERS.names if _serves(name, problem, k, combine_dtype)]
    return dispatchers.order(problem.ranks, k, available=could)


def _first(problem: Problem, k: int, group: Any, combine_dtype: str | None) -> Backend:
    wanted = [choice.name for choice in candidates(problem, k, combine_dtype)]
    here = {name for name in wanted if _refusal(name, problem) is None}
    # A library that this rank lacks another may have: where one could serve, all ranks ask.
    if any(DISPATCHERS[name].needs for name in wanted):
        here = set.intersection(*map(set, exchange(sorted(here), group)))
    for name in wanted:
        if name in here:
            return DISPATCHERS[name]
    return DISPATCHERS.choose(None, problem)  # which says why of each


def _serves(name: str, problem: Problem, k: int, combine_dtype: str | None) -> bool:
    if DISPATCHERS[name].supports(problem) is not None:
        return False
    return name not in LIMITS or (against(name, problem, k) is None and combine_dtype in (None, DTYPE))


def _words(said: dict[int, str]) -> str:
    """Each thing that ranks said, with the ranks that said it."""
    by_text: dict[str, list[str]] = {}
    for rank, text in said.items():
        by_text.setdefault(text, []).append(str(rank))
    return "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in by_text.items())
