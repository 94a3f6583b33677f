"""Launches played by Triton's interpreter, on NumPy's arrays: what the kernels compute, without a device, slowly.

TRITON_INTERPRET=1 has to be set before triton is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np

from moebius.core.errors import Unsupported
from moebius.core.kernels.plan import Launch

# The interpreter keeps where in its grid it is, and Triton's words in its own meaning, for the whole process; JAX's
# devices call back from threads of their own.
_ONE_BY_ONE = Lock()


def play(
    launch: Launch,
    arguments: Sequence[np.ndarray | int],
    results: Sequence[tuple[tuple[int, ...], str]],
) -> list[np.ndarray]:
    """What the kernel writes; of several threads one has its kernel played after the other.

    Args:
        arguments: arrays, and numbers. results: (shape, dtype) of each array that is written.
    Raises:
        Unsupported: kernels of Gluon.
    """
    if launch.blocks:
        raise Unsupported(
            f"the kernel {launch.kernel!r}", "Triton's interpreter, which has no Gluon", "run it on Hopper"
        )
    given = [value if isinstance(value, int) else np.ascontiguousarray(value) for value in arguments]
    written = [_unwritten(shape, dtype) for shape, dtype in results]
    file, function = launch.kernel.split(".")
    with _ONE_BY_ONE:
        mend()
        kernel = getattr(import_module(f"moebius.core.kernels.{file}"), function)
        pointers = [value if isinstance(value, int) else _pointer(value) for value in (*given, *written)]
        kernel[(launch.programs,)](*pointers, **launch.constants, **launch.options())
    return written


def _unwritten(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory in which shows what is read before it is written."""
    kind = np.dtype(dtype)
    return np.full(shape, np.nan if kind.kind == "f" else np.iinfo(kind).max, kind)


def _pointer(array: np.ndarray) -> Any:
    """A pointer as the interpreter has them: an array of one address, and a type."""
    language, interpreter = import_module("triton.language"), import_module("triton.runtime.interpreter")
    kind = language.pointer_type(getattr(language, array.dtype.name))
    address = np.array([array.ctypes.data], np.uint64)
    return language.tensor(interpreter.TensorHandle(address, kind), kind)


@cache
def mend() -> None:
    """Let a loop's bound be a number from memory, in this process.

    The interpreter keeps scalars as arrays of one element and makes loop bounds of them by int(), which NumPy 2.4
    refuses: https://github.com/triton-lang/triton/issues/9171, mended in Triton 3.7.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
