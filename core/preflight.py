"""Ranks that were set up unlike one another: found before they exchange a token, and told alike on each of them.

In a collective of ranks that differ, one waits for bytes that another never sends. So each rank writes what it has
built into the group's store, reads what the others have, and all of them raise the same error or none does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moebius.core.errors import ConfigError, RankLost
from moebius.core.store import Members, Store, seconds, within

SETTING = "MOEBIUS_PREFLIGHT"
# Ranks come to their first layer minutes apart where one of them compiles or loads more.
SECONDS = 300.0

_PAUSES = 0.02, 0.5  # seconds between two looks, the first ones and the last ones
_FAREWELL = 3.0  # seconds at most that a rank waits until the others know that it leaves
_LINES = 12  # of differences


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a rank has built: what it must have in common with the others.

    Attributes:
        versions: of libraries, by name. layers: each one's fields, by name, in the order in which they were built;
            the field "name" is what it is called by, and may differ.
    """

    versions: Mapping[str, str]
    layers: tuple[Mapping[str, Any], ...] = ()

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"versions": dict(self.versions), "layers": [dict(layer) for layer in self.layers]})

    @classmethod
    def of(cls, text: str) -> Facts:
        """From `text`."""
        read = json.loads(text)
        return cls(versions=read["versions"], layers=tuple(read["layers"]))


def timeout() -> float | None:
    """MOEBIUS_PREFLIGHT: how many seconds a rank waits for the others, 300 by default; None for "off"."""
    return seconds(SETTING, SECONDS)


def differences(facts: Sequence[Facts], members: Members, first: int = 0) -> list[str]:
    """In words, in what the ranks' facts, one for each place of the group, differ; none where they are alike.

    Args:
        first: the number of the first layer.
    """
    found = [_difference(name, [own.versions.get(name) for own in facts], members) for name in _names(facts)]
    found.append(_difference("layers", [len(own.layers) for own in facts], members))
    for number in range(min(len(own.layers) for own in facts)):
        layers = [own.layers[number] for own in facts]
        called = f"layer {first + number}" + next((f" ({layer['name']})" for layer in layers if layer.get("name")), "")
        fields = [name for name in dict.fromkeys(name for layer in layers for name in layer) if name != "name"]
        found += [_difference(f"{called}: {name}", [layer.get(name) for layer in layers], members) for name in fields]
    return [line for line in found if line is not None]


def agree(store: Store, members: Members, own: Facts, limit: float, key: str = "preflight", first: int = 0) -> None:
    """Compare with all other ranks; each calls with the same `key`, once.

    Args:
        limit, key: see `exchange`. first: the number of the first layer.
    Raises:
        ConfigError: they differ; the same text on every rank. RankLost: see `exchange`.
    """
    facts = [Facts.of(text) for text in exchange(store, members, own.text(), limit, key)]
    differ = differences(facts, members, first)
    if differ:
        more = [f"and {len(differ) - _LINES} more"] if len(differ) > _LINES else []
        found = "; ".join(differ[:_LINES] + more)
        alike = f"build the same layers in the same order, with the same versions, on every {members.kind}"
        do = f"{alike}; or set {SETTING}=off"
        raise ConfigError(f"{members.counted} that are set up alike", found, do)


def exchange(store: Store, members: Members, text: str, limit: float, key: str) -> list[str]:
    """Every rank's text, by its place; all ranks call.

    Args:
        limit: seconds to wait for the others. key: of this exchange, used once; all it writes begins with it.
    Raises:
        RankLost: a rank did not come, and then none of them returns; or the store is gone.
    """
    try:
        # More than the limit: it is the look itself that should say who is missing.
        found, missing = within(limit + _FAREWELL + 2.0, lambda: _exchanged(store, members, text, limit, key))
    except Exception as error:
        raise _without_store(members, error) from error
    if missing:
        raise _without_ranks(members, missing, limit)
    return found


def _exchanged(store: Store, members: Members, text: str, limit: float, key: str) -> tuple[list[str], list[int]]:
    """Every place's text, or the places that are missing."""
    places, texts = range(len(members.ranks)), {members.place: text}
    store.set(f"{key}/{members.place}", text)
    pause, longest = _PAUSES
    deadline = time.monotonic() + limit
    while True:
        late = time.monotonic() >= deadline
        for place in places:
            said = None if place in texts else store.get(f"{key}/{place}")
            if said is not None:
                texts[place] = said
        # Where one rank gave up, all do: also a rank that comes when the others have gone.
        given_up = store.get(f"{key}/missing")
        missing = [] if given_up is None else json.loads(given_up)
        if late and not missing and len(texts) < len(places):
            missing = [place for place in places if place not in texts]
            store.set(f"{key}/missing", json.dumps(missing))
        if missing or len(texts) == len(places):
            with suppress(Exception):
                _take_leave(store, members, missing, key)
                # One may have given up at the moment at which the last one came.
                missing = missing or json.loads(store.get(f"{key}/missing") or "[]")
            return ([] if missing else [texts[place] for place in places]), missing
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(1.5 * pause, longest)


def _take_leave(store: Store, members: Members, missing: Sequence[int], key: str) -> None:
    """Wait until the others know too: the store goes with the rank that hosts it."""
    store.set(f"{key}/knows/{members.place}", "")
    left = [place for place in members.others if place not in missing]
    deadline = time.monotonic() + _FAREWELL
    while left and time.monotonic() < deadline:
        left = [place for place in left if store.get(f"{key}/knows/{place}") is None]
        if left:
            time.sleep(_PAUSES[0])


def _without_ranks(members: Members, missing: Sequence[int], limit: float) -> RankLost:
    found = f"missing: {members.named(missing)}, not come within {limit:g} s of the others"
    do = f"see the log of what is missing; {SETTING} sets the seconds, or is off"
    ranks = tuple(members.ranks[place] for place in missing)
    return RankLost(f"a preflight of {members.counted}", found, do, ranks)


def _without_store(members: Members, error: Exception) -> RankLost:
    asked = f"a preflight of {members.counted}"
    if members.host is None:
        return RankLost(asked, f"the group's store is gone: {error}", "see what hosts it", missing=())
    host = f"{members.kind} {members.host}"
    found = f"the group's store, which {host} hosts, is gone: {error}"
    return RankLost(asked, f"missing: {host}; {found}", "see its log", missing=(members.host,))


def _names(facts: Sequence[Facts]) -> list[str]:
    return sorted({name for own in facts for name in own.versions})


def _difference(what: str, values: Sequence[Any], members: Members) -> str | None:
    """Each value with the ranks that have it; the one that most have comes first."""
    by_value: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        by_value.setdefault(json.dumps(value).strip('"'), []).append(place)
    if len(by_value) == 1:
        return None
    said = sorted(by_value.items(), key=lambda item: -len(item[1]))  # stable: then by place
    return f"{what} is {', '.join(f'{value} on {members.named(places)}' for value, places in said)}"
