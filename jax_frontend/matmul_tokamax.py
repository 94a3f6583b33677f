"""Backend "tokamax": the grouped matmul kernels of that package, with block sizes chosen here.

It has two families of kernels, Mosaic (TMA and warpgroup products of Hopper) and Triton, which are called forward only.
Its tuning cache is never asked: it holds nothing for an H200, and what it falls back to there never wins on an H100.

What the kernels leave undone is done here: rows past the last group are never written, so they are set to zero, and
Mosaic takes rows in multiples of 8, so others are padded. What those rows hold matters to no kernel that is chosen: a
row of the product sees itself alone, and Triton's weight gradient loads nothing but a group's own rows.
Source: ops/ragged_dot of tokamax 0.0.17.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moebius.core.errors import BackendUnavailable
from moebius.jax_frontend import matmul, older_triton
from moebius.jax_frontend.operators import varying_like

# Distribution -> the oldest release that serves, and what is the matter with those before it.
OLDEST = {
    "tokamax": ((0, 0, 17), "whose Triton kernels give wrong weight gradients for experts without rows"),
    "jax-triton": ((0, 4, 1), "which tokamax's kernels were never tried with here"),
}
HOPPER = (9, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A kernel with its configuration, and the problems that it is for.

    Attributes:
        operation: "product", in both orientations, or "weight_gradient".
        family: "Mosaic" or "Triton".
        config: names and values of the fields of the family's configuration.
        dtypes: of the operands. capability: of the device; None for any. widths: what both widths are multiples of.
    """

    operation: str
    family: str
    config: tuple[tuple[str, int | bool], ...]
    dtypes: tuple[str, ...]
    capability: tuple[int, int] | None = None
    widths: int = 1

    def fits(self, operation: str, dtype: str, widths: tuple[int, int], capability: tuple[int, int] | None) -> bool:
        """Whether it is for this problem."""
        return (
            operation == self.operation
            and dtype in self.dtypes
            and self.capability in (None, capability)
            and not any(width % self.widths for width in widths)
        )


_HALF, _SINGLE = ("bfloat16", "float16"), ("float32",)


def _mosaic(m: int, n: int, k: int, stages: int) -> tuple[tuple[str, int | bool], ...]:
    """Persistent; neighbouring blocks share rows, 8 columns of blocks at a time."""
    blocks = {"block_m": m, "block_n": n, "block_k": k, "num_stages": stages, "split_k": 1}
    return tuple({**blocks, "persistent": True, "grid_minor_dim": 1, "grid_tile_width": 8}.items())


def _triton(m: int, n: int, k: int, stages: int, warps: int) -> tuple[tuple[str, int | bool], ...]:
    return tuple({"block_m": m, "block_n": n, "block_k": k, "num_stages": stages, "num_warps": warps}.items())


# The first that fits. The last three fit whatever `supports` lets through.
CHOICES = (
    # Measured on an H200, bfloat16, four models' up projections: 593 to 631 TFLOP/s; 413 to 466 with grid_tile_width 1,
    # 231 to 262 with blocks of 128 x 64 x 128. Its loads are tiles of 64 columns.
    Choice(
        operation="product",
        family="Mosaic",
        config=_mosaic(128, 128, 64, stages=4),
        dtypes=_HALF,
        capability=HOPPER,
        widths=64,
    ),
    # It won most often on an H100 in tokamax's own tuning. Mosaic's reaches 174 TFLOP/s on an H200, as measured, copies
    # the rows transposed, and masks by multiplication: NaN beside a group becomes NaN in its gradient.
    Choice(
        operation="weight_gradient",
        family="Triton",
        config=_triton(128, 256, 32, stages=5, warps=8),
        dtypes=_HALF,
        capability=HOPPER,
    ),
    # 64 KiB of shared memory, which every device since 8.0 has; tokamax's own choice where it knows nothing better.
    Choice(operation="product", family="Triton", config=_triton(128, 128, 32, stages=4, warps=4), dtypes=_HALF),
    Choice(operation="weight_gradient", family="Triton", config=_triton(128, 128, 32, stages=4, warps=4), dtypes=_HALF),
    # Float32 proper is multiplied without tensor cores, from registers: smaller blocks. Not tuned.
    Choice(operation="product", family="Triton", config=_triton(64, 64, 32, stages=3, warps=4), dtypes=_SINGLE),
    Choice(operation="weight_gradient", family="Triton", config=_triton(64, 64, 32, stages=3, warps=4), dtypes=_SINGLE),
)


