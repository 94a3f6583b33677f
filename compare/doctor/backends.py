"""The backends of both frontends: chosen, available, or why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moebius.compare.doctor.machine import FRONTENDS, NEEDS, Machine
from moebius.compare.doctor.packages import brings, install
from moebius.compare.doctor.record import Row, Status

SECTION = "backend"
# What Registry.explain says of a backend that serves, in the order in which a row tells it.
SERVES = ("chosen", "available", "available when named")


def judge(machine: Machine) -> Iterator[Row]:
    """Every backend of every operation; one row for a frontend that cannot be imported."""
    for frontend, module in FRONTENDS.items():
        name, answer = module.split(".")[1], machine.answers.get(frontend)
        trouble = answer.trouble("backends") if answer else None
        if answer is None:
            absent = [package for package in NEEDS[frontend] if not machine.versions.get(package)]
            detail = f"not installed: {', '.join(absent)}"
            yield Row(section=SECTION, name=name, status=Status.MISSING, detail=detail, remedy=install(frontend))
        elif trouble:
            remedy = f"python -c 'import {module}'"
            yield Row(section=SECTION, name=name, status=Status.BROKEN, detail=trouble, remedy=remedy)
        else:
            for backend in answer.facts["backends"]:
                yield _backend(machine, frontend, backend)


def _backend(machine: Machine, frontend: str, backend: Mapping[str, Any]) -> Row:
    name = f"{frontend}.{backend['operation']}.{backend['name']}"
    status, detail, remedy = _state(machine, frontend, name, backend)
    facts = {"states": backend["states"], "needs": backend["needs"]}
    return Row(section=SECTION, name=name, status=status, detail=detail, remedy=remedy, facts=facts)


def _state(machine: Machine, frontend: str, name: str, backend: Mapping[str, Any]) -> tuple[Status, str, str]:
    states = backend["states"]
    if backend["unbuilt"]:
        return Status.UNBUILT, next(iter(states.values())), ""
    if backend["missing"]:
        lacking = [package for package in backend["needs"] if package in backend["missing"]]
        return Status.MISSING, backend["missing"], "; ".join(dict.fromkeys(brings(frontend, p) for p in lacking))
    loaded = machine.answers.get(name)
    trouble = loaded.trouble("load") if loaded else None
    if trouble:
        remedy = f"import {', '.join(backend['needs'])} in a shell and read what it says; or name another backend"
        return Status.BROKEN, f"does not load: {trouble}", remedy
    if not any(state in SERVES for state in states.values()):
        return Status.UNSUPPORTED, described(states), "name another backend"
    says = machine.fact(name, "load").get("says")
    return Status.OK, "; ".join(text for text in (described(states), says) if text), ""


def described(states: Mapping[str, str]) -> str:
    """{"cpu float32": "chosen", ...} in words: no dtypes where all have one state, and devices that are alike once."""
    devices: dict[str, dict[str, list[str]]] = {}
    for key, state in states.items():
        device, dtype = key.split(" ", 1)
        devices.setdefault(device, {}).setdefault(state, []).append(dtype)
    told: dict[str, list[str]] = {}
    for device, by_state in devices.items():
        told.setdefault(_one_device(by_state), []).append(device)
    return "; ".join(f"{', '.join(alike)}: {words}" for words, alike in told.items())


def _one_device(by_state: Mapping[str, list[str]]) -> str:
    if len(by_state) == 1:
        return next(iter(by_state))
    served = [f"{state} for {', '.join(by_state[state])}" for state in SERVES if state in by_state]
    refused = [f"{', '.join(dtypes)}: {state}" for state, dtypes in by_state.items() if state not in SERVES]
    return "; ".join(served + refused)
