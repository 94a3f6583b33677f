"""Asks core: whether it imports, and with which NumPy."""

from __future__ import annotations

from typing import Any

from moebius.compare.doctor.reply import reply


def main() -> None:
    """Reply with the stage "import"."""
    reply({"import": _import})


def _import() -> dict[str, Any]:
    import numpy

    import moebius.core

    return {"numpy": numpy.__version__, "activations": len(moebius.core.ACTIVATIONS)}
