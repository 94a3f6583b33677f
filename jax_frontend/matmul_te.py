"""Backend "te": Transformer Engine's grouped GEMM on the stacked weights as they lie, in either orientation.

The package has two. V2 is one cuBLASLt call that finds the group sizes on the device; it takes bfloat16 and leaves
rows past the last group unwritten. V1 waits for the device, reads the sizes on the host and runs one GEMM an expert;
it wants the sizes to add up to all rows, so rows past the end are given to the last expert, in sums as zeros.

The package itself takes V2 where it was built with a cuBLAS that has it, and raises at run time where the one that is
loaded does not. `load` asks the loaded one beforehand.
Source: jax/dense.py and jax/cpp_extensions/gemm.py of Transformer Engine 2.20.2.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moebius.core.errors import BackendUnavailable, Unsupported
from moebius.jax_frontend.operators import varying_like

OLDEST = (2, 20, 2)
# Before 13.4 cuBLASLt has no grouped GEMM on Hopper; up to 13.7 a replayed CUDA graph with two of them may hang, and
# from 13.7.0 to 13.8.0 they may corrupt data.
OLDEST_CUBLASLT = 130801
_GEMM = "transformer_engine.jax.cpp_extensions.gemm"  # by its name: the package's attribute `gemm` is a function
_FLAG = "_v2_grouped_gemm_available"


class Path(NamedTuple):
    """Which of the two grouped GEMMs serves.

    Attributes:
        name: "V1" or "V2". why: in words.
    """

    name: str
    why: str


def product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.product. `weight` is read as it lies, transposed or not."""
    return jnp.where(_inside(rows, group_sizes), raw_product(rows, weight, group_sizes, transposed), 0)


