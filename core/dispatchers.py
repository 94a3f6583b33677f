"""Which dispatcher None means: the names to try in order, by ranks and routes, one rule for both frontends.

Under even routing a token has a route to a given one of R ranks with the probability 1 - (1 - 1/R)^K: that share of the
tokens travels where each goes once to every rank that wants it, all of them where every rank gathers all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Those that send a token once to each rank that wants it, fastest first. Names that are not here are never chosen.
_ONCE_A_RANK = ("deepep", "alltoall")
_ALL_TO_EVERY_RANK = "allgather"
# Of a rank's tokens, from which on counting those that travel is not worth its message and its wait.
_NEARLY_ALL = 0.9


class Choice(NamedTuple):
    """A dispatcher to try.

    Attributes:
        name: one of moebius.core.config.DISPATCHERS. why: why it has this place, in a sentence.
    """

    name: str
    why: str


def share(ranks: int, k: int) -> float:
    """Of the tokens, those with a route to a given rank, under even routing over many experts."""
    return float(1 - (1 - 1 / ranks) ** k)


def routed_share(arrives: str, ranks: int, k: int) -> float:
    """Of the slots that a dispatcher hands over, those that are routes of the experts held there, under even routing.

    Args:
        arrives: "tokens" of all ranks, those "wanted" (with a route there), or "routes" alone.

    >>> routed_share("tokens", 8, 8), round(routed_share("wanted", 8, 8), 3), routed_share("routes", 8, 8)
    (0.125, 0.19, 1.0)
    """
    return {"tokens": 1 / ranks, "wanted": 1 / ranks / share(ranks, max(k, 1)), "routes": 1.0}[arrives]


def order(ranks: int, k: int, *, available: Sequence[str]) -> tuple[Choice, ...]:
    """The dispatchers to try, the best first.

    Args:
        ranks: R, that share the experts. k: K, routes of a token.
        available: names that can serve here, in any order.
    Returns:
        Those of `available` that may be chosen; empty where none may.
    """
    if ranks == 1:
        return tuple(Choice(name, "one rank: nothing moves") for name in ("local",) if name in available)
    part = f"{share(ranks, k):.0%} of the tokens have a route to a given one of {ranks} ranks"
    once = [Choice(name, f"{part}: only those travel") for name in _ONCE_A_RANK]
    if share(ranks, k) >= _NEARLY_ALL:
        every = Choice(_ALL_TO_EVERY_RANK, f"{part}: nearly all would travel anyway, and nobody has to count them")
        choices = [every, *once]
    else:
        choices = [*once, Choice(_ALL_TO_EVERY_RANK, f"{part}, and nothing that sends those alone is available")]
    return tuple(choice for choice in choices if choice.name in available)
