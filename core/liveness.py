"""Who is missing when a collective fails: a rank's heartbeats in the group's store, and what the others' tell it.

A collective that fails says little. Of four ranks in a ring two notice at once that the third died, and the fourth
waits until one of those two leaves; so who fails last does not know who died first, and who has not failed yet is not
dead. Each rank therefore writes a heartbeat every few seconds, from a thread: a rank is missing whose heartbeats end.
A rank that has found out who is missing writes that down before it leaves, and the others believe it. One that ends by
itself, or closes the group, says so with its last heartbeat, and nobody who does not wait for it misses it.

All talk with the store is the thread's. A store may answer no more, where its host is frozen: whoever waits for the
thread waits for a limited time. One that raises is asked again, for MARGIN heartbeats, or for one where a collective
has failed; then it counts as gone, and the heartbeats end.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

from moebius.core.errors import RankLost
from moebius.core.sightings import MARGIN, Beat, Position, Sightings, key
from moebius.core.store import Members, Store, seconds

SETTING = "MOEBIUS_HEARTBEAT"
SECONDS = 2.0
# So many more a rank waits until the others know what it knows, before it leaves and perhaps takes the store with it.
_FAREWELL = 2

_LOG = logging.getLogger("moebius")


def interval() -> float | None:
    """MOEBIUS_HEARTBEAT: seconds between heartbeats, 2 by default; None for "off"."""
    return seconds(SETTING, SECONDS)


class Watch:
    """This rank's heartbeats in a group, and what it knows of the others'.

    Args:
        store: opens the group's store, for a moment; None where the group is no more.
        members: of the group.
        every: seconds between heartbeats; None: no thread until a collective fails, and who does not write then within
            the margin is missing, whether dead or waiting.
        parting: opens it for the last heartbeat, where it may still be there although the group is no more; None for
            `store`.

    Attributes:
        at: the latest collective; None before the first. asynchronous: it returns before it is done.
    """

    def __init__(
        self,
        store: Callable[[], Store | None],
        members: Members,
        every: float | None,
        parting: Callable[[], Store | None] | None = None,
    ):
        self.members, self.every = members, SECONDS if every is None else every
        self.at: Position | None = None
        self.asynchronous = False
        self._store, self._parting, self._beats = store, parting or store, every is not None
        self._others = Sightings(members, self.every, self._beats)
        self._inside, self._since = False, 0.0
        self._thread: threading.Thread | None = None
        self._wake, self._news = threading.Event(), threading.Condition()
        self._stop = self._over = self._left = False
        self._count, self._process = 0, os.getpid()
        self._asking: float | None = None  # since when the store has not answered
        self._trouble: Exception | None = None  # what the store raised when it was last asked
        self._since_trouble = 0.0
        self._gone: Exception | None = None
        self._failed: float | None = None
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
        others = self._others
        with self._news:
            self._failed = time.monotonic()
            others.begin()
        self.start()
        self._wake.set()
        with self._news:
            self._news.wait_for(self._decided, MARGIN * self.every)
            if self._over:
                return None
            store_gone = self._without_store()
            if others.missing is None and store_gone is None:
                others.missing = tuple(place for place in self.members.others if not others.lives(place))
            if not others.missing and store_gone is None and not certain:
                self._failed = others.missing = None
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
            self._stop = self._left = False
            self._thread = threading.Thread(target=self._run, name="moebius-heartbeat", daemon=True)
            self._thread.start()

    def close(self, wait: float = 1.0, silently: bool = False) -> None:
        """End the heartbeats, with one that says so; `wait` seconds at most for a store that does not answer.

        Args:
            silently: without that one, as where the process dies.
        """
        self._stop, self._left = True, self._left or silently
        self._wake.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait)

    def say_goodbye(self, store: Store) -> None:
        """Write the last heartbeat, into a store that may be gone: once, and only after others."""
        # A rank that has found somebody missing has said more; and a forked child is not this rank.
        if self._count == 0 or self._left or self._failed is not None or self._process != os.getpid():
            return
        self._left = True
        with suppress(Exception):
            store.set(key(self.members.place), Beat(self._count + 1, self.at, left=True).text())

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
                break
            self._report()
            if self._gone is None:
                self._wake.wait(self.every if self._failed is None else self.every / 10)
        if (self._stop or self._over) and self._trouble is None and self._asking is None:
            with suppress(Exception):
                store = self._parting()
                if store is not None:
                    self.say_goodbye(store)

    def _ask(self) -> None:
        try:
            store = self._store()
            if store is None:
                self._over = True
            else:
                self._beat(store)
                if self._anxious():
                    self._others.look(store, self._failed)
            self._trouble = None
        except Exception as error:
            self._over = self._closes()
            self._raised(error)
        self._asking = None
        with self._news:
            self._news.notify_all()

    def _raised(self, error: Exception) -> None:
        """The store did: for how long is it asked again?"""
        now = time.monotonic()
        if self._trouble is None:
            self._since_trouble = now
        self._trouble = error
        began = self._since_trouble if self._failed is None else max(self._since_trouble, self._failed)
        if not self._over and now - began >= (MARGIN if self._failed is None else 1) * self.every:
            self._gone = error

    def _closes(self) -> bool:
        """Whether this process is closing the group, where its store has just failed: then that is no news."""
        return False

    def _beat(self, store: Store) -> None:
        if self._left:
            return
        self._count += 1
        store.set(key(self.members.place), Beat(self._count, self.at, self._inside, self._others.missing).text())

    def _anxious(self) -> bool:
        """Whether to read the others' heartbeats: a collective has failed, or takes longer than a heartbeat."""
        if self._failed is not None:
            return True
        waits = self._inside or (self.asynchronous and self.at is not None)
        return waits and time.monotonic() - self._since >= self.every

    # ------------------------------------------------------------------------------------------------- what is known
    def _decided(self) -> bool:
        others = self._others
        return bool(others.missing) or self._gone is not None or self._over or others.all_known()

    def _known(self) -> bool:
        """Whether each rank that lives has read of what is missing."""
        return self._gone is not None or self._over or self._others.all_told()

    def _without_store(self) -> str | None:
        """In words, that the store is gone; None where it is there, or is not needed."""
        if self._others.missing:
            return None
        error = self._gone if self._failed is None else self._gone or self._trouble
        if error is not None:
            return f"the group's store is gone ({next(iter(str(error).splitlines()), '')})"
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
        if store_gone is None:
            return self._others.found()
        if self.members.host is None:
            return f"{store_gone}, and with it who is missing", ()
        host = f"{self.members.kind} {self.members.host}"
        if self._failed is None and not self._inside:
            return f"{store_gone}: {host}, which hosts it, has ended or is missing", ()
        who = f"missing: {host}, which hosts the group's store"
        return f"{who}: {store_gone}; who else is not known", (self.members.host,)

    def _report(self) -> None:
        """Into the log: who has stopped while this rank waits. What ends this process may leave nothing else."""
        if self._failed is not None or not self._anxious():
            return
        absent: Sequence[int] = [
            place for place in self.members.others if self._others.lapsed(place, self._since, self._inside)
        ]
        store_gone = self._without_store()
        if store_gone is None and (self._asking is not None or self._trouble is not None):
            return  # what the others wrote is not known before the store answers
        new = set(absent) - self._logged
        if store_gone is not None:
            new = {self.members.place} - self._logged
        if not new:
            return
        self._logged |= new
        # Where nothing is known to wait, the host of the store may as well have ended by itself.
        level = logging.ERROR if store_gone is None or self._inside else logging.WARNING
        found = f"missing: {self._others.absent(absent)}" if store_gone is None else self._found(store_gone)[0]
        _LOG.log(level, "%s; %s", self._waits(time.monotonic() - self._since), found)
        for handler in [*_LOG.handlers, *logging.getLogger().handlers]:
            handler.flush()
        sys.stderr.flush()

    def _waits(self, seconds: float) -> str:
        return f"{self.members.named([self.members.place])} waits since {seconds:.1f} s in {self.at}"


_WATCHES: weakref.WeakSet[Watch] = weakref.WeakSet()


def _ends_by_an_error() -> bool:
    """Whether the interpreter has seen an error that nobody caught, by which it ends."""
    return getattr(sys, "last_value", None) is not None


# A child has none of the threads; what it inherits it must not wait for.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WATCHES.clear)


@atexit.register
def _end_all() -> None:
    """No thread may come back from the store while the interpreter goes. What does not answer is left behind."""
    watches = list(_WATCHES)
    for watch in watches:
        watch.close(0.0, silently=_ends_by_an_error())  # of which the others hear as of a death
    deadline = time.monotonic() + 1.0
    for watch in watches:
        watch.close(max(0.0, deadline - time.monotonic()))