def product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.product. The transposed product copies the weight: tokamax's kernels read one orientation."""
    out = raw_product(rows, weight, group_sizes, transposed)
    inside = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes, dtype=jnp.int32)
    return jnp.where(inside[:, None], out, 0)


def raw_product(rows: Array, weight: Array, group_sizes: Array, transposed: bool = False) -> Array:
    """[R, F]; see Kernels.raw."""
    return _product(rows, weight, group_sizes, choice=choose("product", rows, weight.shape[1:]), transposed=transposed)


def weight_gradient(rows: Array, dout: Array, group_sizes: Array) -> Array:
    """[e, D, F]; see Kernels.weight_gradient."""
    choice = choose("weight_gradient", rows, (rows.shape[1], dout.shape[1]))
    return _weight_gradient(rows, dout, group_sizes, choice=choice)


def choose(operation: str, rows: Array, widths: tuple[int, ...]) -> Choice:
    """The kernel for `operation` on the device of `rows`, between these two widths."""
    problem = operation, str(rows.dtype), (widths[0], widths[1]), matmul.device_of(rows)[1]
    return next(choice for choice in CHOICES if choice.fits(*problem))


# jit: each eager call would otherwise trace and compile its kernel anew.
@partial(jax.jit, static_argnames=("choice", "transposed"))
def _product(rows: Array, weight: Array, group_sizes: Array, choice: Choice, transposed: bool) -> Array:
    out = _call(choice, _padded(rows, choice), weight, group_sizes, ((1,), (2 if transposed else 1,)), group=(0,))
    return out[: rows.shape[0]]


@partial(jax.jit, static_argnames="choice")
def _weight_gradient(rows: Array, dout: Array, group_sizes: Array, choice: Choice) -> Array:
    return _call(choice, rows, dout, group_sizes, ((0,), (0,)), group=())


def _padded(rows: Array, choice: Choice) -> Array:
    """For Mosaic a multiple of 8 rows, which it slices in tiles, and at least one block, which it loads whole."""
    if choice.family != "Mosaic":
        return rows
    wanted = max(dict(choice.config)["block_m"], -(-rows.shape[0] // 8) * 8)
    return lax.pad(rows, lax.full_like(rows, 0, shape=()), ((0, wanted - rows.shape[0], 0), (0, 0, 0)))


def _call(
    choice: Choice, a: Array, b: Array, sizes: Array, contracted: tuple[tuple[int], tuple[int]], group: tuple[int, ...]
) -> Array:
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=group
    )
    name = f"Pallas{choice.family}RaggedDot"
    gpu = load()
    kernel = getattr(gpu, name)(config=getattr(gpu, f"{name}Config")(**dict(choice.config)))
    out: Array = kernel(
        a,
        b,
        group_sizes=sizes.astype(jnp.int32),
        ragged_dot_dimension_numbers=dimensions,
        precision=lax.Precision.HIGHEST,  # float32 not in TF32, Triton's default; of 16-bit operands it changes nothing
        preferred_element_type=a.dtype,
    )
    return varying_like(out, a)


def load() -> Any:
    """tokamax's module of GPU kernels, after a look at its version and at jax-triton.

    Raises:
        BackendUnavailable: tokamax or jax-triton is too old, or jax-triton was imported without its NVIDIA half.
            Otherwise whatever an import raises.
    """
    for package in OLDEST:
        check_version(package, version(package))  # of its metadata: before triton is changed for what it imports
    older_triton.name_tf32()
    older_triton.check_jax_triton()
    older_triton.unpack_strides()
    return import_module("tokamax.ops.gpu")


def check_version(package: str, found: str) -> None:
    """That version of tokamax or jax-triton computes what the backend promises.

    Raises:
        BackendUnavailable: it is older.
    """
    release, wrong = OLDEST[package]
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < release:
        oldest = ".".join(map(str, release))
        raise BackendUnavailable(
            "tokamax's grouped matmul",
            f"{package} {found}, {wrong}, not {oldest} or newer",
            f"pip install '{package}>={oldest}', which needs Python 3.12 and jax 0.11.1 or later",
        )