def raw_product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.raw."""
    if path(rows.dtype).name == "V1":
        group_sizes = _all_rows(rows, group_sizes)  # whatever they hold: each row of the output is of its own row alone
    return _grouped_gemm((rows, group_sizes), (weight, None), ((1,), (2 if transposed else 1,)))


def weight_gradient(rows: Array, dout: Array, group_sizes: Array) -> Array:
    """[e, D, F]; see Kernels.weight_gradient."""
    if path(rows.dtype).name == "V1":
        inside_R1 = _inside(rows, group_sizes)
        rows, dout = jnp.where(inside_R1, rows, 0), jnp.where(inside_R1, dout, 0)
    return raw_weight_gradient(rows, dout, group_sizes)


def raw_weight_gradient(rows: Array, dout: Array, group_sizes: Array) -> Array:
    """[e, D, F]; see Kernels.raw."""
    if path(rows.dtype).name == "V2":
        dweight = _grouped_gemm((rows, group_sizes), (dout, group_sizes), ((0,), (0,)))
        # Whether the library writes zeros where it has nothing to add differs from version to version.
        return jnp.where((group_sizes > 0)[:, None, None], dweight, 0)
    sizes = _all_rows(rows, group_sizes)
    return _grouped_gemm((rows, sizes), (dout, sizes), ((0,), (0,)))


def path(dtype: Any) -> Path:
    """Which grouped GEMM takes operands of `dtype` here, and why. The package has to be loaded."""
    name = jnp.dtype(dtype).name
    against = _against_v2() if name == "bfloat16" else f"V2 takes bfloat16 alone, not {name}"
    if against is None:
        return Path("V2", "group sizes stay on the device")
    return Path("V1", f"group sizes are read on the host at each product: {against}")


def described() -> str:
    """The path of each dtype in words, for `moebius doctor`."""
    return "; ".join("{} takes {}: {}".format(dtype, *path(dtype)) for dtype in ("bfloat16", "float16"))


def load() -> None:
    """Load the package, and tell it to take V1 where V2 would fail.

    Raises:
        BackendUnavailable: it is too old. Otherwise whatever its import raises: OSError where a library is missing.
    """
    check_version()
    if _against_v2() is not None:
        _force_v1()


def check_version() -> None:
    """The package loads and is of a version whose functions take moebius' arguments.

    Raises:
        BackendUnavailable: it is older. Otherwise whatever its import raises.
    """
    import transformer_engine
    import transformer_engine.jax

    found = str(transformer_engine.__version__)
    if _release(found) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendUnavailable(
            "Transformer Engine in Flax", f"transformer_engine {found}, not {oldest} or newer", "upgrade it"
        )


def refuse_checked(what: str, *arrays: Array) -> None:
    """Refuse what Transformer Engine's own derivative rules would get wrong inside a checked shard_map.

    Its primitives return arrays that JAX takes for equal on all devices. The gradient of a replicated array would then
    lack the sum over the devices, and nothing would tell.

    Args:
        what: is computed. arrays: of what.
    Raises:
        Unsupported: one of them varies over a mesh axis, which is known with check_vma=True alone.
    """
    if any(jax.typeof(array).manual_axis_type.varying for array in arrays):
        raise Unsupported(
            f"{what} inside shard_map with check_vma=True",
            "Transformer Engine does not mark what its results vary over, and sums of gradients would be left out",
            "pass check_vma=False to jax.shard_map, or leave the backend out",
        )


def row_experts(n_rows: int, group_sizes: Array) -> Array:
    """[R] int32: each row's expert, e past the end: how many experts' rows end at or before it."""
    ends_e = jnp.cumsum(group_sizes, dtype=jnp.int32)
    return jnp.cumsum(jnp.zeros(n_rows, jnp.int32).at[ends_e].add(1, mode="drop"), dtype=jnp.int32)


@cache
def _against_v2() -> str | None:
    """Why V2 cannot serve here, in words; None where it can."""
    import transformer_engine_jax as library

    if not vars(sys.modules[_GEMM]).get(_FLAG, True):
        return "Transformer Engine was built without V2, which needs cuBLAS 13.2"
    capability = min(library.get_device_compute_capability(i) for i in range(len(jax.local_devices())))
    if capability < 90:
        return f"V2 needs compute capability 9.0, not {capability / 10}"
    found = int(library.get_cublasLt_version())
    if found < OLDEST_CUBLASLT:
        return f"V2 needs cuBLASLt {_words(OLDEST_CUBLASLT)}, and {_words(found)} is loaded"
    return None


def _force_v1() -> None:
    """Make the package take V1 in this process, for its other callers too: on V2 they would fail.

    It has no switch for that; this is the flag that it sets itself where it was built without V2.

    Raises:
        BackendUnavailable: there is no such flag.
    """
    module = sys.modules[_GEMM]
    if not hasattr(module, _FLAG):
        found = f"V2 would be taken and cannot run: {_against_v2()}; and this version has no {_FLAG}"
        raise BackendUnavailable("Transformer Engine's grouped GEMM in Flax", found, "install a newer nvidia-cublas")
    setattr(module, _FLAG, False)


def _release(version: str) -> tuple[int, ...]:
    """(2, 20, 0) of "2.20rc1"."""
    numbers = re.findall(r"\d+", re.split(r"[^\d.]", version)[0])
    return tuple(int(number) for number in (*numbers, 0, 0, 0)[:3])


def _words(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _inside(rows: Array, group_sizes: Array) -> Array:
    """[R, 1]: whether a row belongs to an expert."""
    return (jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32))[:, None]


def _all_rows(rows: Array, group_sizes: Array) -> Array:
    """The sizes with the rows past the end given to the last expert."""
    return group_sizes.at[-1].add(rows.shape[0] - jnp.sum(group_sizes, dtype=group_sizes.dtype))


def _grouped_gemm(
    a: tuple[Array, Array | None], b: tuple[Array, Array | None], contracted: tuple[tuple[int], tuple[int]]
) -> Array:
    """One product an expert, in the operands' dtype; each operand with its group sizes, None where it has one a group.

    `grouped_dense` of the package would do too, but its backward pass computes both gradients at once.
    """
    from transformer_engine.jax.cpp_extensions import grouped_gemm
    from transformer_engine.jax.quantize import GroupedNoScaleTensor

    operands = [
        GroupedNoScaleTensor(
            data=data,
            amax=None,
            first_dims=None if sizes is None else sizes.astype(jnp.int32),
            last_dims=None,
            original_shape=data.shape,
        )
        for data, sizes in (a, b)
    ]
    return varying_like(grouped_gemm(*operands, contracting_dims=contracted), a[0])
