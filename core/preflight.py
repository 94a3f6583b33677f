"""Ranks that were set up unlike one another: found before they exchange a token, and told alike on each of them.

In a collective of ranks that differ, one waits for bytes that another never sends. So each rank writes what it has
built into the group's store, reads what the others have, and all of them raise the same error or none does. The ranks
meet there one time after the other, each time for something: one that comes for something else is told so at once.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

from moebius.core.errors import ConfigError, RankLost
from moebius.core.store import Members, Store, seconds, within

SETTING = "MOEBIUS_PREFLIGHT"
# Ranks come to their first layer minutes apart where one of them compiles or loads more.
SECONDS = 300.0

_PAUSES = 0.002, 0.5  # seconds between two looks, the first ones and the last ones
_FAREWELL = 3.0  # seconds at most that a rank waits until the others know that it leaves
_LINES = 12  # of differences
_LAYERS = "compares its layers, in the first pass after they were built"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a rank has built: what it must have in common with the others.

    Attributes:
        versions: of libraries, by name. settings: of the pass in which they are compared, by name.
        layers: each one's fields, by name, in the order in which they were built; the field "name" is what it is called
            by, and may differ.
    """

    versions: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Mapping[str, Any], ...] = ()

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Facts:
        """From `text`."""
        read = json.loads(text)
        return cls(versions=read["versions"], settings=read["settings"], layers=tuple(read["layers"]))


@runtime_checkable
class Layers(Protocol):
    """The layers over a group's ranks, as one of them has built them.

    Attributes:
        members: of the group.
        modules: in the order in which they were built: how each looked then, and itself while it lives.
        compared: how many of them the ranks have compared, None before the first time.
        rounds: how often they have told one another anything.
    """

    members: Members
    modules: list[tuple[dict[str, Any], weakref.ref[Any]]]
    compared: int | None
    rounds: int

    def store(self) -> Store | None:
        """The group's, for a moment; None where there is none."""
        ...


def timeout() -> float | None:
    """MOEBIUS_PREFLIGHT: how many seconds a rank waits for the others, 300 by default; None for "off"."""
    return seconds(SETTING, SECONDS)


def differences(facts: Sequence[Facts], members: Members, first: int = 0) -> list[str]:
    """In words, in what the ranks' facts, one for each place of the group, differ; none where they are alike.

    Args:
        first: the number of the first layer.
    """
    lines = differing([own.versions for own in facts], members) + differing([own.settings for own in facts], members)
    lines += differing([{"layers": len(own.layers)} for own in facts], members)
    for number in range(min(len(own.layers) for own in facts)):
        layers = [own.layers[number] for own in facts]
        called = f"layer {first + number}" + next((f" ({layer['name']})" for layer in layers if layer.get("name")), "")
        lines += differing(layers, members, f"{called}: ")
    return lines


def differing(fields: Sequence[Mapping[str, Any]], members: Members, of: str = "") -> list[str]:
    """In words, which fields differ, of those of each place, and who has what; none where they are alike.

    The field "name" may differ.

    Args:
        of: what they are of, before each of the words.
    """
    names = [name for name in dict.fromkeys(name for own in fields for name in own) if name != "name"]
    found = [_difference(of + name, [own.get(name) for own in fields], members) for name in names]
    return [line for line in found if line is not None]


def compare(
    here: Layers,
    facts: Callable[[Any], dict[str, Any]],
    versions: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Compare the ranks of a group, in what is new since the last time; not where MOEBIUS_PREFLIGHT is "off".

    Args:
        facts: of a module. versions, settings: see Facts.
    Raises: as `agree`.
    """
    limit, first = timeout(), here.compared or 0
    store = None if limit is None else here.store()
    if limit is not None and store is not None:
        # Looked at now, not when they were registered: a model may have been cast since.
        layers = tuple(as_it_is(*registered, facts) for registered in here.modules[first:])
        own = Facts(versions=versions, settings=settings or {}, layers=layers)
        agree(store, here.members, own, limit, next_key(here), first)
    here.compared = len(here.modules)


def next_key(here: Layers) -> str:
    """Of the next exchange; also of one that fails what was said under a key stays there."""
    here.rounds += 1
    return f"preflight/{here.rounds}"


def as_it_is(
    then: dict[str, Any], reference: weakref.ref[Any], facts: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """A registered module's facts: as they were where it lives no more, which on another rank it may."""
    module = reference()
    return then if module is None else facts(module)


def versions_of(**libraries: str) -> dict[str, str]:
    """moebius' own version and those of other libraries, by name."""
    try:
        own = version("moebius")
    except PackageNotFoundError:
        own = "not installed"
    return {"moebius": own, **libraries}


def agree(store: Store, members: Members, own: Facts, limit: float, key: str = "preflight", first: int = 0) -> None:
    """Compare with all other ranks; each calls with the same `key`, once.

    Args:
        limit, key: see `exchange`. first: the number of the first layer.
    Raises:
        ConfigError: they differ; the same text on every rank. RankLost: see `exchange`.
    """
    facts = [Facts.of(text) for text in meet(store, members, _LAYERS, own.text(), limit, key)]
    differ = differences(facts, members, first)
    if differ:
        more = [f"and {len(differ) - _LINES} more"] if len(differ) > _LINES else []
        found = "; ".join(differ[:_LINES] + more)
        alike = f"build the same layers in the same order, with the same versions and settings, on every {members.kind}"
        do = f"{alike}; or set {SETTING}=off"
        raise ConfigError(f"{members.counted} that are set up alike", found, do)


def meet(store: Store, members: Members, what: str, value: Any, limit: float, key: str, detail: str = "") -> list[Any]:
    """Every rank's value, which JSON can hold, by its place; all ranks call, for the same.

    Args:
        what: this rank does, in words; detail: more words of it, which may differ. limit, key: see `exchange`.
    Raises:
        ConfigError: another rank does something else meanwhile; the same text on every rank. RankLost: see `exchange`.
    """
    said = [json.loads(text) for text in exchange(store, members, json.dumps([what, detail, value]), limit, key)]
    if len({doing for doing, _, _ in said}) > 1:
        found = members.grouped([doing + more for doing, more, _ in said])
        do = f"build the same layers in the same order, and call the same ones, on every {members.kind}"
        raise ConfigError(f"{members.counted} that do the same", found, do)
    return [value for _, _, value in said]


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
    deadline, (pause, longest) = time.monotonic() + _FAREWELL, _PAUSES
    while left and time.monotonic() < deadline:
        left = [place for place in left if store.get(f"{key}/knows/{place}") is None]
        if left:
            time.sleep(pause)
            pause = min(1.5 * pause, longest / 10)


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


def _difference(what: str, values: Sequence[Any], members: Members) -> str | None:
    """Each value with the ranks that have it; the one that most have comes first."""
    by_value: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        by_value.setdefault(json.dumps(value).strip('"'), []).append(place)
    if len(by_value) == 1:
        return None
    said = sorted(by_value.items(), key=lambda item: -len(item[1]))  # stable: then by place
    return f"{what} is {', '.join(f'{value} on {members.named(places)}' for value, places in said)}"
