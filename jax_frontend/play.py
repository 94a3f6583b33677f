"""Launches of core.kernels.plan as nodes of an XLA program: by jax-triton, or Triton's interpreter where that is on."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moebius.core.errors import BackendUnavailable
from moebius.core.kernels import interpreter, plan_grouped
from moebius.core.kernels.lookup import block_layout, kernel_of
from moebius.core.kernels.plan import Launch
from moebius.jax_frontend import older_triton
from moebius.jax_frontend.operators import opaque, varying_like

OLDEST = {"jax-triton": (0, 4, 1), "jaxlib": (0, 11, 1)}
Shapes = tuple[tuple[tuple[int, ...], str], ...]


def run(launch: Launch, *arguments: Any, out: Any) -> tuple[Array, ...]:
    """Call one launch, of a problem without elements not at all: its results are zeros.

    Args:
        arguments: arrays, then numbers, as the kernel has them before its results; numbers are part of the program.
        out: jax.ShapeDtypeStruct, or a tuple of them, of what the kernel writes.
    """
    results = tuple(out) if isinstance(out, tuple) else (out,)
    arrays = [value for value in arguments if not isinstance(value, int)]
    if not launch.programs or any(0 in array.shape for array in (*arrays, *results)):
        return tuple(varying_like(jnp.zeros(result.shape, result.dtype), arrays[0]) for result in results)
    places = tuple(None if isinstance(value, int) else at for at, value in enumerate(arguments))
    numbers = tuple(value if place is None else None for value, place in zip(arguments, places, strict=True))
    shapes = tuple((result.shape, str(jnp.dtype(result.dtype))) for result in results)
    found: tuple[Array, ...] = tuple(_KERNEL.bind(*arrays, launch=launch, numbers=numbers, shapes=shapes))
    return found


def _play(*arrays: Array, launch: Launch, numbers: tuple[int | None, ...], shapes: Shapes) -> list[Array]:
    if plan_grouped.interpreted():
        return _interpreted(arrays, launch, numbers, shapes)
    described = [descriptor(array, block) for array, block in zip(arrays, launch.blocks, strict=False)]
    given = iter([*described, *arrays[len(described) :]])
    arguments = [next(given) if number is None else number for number in numbers]
    found = import_module("jax_triton").triton_call(
        *arguments,
        kernel=kernel_of(launch.kernel),
        out_type=_declared(shapes),
        grid=(launch.programs,),
        backend_options=launch.options(),
        **launch.constants,
    )
    return [varying_like(array, arrays[0]) for array in found]


def _interpreted(
    arrays: tuple[Array, ...], launch: Launch, numbers: tuple[int | None, ...], shapes: Shapes
) -> list[Array]:
    def play(*arrays: Any) -> list[np.ndarray]:
        given = iter(arrays)
        arguments = [np.asarray(next(given)) if number is None else number for number in numbers]
        return interpreter.play(launch, arguments, shapes)

    found = jax.pure_callback(play, list(_declared(shapes)), *arrays)
    return [varying_like(array, arrays[0]) for array in found]


def _declared(shapes: Shapes) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes)


_KERNEL = opaque("moebius_kernel", _play, static=("launch", "numbers", "shapes"))


def load() -> None:
    """Make jax-triton ready for these kernels.

    Raises:
        BackendUnavailable: jax-triton or jaxlib is too old. Otherwise whatever an import raises.
    """
    for package, oldest in OLDEST.items():
        found = version(package)
        if tuple(map(int, re.findall(r"\d+", found)[:3])) < oldest:
            wanted = ".".join(map(str, oldest))
            do = f"pip install '{package}>={wanted}', on Python 3.12"
            raise BackendUnavailable("moebius' kernels in JAX", f"{package} {found}, not {wanted} or newer", do)
    older_triton.name_tf32()
    older_triton.check_jax_triton()
    older_triton.take_gluon()


def descriptor(operand: Array, block: tuple[int, ...]) -> Any:
    """How the tensor memory accelerator finds blocks of an operand, made on the host: in no memory of the device."""
    return import_module("jax_triton").TensorDescriptor.from_array(operand, block, block_layout(len(block)))
