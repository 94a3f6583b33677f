"""What the ranks of a group tell one another through a key-value store, and how they are named.

A store may be gone, when the rank that hosts it is, or may answer no more. So nothing here waits for one without a
deadline: whoever needs a store asks it in a thread of its own.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from moebius.core.errors import ConfigError

R = TypeVar("R")


@runtime_checkable
class Store(Protocol):
    """Text by key, alike for all ranks of a group; both methods raise whatever a store raises that is gone."""

    def set(self, key: str, value: str) -> None:
        """Write, over what was there."""
        ...

    def get(self, key: str) -> str | None:
        """Read without waiting; None where nothing was written."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """The ranks of a group.

    Attributes:
        ranks: the global rank of each place in the group. place: this process's.
        host: the global rank whose process hosts the store; None where none of the ranks does.
        kind: what errors call one of them.
    """

    ranks: tuple[int, ...]
    place: int
    host: int | None = None
    kind: str = "rank"

    @property
    def counted(self) -> str:
        """ "4 ranks"."""
        return f"{len(self.ranks)} {self.kind}{'es' if self.kind.endswith('s') else 's'}"

    @property
    def others(self) -> tuple[int, ...]:
        """The places of all but this process."""
        return tuple(place for place in range(len(self.ranks)) if place != self.place)

    def named(self, places: Iterable[int]) -> str:
        """ "rank 3, rank 5"; of a part of all ranks "rank 6 (2 in its group)"."""
        return ", ".join(self._name(place) for place in places)

    def grouped(self, said: Sequence[str | None]) -> str:
        """What each place says, in order, with the names of all that say it; None says nothing."""
        by_text: dict[str, list[int]] = {}
        for place, text in enumerate(said):
            if text is not None:
                by_text.setdefault(text, []).append(place)
        return "; ".join(f"{self.named(places)}: {text}" for text, places in by_text.items())

    def _name(self, place: int) -> str:
        rank = self.ranks[place]
        # Of the group of all ranks, places and ranks are one.
        one = f"{self.kind} {rank}"
        return one if self.ranks == tuple(range(len(self.ranks))) else f"{one} ({place} in its group)"


def seconds(name: str, default: float) -> float | None:
    """The environment's `name`: a number of seconds, `default` where it is not set, None where it is "off".

    Raises:
        ConfigError: it holds neither a positive number nor "off".
    """
    text = os.environ.get(name, "")
    if text == "off":
        return None
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"the environment's {name}={text!r}", "neither seconds nor 'off'", "use e.g. 60, or off")
    return value


def within(limit: float, function: Callable[[], R]) -> R:
    """function() in a thread of its own.

    Raises:
        TimeoutError: it took longer than `limit` seconds; the thread is left behind and keeps no process alive.
    """
    found: list[R] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            found.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, name="moebius-store", daemon=True)
    thread.start()
    thread.join(limit)
    if raised:
        raise raised[0]
    if not found:
        raise TimeoutError(f"no answer within {limit:g} s")
    return found[0]
