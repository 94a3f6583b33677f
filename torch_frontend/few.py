"""Functions of few rows, which the host sets the pace of: from the third call of a kind on played from tapes.

A kind is all that a function's launches depend on: shapes, strides, dtypes and devices of its tensors, and what it is
told beside them. The second call of a kind is recorded; where the tape does not hold all of it (an operator of torch
ran, as where biases have gradients) every later call goes step by step, as the first did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moebius.torch_frontend import launch
from moebius.torch_frontend.tape import Inputs, Returned, Tape, record

ROWS = 2048  # more keep the device busy, and what each step needs is better given back at once
_KINDS = 1024  # held; then all are forgotten
_NEVER, _ONCE = object(), object()


def few(x: Tensor, n_rows: int) -> bool:
    """Whether a layer on these tokens has few rows, and kernels that could be played."""
    return 0 < n_rows <= ROWS and launch.serves(x)


class Played:
    """`function`, from a tape where there is one.

    Args:
        function: (tensors, told) -> (tensors or None each, what else follows from the kind). On the current device.
        can: (tensors, told) -> whether a call of this kind could be played at all.
    """

    def __init__(self, function: Callable[[Inputs, Any], Returned], can: Callable[[Inputs, Any], bool]):
        self._function, self._can = function, can
        self._found: dict[Any, Any] = {}  # kind -> a tape, or how far it has come

    def __call__(self, tensors: Inputs, told: Any) -> Returned | None:
        """What the function returns; None where a call of this kind cannot be played, and the function did not run.

        Args:
            tensors: the first is there. told: hashable.
        """
        kind = (told, *[t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])
        found = self._found.get(kind)
        if found is _NEVER:
            return None
        if isinstance(found, Tape):
            results = found.play(tensors)
            return self._function(tensors, told) if results is None else (results, found.other)
        if found is None:
            return self._first(kind, tensors, told)
        returned, tape = record(lambda: self._function(tensors, told), tensors)
        self._found[kind] = tape or _NEVER
        return returned

    def _first(self, kind: Any, tensors: Inputs, told: Any) -> Returned | None:
        if len(self._found) >= _KINDS:
            self._found.clear()
        can = self._can(tensors, told)
        self._found[kind] = _ONCE if can else _NEVER
        return self._function(tensors, told) if can else None
