"""What a rank has read of the others' heartbeats: who lives, who has left, who is missing, and all of it in words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from moebius.core.store import Members, Store

# A rank is missing whose heartbeats have ended for so many of them.
MARGIN = 3


class Position(NamedTuple):
    """Where a rank is: its latest collective.

    Attributes:
        layer: its qualified name or its number. step: forward passes it has begun; None where nobody counts.
        phase: "forward", "backward" or "recomputation".
    """

    layer: str
    step: int | None
    phase: str

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}, "
        return f"layer {self.layer}, {step}{self.phase}"


class Beat(NamedTuple):
    """A heartbeat.

    Attributes:
        number: of its rank, counted from 1. at: its latest collective. inside: it has not returned.
        missing: the places that its rank has found missing; None while it has found nothing out.
        left: it is the last: its rank has ended, or closed the group, by itself.
    """

    number: int
    at: Position | None = None
    inside: bool = False
    missing: tuple[int, ...] | None = None
    left: bool = False

    def text(self) -> str:
        """As JSON."""
        return json.dumps(self)

    @classmethod
    def of(cls, text: str) -> Beat:
        """From `text`."""
        number, at, inside, missing, left = json.loads(text)
        return cls(
            number, None if at is None else Position(*at), inside, None if missing is None else tuple(missing), left
        )


def key(place: int) -> str:
    """Under which a place's heartbeat is."""
    return f"beat/{place}"


class _Seen(NamedTuple):
    """A heartbeat of another rank, and when it was first read here."""

    beat: Beat
    when: float


class Sightings:
    """The others' heartbeats as one rank has read them.

    Args:
        members: of the group. every: seconds between heartbeats.
        beats: whether they write all the time, or only when a collective has failed.

    Attributes:
        missing: the places that are, None while that is not known; says: who found them, if not this rank.
    """

    def __init__(self, members: Members, every: float, beats: bool):
        self.members, self.every, self._beats = members, every, beats
        self.missing: tuple[int, ...] | None = None
        self.says: int | None = None
        self._seen: dict[int, _Seen] = {}
        self._then: dict[int, int] | None = None  # heartbeats at the time of the failure

    def begin(self) -> None:
        """A collective has failed: who writes from now on lives."""
        self._then = None

    def look(self, store: Store, failed: float | None) -> None:
        """Read what the others wrote; `failed` is when a collective did, None for never."""
        began = time.monotonic()
        for place in self.members.others:
            text = store.get(key(place))
            if text is None:
                continue
            beat, known = Beat.of(text), self._seen.get(place)
            if known is None or beat.number != known.beat.number:
                self._seen[place] = _Seen(beat, time.monotonic())
            if beat.missing and not self.missing:
                self.missing, self.says = beat.missing, place
        # A heartbeat that was under way when its rank died counts as one of before, hence the moment.
        if self._then is None and failed is not None and began - failed >= self.every / 10:
            self._then = {place: seen.beat.number for place, seen in self._seen.items()}

    def lives(self, place: int) -> bool:
        """Whether it wrote since the failure, or wrote before it ended what it had found out."""
        if place not in self._seen or self.left(place):
            return False
        beat = self._seen[place].beat
        if beat.missing is not None:
            return True
        return self._then is not None and beat.number > self._then.get(place, 0)

    def left(self, place: int) -> bool:
        """Whether it has said that it leaves."""
        return place in self._seen and self._seen[place].beat.left

    def all_known(self) -> bool:
        """Whether of each it is known that it lives, or that it has left."""
        return all(self.lives(place) or self.left(place) for place in self.members.others)

    def all_told(self) -> bool:
        """Whether each that lives has read of what is missing."""
        lives = [place for place in self.members.others if place not in (self.missing or ()) and place in self._seen]
        return all(self._seen[place].beat.missing is not None for place in lives)

    def lapsed(self, place: int, since: float, inside: bool) -> bool:
        """Whether its heartbeats have ended, for a rank that waits `since` then; one that left, where `inside`."""
        seen = self._seen.get(place)
        if seen is not None and seen.beat.missing is not None:
            return False
        if seen is not None and seen.beat.left and not inside:
            return False  # what it had to do for this rank it did, as far as is known
        return time.monotonic() - (since if seen is None else seen.when) > MARGIN * self.every

    # --------------------------------------------------------------------------------------------------------- in words
    def absent(self, places: Iterable[int]) -> str:
        """Who is missing, and what was heard of each."""
        return ", ".join(f"{self.members.named([place])} ({self._silence(place)})" for place in places)

    def present(self) -> str:
        """Where the others are."""
        return ", ".join(f"{self.members.named([place])} {self._where(place)}" for place in self.members.others)

    def found(self) -> tuple[str, tuple[int, ...]]:
        """What a failed collective comes to, and the ranks that are missing."""
        places = self.missing or ()
        if not places:
            return f"all ranks live, but do not meet: {self.present()}", ()
        missing = tuple(self.members.ranks[place] for place in places)
        if self.says is None:
            return f"missing: {self.absent(places)}", missing
        says = self.members.named([self.says])
        if self.members.place in places:
            silence = f"it saw no heartbeat of it for {MARGIN * self.every:g} s"
            return f"{says} took this rank for missing: {silence}", missing
        return f"missing: {self.members.named(places)}, says {says}", missing

    def _silence(self, place: int) -> str:
        if place not in self._seen:
            if not self._beats:
                return f"it has not checked in within {MARGIN * self.every:g} s"
            return "no sign of life yet: it has not come to its first dispatch"
        if self.left(place):
            return f"it has left: it ended, or closed the group, {self._where(place)}"
        seen = self._seen[place]
        return f"no sign of life for {time.monotonic() - seen.when:.1f} s, last heard of {self._where(place)}"

    def _where(self, place: int) -> str:
        beat: Any = self._seen[place].beat if place in self._seen else Beat(0)
        return "before its first layer" if beat.at is None else f"{'in' if beat.inside else 'past'} {beat.at}"
