"""Where the two frontends meet: tensors across dlpack, the numerics report, the `moebius` command.

Nothing is imported before it is used: `moebius --help` has to answer where no framework is installed, and torch has
to be loaded before jax where both are.
"""

if __name__ != "moebius.compare":
    raise ImportError(f"this folder is the package moebius.compare; import it by that name, not as {__name__!r}")

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebius.compare.bridge import to_jax, to_torch
    from moebius.compare.numerics import report
    from moebius.compare.result import Report
    from moebius.compare.sides.callable_side import InJax

__all__ = ["InJax", "Report", "report", "to_jax", "to_torch"]

_HOMES = {
    "InJax": "sides.callable_side",
    "Report": "result",
    "report": "numerics",
    "to_jax": "bridge",
    "to_torch": "bridge",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
