"""The table of backends for the README: what each supports, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from moebius.compare.doctor.packages import brings

_TITLES = {"torch": "PyTorch", "jax": "Flax"}
_HEAD = ("operation", "backend", "CPU", "NVIDIA GPU", "what it is, and its limits")
_DTYPES = 4
_LATER = "not in this version"

# A record of registries.support.
Backend = Mapping[str, Any]


def markdown(frontends: Mapping[str, Sequence[Backend]]) -> str:
    """A Markdown table.

    Args:
        frontends: "torch" and "jax" -> the records of registries.support.
    """
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for frontend, backends in frontends.items():
        for operation, group in groupby(backends, lambda backend: backend["operation"]):
            rows += _operation(frontend, operation, list(group))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _operation(frontend: str, operation: str, backends: list[Backend]) -> Iterator[tuple[str, ...]]:
    title = f"{_TITLES[frontend]} `{operation}`"
    for backend in backends:
        if not backend["unbuilt"]:
            cells = [_cell(device) for device in backend["devices"].values()]
            yield title, f"`{backend['name']}`", *cells, _escaped(_notes(frontend, backend))
    later = [f"`{backend['name']}`" for backend in backends if backend["unbuilt"]]
    if later:
        yield title, ", ".join(later), _LATER, _LATER, ""


def _cell(device: Mapping[str, list[str]]) -> str:
    dtypes, default = device["dtypes"], device["default"]
    if len(dtypes) == _DTYPES and len(default) in (0, _DTYPES):
        return "**any dtype**" if default else "any dtype"
    return ", ".join(f"**{dtype}**" if dtype in default else dtype for dtype in dtypes) or "no"


def _notes(frontend: str, backend: Backend) -> str:
    limits = _once(reason for device in backend["devices"].values() for reason in device["limits"])
    brought: dict[str, list[str]] = {}
    for package in backend["needs"]:
        brought.setdefault(brings(frontend, package), []).append(package)
    needs = [f"needs {' and '.join(packages)}: {how}" for how, packages in brought.items()]
    return "; ".join(note for note in [backend["note"], *needs, *limits] if note)


def _once(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
