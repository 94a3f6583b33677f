"""Who is missing when a collective fails: heartbeats in the group's store, and what is read from them.

A collective that fails says little. Of four ranks in a ring two notice at once that the third died, and the fourth
waits until one of those two leaves; so who fails last does not know who died first, and who has not failed yet is not
dead. Each rank therefore writes a heartbeat every few seconds, from a thread: a rank is missing whose heartbeats end.
A rank that has found out who is missing writes that down before it leaves, and the others believe it.

All talk with the store is the thread's. A store may answer no more, where its host is frozen: whoever waits for the
thread waits for a limited time.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from moebius.core.errors import RankLost
from moebius.core.store import Members, Store, seconds

SETTING = "MOEBIUS_HEARTBEAT"
SECONDS = 2.0
# A rank is missing whose heartbeats have ended for so many of them.
MARGIN = 3
# So many more a rank waits until the others know what it knows, before it leaves and perhaps takes the store with it.
_FAREWELL = 2

_LOG = logging.getLogger("moebius")


def interval() -> float | None:
    """MOEBIUS_HEARTBEAT: seconds between heartbeats, 2 by default; None for "off"."""
    return seconds(SETTING, SECONDS)


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


class _Seen(NamedTuple):
    """A heartbeat of another rank, and when it was first read here."""

    said: dict[str, Any]
    when: float


class Watch:
    """This rank's heartbeats in a group, and what it knows of the others'.

    Args:
        store: opens the group's store, for a moment; None where the group is no more.
        members: of the group.
        every: seconds between heartbeats; None: no thread until a collective fails, and who does not write then within
            the margin is missing, whether dead or waiting.

    Attributes:
        at: the latest collective; None before the first. asynchronous: it returns before it is done.
    """

    def __init__(self, store: Callable[[], Store | None], members: Members, every: float | None):
        self.members, self.every = members, SECONDS if every is None else every
        self.at: Position | None = None
        self.asynchronous = False
        self._store, self._beats = store, every is not None
        self._inside, self._since = False, 0.0
        self._thread: threading.Thread | None = None
        self._wake, self._news = threading.Event(), threading.Condition()
        self._stop = self._over = False
        self._count = 0
        self._asking: float | None = None  # since when the store has not answered
        self._gone: Exception | None = None
        self._seen: dict[int, _Seen] = {}
        self._failed: float | None = None
        self._then: dict[int, int] | None = None  # heartbeats at the time of the failure
        self._missing: tuple[int, ...] | None = None
        self._says: int | None = None  # who found them missing, if not this rank
        self._logged: set[int] = set()
        _WATCHES.add(self)

    # -------------------------------------------------------------------------------------------- around a collective
    def enter(self) -> None:
        """A collective begins, at `at`."""
        self._since, self._inside = time.monotonic(), True
        if self._thread is None and self._beats:
            self.start()

    def leave(self) -> None:
        """It ended here."""
        self._inside = False

    def judge(self, certain: bool) -> RankLost | None:
        """The error to raise where a collective failed; None where no rank is missing, or the group is no more.

        It takes at most MARGIN + 2 heartbeats.

        Args:
            certain: the failure itself says that ranks did not meet: an error also where all of them live.
        """
        with self._news:
            self._failed, self._then = time.monotonic(), None
        self.start()
        self._wake.set()
        with self._news:
            self._news.wait_for(self._decided, MARGIN * self.every)
            if self._over:
                return None
            store_gone = self._without_store()
            if self._missing is None and store_gone is None:
                self._missing = tuple(place for place in self.members.others if not self._lives(place))
            if not self._missing and store_gone is None and not certain:
                self._failed = self._missing = None
                return None
            error = self._lost(store_gone)
        if store_gone is None:
            self._wake.set()
            with self._news:
                self._news.wait_for(self._known, _FAREWELL * self.every)
        return error

    # ------------------------------------------------------------------------------------------------------ the thread
    def start(self) -> None:
        """Begin the heartbeats, if they have not begun."""
        if self._thread is None or not self._thread.is_alive():
            self._stop = False
            self._thread = threading.Thread(target=self._run, name="moebius-heartbeat", daemon=True)
            self._thread.start()

    def close(self, wait: float = 1.0) -> None:
        """End the heartbeats; `wait` seconds at most for a store that does not answer."""
        self._stop = True
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait)

    def _run(self) -> None:
        while self._gone is None and not self._stop:
            self._wake.clear()
            self._asking = time.monotonic()
            # In a thread of its own: this one has to report a store that answers no more.
            asking = threading.Thread(target=self._ask, name="moebius-store", daemon=True)
            try:
                asking.start()
            except RuntimeError:  # the interpreter ends, in which no thread may begin
                return
            asking.join(self.every)
            while asking.is_alive() and not self._stop:
                self._report()
                asking.join(self.every)
            if self._stop or self._over:
                return
            self._report()
            if self._gone is None:
                self._wake.wait(self.every if self._failed is None else self.every / 10)

    def _ask(self) -> None:
        try:
            store = self._store()
            if store is None:
                self._over = True
            else:
                self._beat(store)
                if self._anxious():
                    self._look(store)
        except Exception as error:
            self._over = self._closes()
            self._gone = None if self._over else error
        self._asking = None
        with self._news:
            self._news.notify_all()

    def _closes(self) -> bool:
        """Whether this process is closing the group, where its store has just failed: then that is no news."""
        return False

    def _beat(self, store: Store) -> None:
        self._count += 1
        at = None if self.at is None else list(self.at)
        said = {"count": self._count, "at": at, "inside": self._inside, "for": time.monotonic() - self._since}
        store.set(f"beat/{self.members.place}", json.dumps(said | {"missing": self._missing}))

    def _anxious(self) -> bool:
        """Whether to read the others' heartbeats: a collective has failed, or takes longer than a heartbeat."""
        if self._failed is not None:
            return True
        waits = self._inside or (self.asynchronous and self.at is not None)
        return waits and time.monotonic() - self._since >= self.every

    def _look(self, store: Store) -> None:
        began = time.monotonic()
        for place in self.members.others:
            text = store.get(f"beat/{place}")
            if text is None:
                continue
            said, known = json.loads(text), self._seen.get(place)
            if known is None or said["count"] != known.said["count"]:
                self._seen[place] = _Seen(said, time.monotonic())
            if said["missing"] and not self._missing:
                self._missing, self._says = tuple(said["missing"]), place
        # A heartbeat that was under way when its rank died counts as one of before, hence the moment.
        if self._then is None and self._failed is not None and began - self._failed >= self.every / 10:
            self._then = {place: seen.said["count"] for place, seen in self._seen.items()}

    # ------------------------------------------------------------------------------------------------- what is known
    def _lives(self, place: int) -> bool:
        """Whether it wrote since the failure, or wrote before it left what it had found out."""
        if place not in self._seen:
            return False
        said = self._seen[place].said
        if said["missing"] is not None:
            return True
        return self._then is not None and said["count"] > self._then.get(place, 0)

    def _decided(self) -> bool:
        return bool(self._missing) or self._gone is not None or self._over or all(map(self._lives, self.members.others))

    def _known(self) -> bool:
        """Whether each rank that lives has read of what is missing."""
        if self._gone is not None or self._over:
            return True
        lives = [place for place in self.members.others if place not in (self._missing or ()) and place in self._seen]
        return all(self._seen[place].said["missing"] is not None for place in lives)

    def _without_store(self) -> str | None:
        """In words, that the store is gone; None where it is there, or is not needed."""
        if self._missing:
            return None
        if self._gone is not None:
            return f"the group's store is gone ({next(iter(str(self._gone).splitlines()), '')})"
        asking = self._asking
        if asking is not None and time.monotonic() - asking > (MARGIN - 1) * self.every:
            return f"the group's store has not answered for {time.monotonic() - asking:.1f} s"
        return None

    # --------------------------------------------------------------------------------------------------------- in words
    def _lost(self, store_gone: str | None) -> RankLost:
        asked = f"{self.at or 'a collective outside of a layer'}, over {self.members.counted}"
        found, missing = self._found(store_gone)
        do = "see the log of what is missing; start again from a checkpoint: this process group cannot be used any more"
        return RankLost(asked, found, do, missing, **(self.at._asdict() if self.at else {}))

    def _found(self, store_gone: str | None) -> tuple[str, tuple[int, ...]]:
        if store_gone is not None:
            if self.members.host is None:
                return f"{store_gone}, and with it who is missing", ()
            who = f"missing: {self.members.kind} {self.members.host}, which hosts the group's store"
            return f"{who}: {store_gone}; who else is not known", (self.members.host,)
        places = self._missing or ()
        if not places:
            where = ", ".join(f"{self.members.named([place])} {self._where(place)}" for place in self.members.others)
            return f"all ranks live, but do not meet: {where}", ()
        missing = tuple(self.members.ranks[place] for place in places)
        if self._says is None:
            return f"missing: {self._absent(places)}", missing
        says = self.members.named([self._says])
        if self.members.place in places:
            return (
                f"{says} took this rank for missing: it saw no heartbeat of it for {MARGIN * self.every:g} s",
                missing,
            )
        return f"missing: {self.members.named(places)}, says {says}", missing

    def _absent(self, places: Iterable[int]) -> str:
        return ", ".join(f"{self.members.named([place])} ({self._silence(place)})" for place in places)

    def _silence(self, place: int) -> str:
        if place not in self._seen:
            if not self._beats:
                return f"it has not checked in within {MARGIN * self.every:g} s"
            return "no sign of life yet: it has not come to its first dispatch"
        seen = self._seen[place]
        return f"no sign of life for {time.monotonic() - seen.when:.1f} s, last heard of {self._where(place)}"

    def _where(self, place: int) -> str:
        said = self._seen[place].said if place in self._seen else {"at": None}
        if said["at"] is None:
            return "before its first layer"
        return f"{'in' if said['inside'] else 'past'} {Position(*said['at'])}"

    def _report(self) -> None:
        """Into the log: who has stopped while this rank waits. What ends this process may leave nothing else."""
        if self._failed is not None or not self._anxious():
            return
        now = time.monotonic()
        absent: Sequence[int] = [place for place in self.members.others if self._lapsed(place, now)]
        store_gone = self._without_store()
        if self._asking is not None and store_gone is None:
            return  # what the others wrote is not known before the store answers
        new = set(absent) - self._logged
        if store_gone is not None:
            new = {self.members.place} - self._logged
        if not new:
            return
        self._logged |= new
        found = f"missing: {self._absent(absent)}" if store_gone is None else self._found(store_gone)[0]
        _LOG.error("%s; %s", self._waits(now - self._since), found)
        for handler in [*_LOG.handlers, *logging.getLogger().handlers]:
            handler.flush()
        sys.stderr.flush()

    def _waits(self, seconds: float) -> str:
        return f"{self.members.named([self.members.place])} waits since {seconds:.1f} s in {self.at}"

    def _lapsed(self, place: int, now: float) -> bool:
        seen = self._seen.get(place)
        if seen is not None and seen.said["missing"] is not None:
            return False
        return now - (self._since if seen is None else seen.when) > MARGIN * self.every


_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


# A child has none of the threads; what it inherits it must not wait for.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCHES.clear)


@atexit.register
def _end_all() -> None:
    """No thread may come back from the store while the interpreter goes. What does not answer is left behind."""
    watches = list(_WATCHES)
    for watch in watches:
        watch.close(0.0)
    deadline = time.monotonic() + 1.0
    for watch in watches:
        watch.close(max(0.0, deadline - time.monotonic()))
