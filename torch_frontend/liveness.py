"""Collectives of the dispatchers, watched: where one fails, the error says which rank is missing, in which layer.

Each group over which experts are spread has a record of its ranks' heartbeats in its own store (moebius.core.liveness):
one small write every MOEBIUS_HEARTBEAT seconds, 2 by default, from a daemon thread that starts with the group's first
dispatch; nothing is read, and no forward pass writes, until a collective fails or takes longer than a heartbeat.

Which timeouts are whose. The user's: `init_process_group(timeout=...)`, after which a collective fails that waits for a
rank that lives and does not come, or that died without its connections being closed; gloo then raises, and the watchdog
of NCCL ends the process. Where gloo sees a connection close it raises at once. Ours: from the failure, at most 5
heartbeats (10 s) until RankLost is raised; where a collective waits, at most 5 heartbeats after a rank's last one until
the log "moebius" has the record, which is all that remains where a watchdog ends the process. Before the first
dispatch: MOEBIUS_PREFLIGHT, see preflight.py.

The rank that hosts the store takes the record along when it dies. Then that is what the others say, and its name. A
store that raises is asked again with each heartbeat, for 3 of them (6 s), or for one where a collective has failed.

A rank that ends by itself is no loss: at the exit of its interpreter, unless that is by an error, when its group is
destroyed and by `close` its last heartbeat says that it leaves. Others that wait in a collective for it name it all the
same. Dispatchers' own `close` ends the heartbeats of a group with the last of them; `close()` here ends all.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moebius.core.errors import ConfigError, MoEError
from moebius.core.liveness import Position, Watch, interval
from moebius.core.store import Members, Store, within
from moebius.torch_frontend.recompute import recomputing


class Layer:
    """What errors call a layer, and how many forward passes it has begun.

    Args:
        name: its qualified name, or its number.

    Attributes:
        at: the position of the latest.
    """

    def __init__(self, name: str):
        self.name, self.at = name, Position(name, 0, "forward")

    def begin(self) -> Position:
        """The position of a forward pass that begins now."""
        again = recomputing()
        step = self.at.step or 0
        self.at = Position(self.name, step if again else step + 1, "recomputation" if again else "forward")
        return self.at


class Peers:
    """The ranks of a process group, as this one sees them; `peers` makes one for each group.

    Attributes:
        members: of the group. watch: their heartbeats.
        modules: the layers that are spread over the group, in their order: how each looked then, and itself while it
            lives. layers: what errors call them. compared: how many of them the ranks have compared, None before the
            first time. rounds: how often the ranks have told one another anything. chosen: the dispatchers that they
            have chosen together, by what each of them was asked for.
        dispatchers: those over the group that were not closed.
    """

    def __init__(self, group: Any):
        self._group = weakref.ref(group)
        ranks = tuple(dist.get_process_group_ranks(group))
        self._prefix = _prefix(group.group_name, ranks)
        self.members = Members(ranks=ranks, place=dist.get_rank(group), host=_host(_group_store(group)))
        self.watch = Watch(self.store, self.members, interval(), parting=self._parting)
        # With the store, which lives as long as the group does.
        self._end = weakref.finalize(group, _ended, self.watch, self._texts(group))
        self._end.atexit = False
        self.modules: list[tuple[dict[str, Any], weakref.ref[nn.Module]]] = []
        self.layers: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()
        self.compared: int | None = None
        self.rounds = 0
        self.chosen: dict[str, str] = {}
        self.dispatchers: weakref.WeakSet[Any] = weakref.WeakSet()

    def store(self) -> Store | None:
        """The group's store, under a prefix; None where there is none, or the group was destroyed.

        Whoever keeps it keeps its port.
        """
        group = self._group()
        return None if group is None or not _exists(group) else self._texts(group)

    def _texts(self, group: Any) -> Store | None:
        if dist.get_backend(group) == "fake":
            return None
        return _Texts(dist.PrefixStore(self._prefix, _group_store(group)))

    def _parting(self) -> Store | None:
        """The store for the last heartbeat, also of a group that was destroyed and is still held."""
        kept = self._end.peek()
        store: Store | None = None if kept is None else kept[2][1]
        return store


def peers(group: Any) -> Peers:
    """The ranks of `group`, None for the default one.

    Raises:
        ConfigError: it was destroyed.
    """
    group = dist.group.WORLD if group is None else group
    found = None if group is None else _PEERS.get(group)
    if found is None:
        if group is None or not _exists(group):
            do = "make dispatchers, and layers over a mesh, anew after init_process_group"
            raise ConfigError("experts over the ranks of a process group", "it was destroyed", do)
        found = _PEERS[group] = Peers(group)
    return found


def known(group: Any) -> Peers | None:
    """What `peers` made for `group`, None for the default one; None where it made nothing, or the group is gone."""
    group = dist.group.WORLD if group is None else group
    return None if group is None else _PEERS.get(group)


def collective(function: Callable[..., Any], *arguments: Any, group: Any) -> None:
    """function(*arguments, group=group), a collective of torch.distributed.

    Raises:
        RankLost: it failed because ranks are missing or do not meet. Whatever it raises besides.
    """
    watch = peers(group).watch
    watch.asynchronous = getattr(arguments[0], "is_cuda", False)
    watch.enter()
    try:
        function(*arguments, group=group)
    except RuntimeError as error:
        lost = None if isinstance(error, _OTHER) else watch.judge(_speaks_of_ranks(error))
        if lost is None:
            raise
        raise lost from error
    finally:
        watch.leave()


def close(group: Any = None) -> None:
    """End what moebius runs for `group`, None for all groups: its thread, and what it knows of the ranks.

    The others learn that this rank has left, and wait for nobody. All ranks of the group close it, or none; a dispatch
    after it begins anew.
    """
    for own in list(_PEERS) if group is None else [group]:
        found = _PEERS.pop(own, None)
        if found is not None:
            found.watch.close()


class _Texts:
    """A store of torch.distributed as a moebius.core.store.Store."""

    def __init__(self, store: Any):
        self._store = store

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        # `get` of a key that is not there would wait for it, and keep the store from other threads.
        if not self._store.check([key]):
            return None
        text: str = self._store.get(key).decode()
        return text


# Weak: a group that was destroyed, and with it its store and port, is kept by nothing here.
_PEERS: weakref.WeakKeyDictionary[Any, Peers] = weakref.WeakKeyDictionary()
_COUNTS: Counter[str] = Counter()  # of the groups of one name and the same ranks
# RuntimeErrors that no other rank can be the cause of.
_OTHER = (MoEError, NotImplementedError, RecursionError, torch.OutOfMemoryError)


def _speaks_of_ranks(error: RuntimeError) -> bool:
    """Whether an error of a collective is of the connections between ranks, by its class or gloo's words."""
    text = str(error).lower()
    return isinstance(error, dist.DistNetworkError) or any(word in text for word in _WORDS)


_GOODBYE = 0.5  # seconds
_WORDS = ("gloo/transport", "timed out", "timeout", "connection closed", "connection reset", "broken pipe")


def _prefix(name: str, ranks: tuple[int, ...]) -> str:
    """Of what a group's ranks write, alike on all of them, whatever other groups each has been in before.

    A name may be used again, in the same store, once its group was destroyed; perhaps by others.
    """
    # As a digest: a key of thousands of ranks would be long.
    here = f"{name}/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}"
    _COUNTS[here] += 1
    return f"moebius/{here}/{_COUNTS[here]}"


def _ended(watch: Watch, store: Store | None) -> None:
    """A group is no more: it was destroyed, by a rank that goes on or ends by itself."""
    if store is not None:
        with suppress(Exception):  # nobody waits for long for a host that is gone
            within(_GOODBYE, lambda: watch.say_goodbye(store))


def _exists(group: Any) -> bool:
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False


def _group_store(group: Any) -> Any:
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    return dist.distributed_c10d._get_process_group_store(group)


def _host(store: Any) -> int | None:
    """The global rank that hosts the store, as init_process_group sets it up by itself; None for a file or an agent."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return 0 if isinstance(store, dist.TCPStore) and not agent else None
