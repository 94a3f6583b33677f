"""Processes that share experts, watched: where one is lost, the log of the others says which, and where they were.

A call is compiled, and what runs on the devices is XLA's: a rank of errors is here a process of jax.distributed, and
nothing of ours stands around a collective. Each process of a mesh that spans several writes a heartbeat into
jax.distributed's key-value store every MOEBIUS_HEARTBEAT seconds (2 by default, or "off"), from a daemon thread that
starts with its first call over such a mesh, and reads those of the others. Where a process stops that has not left, the
logger "moebius" of the others has the record: who is missing, which layer was called last, how often and when. Calls
are those of Python: of a function under jit, the times at which it was traced.

Which timeouts are whose. JAX's, all of jax.distributed.initialize: `initialization_timeout`, 300 s for all processes to
come; `heartbeat_timeout_seconds`, 100, after which JAX ends every process by SIGABRT where one is dead or stopped, in
our tests within 15 s more; `shutdown_timeout_seconds`, 300, for which a process that has raised waits at its exit for
those that live. Ours: at most 5 heartbeats (10 s) after a process's last one the record is in the log, so JAX's timeout
has to be longer than that. In gloo a collective fails as soon as a connection closes: an error of XLA that nobody
catches is followed by the record, at most 5 heartbeats later. Before the first call: MOEBIUS_PREFLIGHT, see
preflight.py.

Process 0 hosts the store. Where it dies, JAX ends the others as soon as their connections to it close, and often before
anything of ours can run; its own last words name the "leader task", which is process 0.
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections import Counter
from functools import lru_cache
from types import TracebackType
from typing import Any

import jax
from jax.sharding import Mesh

from moebius.core.errors import RankLost
from moebius.core.liveness import Position, Watch, interval
from moebius.core.store import Members, Store

_LOG = logging.getLogger("moebius")
_HOST = 0  # jax.distributed.initialize starts the coordination service in this process
_METHODS = ("key_value_set", "key_value_try_get", "key_value_dir_get")


class Layer:
    """What errors call a layer, and how often it was called.

    Args:
        name: its number.
    """

    def __init__(self, name: str):
        self.name, self.calls = name, 0

    def begin(self) -> Position:
        """The position of a call that begins now."""
        self.calls += 1
        return Position(self.name, None, f"call {self.calls}")


class Peers:
    """The processes of a mesh, as this one sees them; `peers` makes one for all meshes over the same.

    Args:
        processes: by their numbers.

    Attributes:
        members: those processes. watch: their heartbeats.
        modules: the layers over them, in their order: how each looked then, and itself while it lives. layers: what
            errors call them. alike: and what they call one of several that are alike, by the number of the first.
        compared: how many of them the processes have compared, None before the first time. rounds: how often.
    """

    def __init__(self, processes: tuple[int, ...]):
        _COUNTS[processes] += 1
        # Processes that close all and begin anew find nothing of before.
        self._prefix = f"moebius/{'-'.join(map(str, processes))}/{_COUNTS[processes]}"
        place = processes.index(jax.process_index())
        self.members = Members(ranks=processes, place=place, host=_HOST, kind="process")
        self.watch = _Heartbeats(self.store, self.members, interval())
        self.watch.asynchronous = True
        self.modules: list[tuple[dict[str, Any], weakref.ref[Any]]] = []
        self.layers: list[Layer] = []
        self.alike: dict[int, Layer] = {}
        self.compared: int | None = None
        self.rounds = 0

    def store(self) -> Store | None:
        """jax.distributed's store, under a prefix; None where it is not set up, or was shut down."""
        client = _client()
        # Nobody keeps a client: it says goodbye to the others when it is deleted.
        return None if client is None else _Texts(client, self._prefix)


def peers(mesh: Mesh) -> Peers | None:
    """The processes of `mesh`; None where it is this one alone, or has no device of it."""
    processes = _processes(mesh)
    if len(processes) == 1 or jax.process_index() not in processes:
        return None
    found = _PEERS.get(processes)
    if found is None:
        if not _PREVIOUS:  # once: whoever has put another one over it calls it
            _PREVIOUS.append(sys.excepthook)
            sys.excepthook = _unhandled
        found = _PEERS[processes] = Peers(processes)
    return found


def close(mesh: Mesh | None = None) -> None:
    """End what moebius runs for the processes of `mesh`, None for all: its thread, and what it knows of the others.

    The others learn that this process has left them, and wait for nobody. All of them close, or none; a call after it
    begins anew.
    """
    for processes in list(_PEERS) if mesh is None else [_processes(mesh)]:
        found = _PEERS.pop(processes, None)
        if found is not None:
            found.watch.close()


class _Heartbeats(Watch):
    """A Watch whose process is told of a shutdown by its store alone, and what it says in the log."""

    def record(self, lost: RankLost) -> str:
        """What the log has of an error."""
        return f"{self._waits(time.monotonic() - self._since)}; {lost.found}"

    def _closes(self) -> bool:
        # jax.distributed.shutdown() ends the connection first, and then forgets it. After a failure there is no time.
        deadline = time.monotonic() + (min(1.0, self.every) if self._failed is None else 0.0)
        while _client() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        return _client() is None

    def _waits(self, seconds: float) -> str:
        return f"{self.members.named([self.members.place])} last called {self.at}, {seconds:.1f} s ago"


class _Texts:
    """jax.distributed's key-value store as a moebius.core.store.Store, for a moment: heartbeats are read at once."""

    def __init__(self, client: Any, prefix: str):
        self._client, self._prefix = client, prefix
        self._beats: dict[str, str] | None = None

    def set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{self._prefix}/{key}", value, allow_overwrite=True)

    def get(self, key: str) -> str | None:
        name = f"{self._prefix}/{key}"
        if key.startswith("beat/"):
            if self._beats is None:
                self._beats = dict(self._client.key_value_dir_get(f"{self._prefix}/beat/"))
            return self._beats.get(name)
        try:
            text: str = self._client.key_value_try_get(name)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None
        return text


_PEERS: dict[tuple[int, ...], Peers] = {}
_COUNTS: Counter[tuple[int, ...]] = Counter()
_PREVIOUS: list[Any] = []  # what sys.excepthook was


@lru_cache(maxsize=64)
def _processes(mesh: Mesh) -> tuple[int, ...]:
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def _client() -> Any:
    """jax.distributed's client; None where there is none, or JAX has moved what has no public name."""
    try:
        from jax._src.distributed import global_state

        client = global_state.client
    except (ImportError, AttributeError):
        return None
    return client if all(hasattr(client, name) for name in _METHODS) else None


def _unhandled(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook: where an error of XLA ends this process, find out first whether another was lost.

    Later nothing could: at the exit of the interpreter no thread may be started.
    """
    _PREVIOUS[-1](kind, error, trace)
    if isinstance(error, jax.errors.JaxRuntimeError) and _client() is not None:
        for here in list(_PEERS.values()):
            lost = here.watch.judge(False)
            if lost is not None:
                _LOG.error("%s", here.watch.record(lost))
