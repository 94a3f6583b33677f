"""What a frontend's registries say, as plain data: runs in the probe that has imported the frontend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moebius.compare.doctor.figures import device, figures
from moebius.core import measured
from moebius.core.dispatchers import Choice
from moebius.core.registry import Backend, Problem, Registry

DTYPES = ("float64", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
# Qwen3-30B-A3B's experts: a size that people run.
_USUAL = Problem(device="cpu", dtype="float32", dim=2048, inter_dim=768, n_experts=128)
# One thing at a time that a kernel may not take. 4096 experts: past the 1024 of torch's grouped_mm.
_UNUSUAL: tuple[dict[str, Any], ...] = ({"dim": 7, "inter_dim": 5}, {"n_experts": 4096}, {"ranks": 8})
_CAPABILITIES = ((9, 0), (8, 0), (10, 0))


def states(registries: Sequence[Registry], capability: tuple[int, int] | None) -> list[dict[str, Any]]:
    """Every backend, and what `Registry.explain` says of it for the usual problem.

    Args:
        registries: of one frontend. capability: of its GPU; None where it has none.
    Returns:
        records with operation, name, needs, missing, unbuilt, and states: "device dtype" -> words.
    """
    kinds = [("cpu", None)] + ([("cuda", capability)] if capability else [])
    problems = {
        f"{device} {dtype}": replace(_USUAL, device=device, dtype=dtype, capability=cap)
        for device, cap in kinds
        for dtype in DTYPES
    }
    found = []
    for registry in registries:
        explained = {key: dict(registry.explain(_layer(registry, problem))) for key, problem in problems.items()}
        for backend in _backends(registry):
            found.append(
                {
                    **_record(registry, backend),
                    "missing": backend.missing(),
                    "states": {key: of_all[backend.name] for key, of_all in explained.items()},
                }
            )
    return found


def support(registries: Sequence[Registry]) -> list[dict[str, Any]]:
    """Every backend and what its `supports` says over a grid of problems; the same on every machine.

    Returns:
        records with operation, name, needs, unbuilt, note, and for each device the dtypes that it serves, those for
        which None takes it where every package is installed (a usual size), and its reasons against the rest.
    """
    found = []
    for registry in registries:
        for backend in _backends(registry):
            devices = {device: _served(registry, backend, device) for device in DEVICES}
            found.append({**_record(registry, backend), "note": backend.note, "devices": devices})
    return found


def load(registries: Sequence[Registry], operation: str, name: str) -> dict[str, str]:
    """Load a backend as its first use would, and ask how it computes here.

    Returns:
        "says": its words, "" for none. Raises whatever its loader raises.
    """
    (registry,) = (registry for registry in registries if registry.operation == operation)
    registry.implementation(registry[name])
    says = registry[name].says
    return {"says": "" if says is None else says()}


def explain(
    frontend: str,
    registries: Sequence[Registry],
    candidates: Callable[[Problem, int], Sequence[Choice]],
    capability: tuple[int, int] | None,
    sizes: Sequence[int],
    split: bool = False,
) -> dict[str, Any]:
    """What None means for a layer in bfloat16 on this machine's kind of device, and why.

    Args:
        frontend: "torch" or "jax". registries: of it, the grouped matmul's and the dispatchers'.
        candidates: its rule for dispatchers. capability: of its GPU; None for the CPU.
        sizes: E, K, D, I, T, and the ranks that share experts and tokens. split: without ranks it may be split over
            several devices that are here.
    Returns:
        "device" in words; "grouped_matmul" and "dispatch", each (name, state) of every backend; "figures": lines, of
        the measured points that decided. A state is "chosen" or "available", with the reason, "available when named" or
        the reason against. "elsewhere": records without "dispatch", of other GPUs that were measured, where every
        package is installed.
    """
    n_experts, k, dim, inter_dim, tokens, ranks = sizes
    problem = Problem(
        device="cpu" if capability is None else "cuda",
        dtype="bfloat16",
        dim=dim,
        inter_dim=inter_dim,
        n_experts=n_experts // ranks,
        capability=capability,
        ranks=ranks,
        split=split and ranks == 1,
    )
    matmul, dispatch = registries
    rows = measured.bucket(tokens * k // ranks)
    others = [gpu for gpu in measured.capabilities() if gpu != capability]
    elsewhere = [replace(problem, device="cuda", capability=gpu, rows=rows) for gpu in others]
    return {
        **_matmul(frontend, matmul, replace(problem, rows=rows), installed=True),
        "dispatch": _dispatch(dispatch, problem, candidates(problem, k)),
        "elsewhere": [_matmul(frontend, matmul, each, installed=False) for each in elsewhere],
    }


def _matmul(frontend: str, registry: Registry, problem: Problem, installed: bool) -> dict[str, Any]:
    layer = _layer(registry, problem)
    names = [backend.name for backend in registry.candidates(layer, installed=installed)]
    why, lines = figures(frontend, layer, names)
    states = [
        (name, f"{state}: {why[name]}" if state in ("chosen", "available") and why.get(name) else state)
        for name, state in registry.explain(layer, installed=installed)
    ]
    return {"device": device(problem), "grouped_matmul": states, "figures": lines}


def _dispatch(registry: Registry, problem: Problem, choices: Sequence[Choice]) -> list[tuple[str, str]]:
    why = {choice.name: choice.why for choice in choices}
    states = dict(registry.explain(problem))
    usable = [name for name in why if registry[name].missing() is None]
    for name in states:
        if name in usable:
            states[name] = f"{'chosen' if name == usable[0] else 'available'}: {why[name]}"
        elif states[name] == "chosen":  # by its place in the table, which is not the dispatchers' rule
            states[name] = "available when named"
    return list(states.items())


def _served(registry: Registry, backend: Backend, device: str) -> dict[str, list[str]]:
    served: dict[str, list[str]] = {"dtypes": [], "default": [], "limits": []}
    for usual in _usual(device):
        if _default(registry, usual) == backend.name:
            _once(served["default"], usual.dtype)
        for problem in (usual, *(replace(usual, **change) for change in _UNUSUAL)):
            reason = backend.supports(problem)
            _once(*((served["dtypes"], problem.dtype) if reason is None else (served["limits"], reason)))
    return served


def _usual(device: str) -> Iterator[Problem]:
    for dtype in DTYPES:
        for capability in _CAPABILITIES if device == "cuda" else (None,):
            yield replace(_USUAL, device=device, dtype=dtype, capability=capability)


def _default(registry: Registry, problem: Problem) -> str | None:
    ranked = registry.ranked(_layer(registry, problem), installed=False)
    return ranked[0].name if ranked else None


def _layer(registry: Registry, problem: Problem) -> Problem:
    """Of the grouped matmul both products of a gated layer; of other steps the problem as it is."""
    gated = registry.operation == "grouped_matmul"
    return replace(problem, up_width=2 * problem.inter_dim) if gated else problem


def _backends(registry: Registry) -> list[Backend]:
    return [registry[name] for name, _ in registry.explain(_USUAL)]


def _record(registry: Registry, backend: Backend) -> dict[str, Any]:
    return {
        "operation": registry.operation,
        "name": backend.name,
        "needs": list(backend.needs),
        "unbuilt": backend.name not in registry.names,
    }


def _once(values: list[str], value: str) -> None:
    if value not in values:
        values.append(value)
