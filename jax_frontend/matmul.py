"""Steps 5 and 7: one matrix per expert; and the plain dense projection.

Every backend is a pair of kernels, `product` and `weight_gradient`, behind one pair of operators that are each other's
derivatives. So forward mode, reverse mode, every order and mix of them, jit, vmap and shard_map work the same for every
backend.

Every product asks for precision "highest": float32 then means float32 also on a GPU, where JAX's default is TF32 and
PyTorch's is not. For 16-bit operands it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from math import prod
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax import Array, lax
from jax.extend.backend import get_default_device
from jax.extend.core import Primitive

from moebius.core import checks, measured
from moebius.core.kernels import plan_grouped
from moebius.core.registry import Backend, Problem, Registry, layer_of, sizes
from moebius.jax_frontend.checks import check_group_sizes
from moebius.jax_frontend.operators import bilinear, call, contract

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_WITH = "+"  # between a backend's name and what the caller's context asks of it


class Kernels(NamedTuple):
    """One backend of the grouped matmul, for at least one row and one expert.

    Functions of their arguments alone, which JAX can trace: a trace is kept for the next call of the same shapes, and
    lowered later than it is made, so that a context in force at the call may be gone. What they return is rounded out
    of XLA's sight, which might leave the rounding out where a cast back follows: see dtypes.widened.

    Attributes:
        product: (rows [R, D], weight [e, D, F], group_sizes [e], transposed) -> [R, F]; rows past the end zero.
            `transposed`: weight is [e, F, D]; a flag, because XLA would copy all of weight.mT before the first block.
        weight_gradient: (rows [R, D], dout [R, F], group_sizes [e]) -> [e, D, F]; empty experts zero.
        devices: whether they can only be lowered for devices that are present; see operators.bilinear.
        raw: both again without their masks of the rows past the end, which are passes over memory: the product leaves
            anything there, and the weights' gradient is given zeros there. None where there is nothing to leave out.
    """

    product: Callable[[Array, Array, Array, bool], Array]
    weight_gradient: Callable[[Array, Array, Array], Array]
    devices: bool = False
    raw: tuple[Callable[[Array, Array, Array, bool], Array], Callable[[Array, Array, Array], Array]] | None = None


def grouped_matmul(
    rows_RD: Float[Array, "R D"],
    weight_eDF: Float[Array, "e D F"],
    group_sizes_e: Int[Array, " e"],
    *,
    backend: str | None = None,
) -> Array:
    """Multiply each group of rows by its own expert's matrix.

    Spec: core.reference.grouped_matmul. Source: MegaBlocks, arXiv:2211.15841.

    Args:
        rows_RD: rows sorted by expert; float64, float32, bfloat16 or float16. Rows past
            sum(group_sizes_e) are padding: whatever they hold, inf and NaN too, touches nothing.
        weight_eDF: one matrix an expert, x @ W orientation; dtype of rows_RD.
        group_sizes_e: rows of each expert; int32, >= 0, sum <= R. Unit: rows.
        backend: a registered name, or None for the first declared that supports this problem: of a product alone,
            without the steps round it, nothing was measured.
    Returns:
        [R, F], dtype of rows_RD, accumulated in promote_types(dtype, float32); padding rows are zero.
    Raises:
        ShapeError, DTypeError: an axis named twice has two sizes; dtypes differ.
        ConfigError, BackendUnavailable, Unsupported: `backend` was named and cannot serve; says why.
    """
    checks.grouped_matmul(rows_RD, weight_eDF, group_sizes_e)
    check_group_sizes(group_sizes_e, rows_RD.shape[0])
    name = choose(backend, rows_RD, weight_eDF.shape).name
    return product(name, rows_RD, weight_eDF, group_sizes_e)


def linear(x: Array, weight_FD: Float[Array, "F D"], bias_F: Float[Array, " F"] | None = None) -> Array:
    """x @ weight^T + bias in x's dtype, with the output-major weight of dense projections cast to it.

    Args:
        x: [..., D]. weight_FD: [F, D]. bias_F: [F] or None.
    """
    leading = ascii_lowercase[: x.ndim - 1]
    out = contract(x, weight_FD.astype(x.dtype), (leading + "D", "FD", leading + "F"))
    if bias_F is not None:
        out = out + bias_F.astype(x.dtype).astype(out.dtype)
    return out.astype(x.dtype)


def choose(
    backend: str | None, rows: Array, weight_shape: Any, down_shape: Any = None, n_rows: int | None = None
) -> Backend:
    """The registry row that serves `rows` against a weight of shape [e, D, F]; see Registry.choose.

    Inside of Transformer Engine's autocast its name is "te" with the recipe, which `product` understands.

    Args:
        backend: a registered name, None, or what registry.of_layer made. rows: of the rows' dtype, and on their device.
        weight_shape: of one product or, with `down_shape`, [e, D, U] of the up projection of experts: one backend for
            both of their products.
        down_shape: [e, I, D]. n_rows: R, of all experts; None for many, as in training.
    """
    if n_rows is None and layer_of(backend) is not None:
        n_rows = rows.shape[0]
    backend, shape, n_rows = sizes(backend, weight_shape, down_shape, n_rows)
    told = str(rows.dtype), shape, measured.bucket(n_rows), may_be_split(rows)
    found = _choose(backend, *device_of(rows), *told)
    return replace(found, name=_in_context(found.name)) if found.name == "te" else found


@lru_cache(maxsize=4096)
def _choose(
    backend: str | None,
    device: str,
    capability: tuple[int, int] | None,
    dtype: str,
    shape: tuple[int, ...],
    n_rows: int | None,
    split: bool,
) -> Backend:
    """`shape`: [e, D, F], or [e, D, I, U] of experts."""
    problem = Problem(
        device=device,
        dtype=dtype,
        dim=shape[1],
        inter_dim=shape[2],
        n_experts=shape[0],
        capability=capability,
        up_width=shape[3] if len(shape) == 4 else None,
        rows=n_rows,
        split=split,
    )
    return BACKENDS.choose(backend, problem)


def may_be_split(rows: Any) -> bool:
    """Whether XLA may split what is computed from `rows` over devices.

    Not what lies on one device, nor inside of a shard_map over all axes of its mesh; while tracing elsewhere, nothing
    tells how many devices the program will span, so wherever there are several.
    """
    if isinstance(rows, Array) and not isinstance(rows, jax.core.Tracer):
        return len(rows.devices()) > 1
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return prod(size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes) > 1
    return jax.device_count() > 1


def device_of(rows: Any) -> tuple[str, tuple[int, int] | None]:
    """Kind and compute capability of the device of `rows`; while tracing, of the mesh in force, else JAX's default's.

    What is traced says nothing of where its arguments lie: where jit is to run on a CPU beside a GPU by its arguments
    alone, set jax.default_device, or name the backend.
    """
    traced = isinstance(rows, jax.core.Tracer) or not isinstance(rows, Array)
    device = _device_while_tracing() if traced else next(iter(rows.devices()))
    if device.platform != "gpu":
        return device.platform, None
    major, _, minor = str(device.compute_capability).partition(".")
    return ("cuda", (int(major), int(minor))) if minor else ("rocm", None)  # AMD's is a name, such as "gfx942"


def _device_while_tracing() -> Any:
    device, mesh = get_default_device(), jax.sharding.get_abstract_mesh()
    here = None if mesh.empty else mesh.abstract_device
    if here is None or here.platform == device.platform:
        return device
    return jax.local_devices(backend=here.platform)[0]


def product(
    backend_name: str, rows: Array, weight: Array, group_sizes: Array, transposed: bool = False, raw: bool = False
) -> Array:
    """[R, F], differentiable in rows and weight in every mode; see Kernels.product, and Kernels.raw."""
    operator, _ = _operators(_kernels(backend_name).devices)
    return call(operator, rows, weight, group_sizes, backend=backend_name, transposed=transposed, raw=raw)


def weight_gradient(backend_name: str, rows: Array, dout: Array, group_sizes: Array, raw: bool = False) -> Array:
    """[e, D, F], differentiable in rows and dout in every mode; see Kernels.weight_gradient, and Kernels.raw."""
    _, operator = _operators(_kernels(backend_name).devices)
    return call(operator, rows, dout, group_sizes, backend=backend_name, raw=raw)


def _run_product(rows: Array, weight: Array, group_sizes: Array, *, backend: str, transposed: bool, raw: bool) -> Array:
    if 0 in (rows.shape[0], weight.shape[0]):
        return lax.full_like(rows, 0, shape=(rows.shape[0], weight.shape[1 if transposed else 2]))
    kernels = _kernels(backend)
    run = kernels.raw[0] if raw and kernels.raw else kernels.product
    return run(rows, weight, group_sizes, transposed)


# Of derivatives nothing is known past the end: they are never raw.
def _product_drows(
    dout: Array, weight: Array, group_sizes: Array, *, backend: str, transposed: bool, raw: bool
) -> Array:
    return product(backend, dout, weight, group_sizes, not transposed)


def _product_dweight(
    dout: Array, rows: Array, group_sizes: Array, *, backend: str, transposed: bool, raw: bool
) -> Array:
    pair = (dout, rows) if transposed else (rows, dout)
    return weight_gradient(backend, *pair, group_sizes)


def _run_weight_gradient(rows: Array, dout: Array, group_sizes: Array, *, backend: str, raw: bool) -> Array:
    if 0 in (rows.shape[0], group_sizes.shape[0]):
        return lax.full_like(rows, 0, shape=(group_sizes.shape[0], rows.shape[1], dout.shape[1]))
    kernels = _kernels(backend)
    run = kernels.raw[1] if raw and kernels.raw else kernels.weight_gradient
    return run(rows, dout, group_sizes)


def _weight_gradient_drows(dweight: Array, dout: Array, group_sizes: Array, *, backend: str, raw: bool) -> Array:
    return product(backend, dout, dweight, group_sizes, True)


def _weight_gradient_ddout(dweight: Array, rows: Array, group_sizes: Array, *, backend: str, raw: bool) -> Array:
    return product(backend, rows, dweight, group_sizes)


@cache
def _operators(devices: bool) -> tuple[Primitive, Primitive]:
    """(product, weight_gradient), one pair for the kernels that need devices and one for the others."""
    of_product, of_weights = (_product_drows, _product_dweight), (_weight_gradient_drows, _weight_gradient_ddout)
    operator = partial(bilinear, others=1, devices=devices)
    return (
        operator("grouped_product", _run_product, of_product, static=("backend", "transposed", "raw")),
        operator("grouped_weight_gradient", _run_weight_gradient, of_weights, static=("backend", "raw")),
    )


def _kernels(backend: str) -> Kernels:
    name, _, recipe = backend.partition(_WITH)
    kernels: Kernels = BACKENDS.implementation(BACKENDS[name])
    return _quantised(recipe) if recipe else kernels


def _in_context(name: str) -> str:
    from moebius.jax_frontend import matmul_te_fp8

    recipe = matmul_te_fp8.asked()
    return f"{name}{_WITH}{recipe}" if recipe else name


def _quantised(recipe: str) -> Kernels:
    from moebius.jax_frontend import matmul_te_fp8 as backend

    how = backend.recipe_of(recipe)
    kernels = partial(backend.product, recipe=how), partial(backend.weight_gradient, recipe=how)
    return Kernels(*kernels, devices=True)


def _load_tokamax() -> Kernels:
    from moebius.jax_frontend import matmul_tokamax as backend

    backend.load()
    return Kernels(backend.product, backend.weight_gradient, raw=(backend.raw_product, backend.weight_gradient))


def _load_loop() -> Kernels:
    from moebius.jax_frontend import matmul_loop as backend

    return Kernels(backend.product, backend.weight_gradient)


def _load_ragged_dot() -> Kernels:
    from moebius.jax_frontend import matmul_ragged_dot as backend

    return Kernels(backend.product, backend.weight_gradient)


def _load_te() -> Kernels:
    from moebius.jax_frontend import matmul_te as backend

    backend.load()
    raw = backend.raw_product, backend.raw_weight_gradient
    return Kernels(backend.product, backend.weight_gradient, devices=True, raw=raw)


def _load_triton() -> Kernels:
    from moebius.jax_frontend import matmul_triton as backend
    from moebius.jax_frontend import play

    play.load()
    return Kernels(backend.product, backend.weight_gradient, raw=(backend.raw_product, backend.weight_gradient))


def _te_says() -> str:
    from moebius.jax_frontend.matmul_te import described

    return described()


def _te_supports(problem: Problem) -> str | None:
    if problem.dtype == "float64":
        return "Transformer Engine has no float64"
    if problem.dtype == "float32":
        return "Transformer Engine multiplies float32 in TF32, with 10 bits, and moebius asks JAX for all of them"
    if problem.dim % 8 or problem.inter_dim % 8:
        widths = f"D={problem.dim}, I={problem.inter_dim}"
        return f"cuBLAS's grouped GEMM takes rows of a multiple of 16 bytes, which is 8 numbers, not {widths}"
    return _cuda("Transformer Engine", problem, (8, 0))


def _tokamax_supports(problem: Problem) -> str | None:
    if problem.dtype == "float64":
        return "tokamax's kernels have no float64"
    return _cuda("tokamax", problem, (8, 0))


def _cuda(what: str, problem: Problem, least: tuple[int, int]) -> str | None:
    """Why a package for CUDA does not serve."""
    if problem.device != "cuda":
        return f"{what} computes on CUDA, not on {problem.device}"
    if problem.capability is not None and problem.capability < least:
        wanted, found = (".".join(map(str, pair)) for pair in (least, problem.capability))
        return f"{what} needs CUDA compute capability {wanted}, not {found}"
    return None


BACKENDS = Registry("moebius.jax_frontend", "grouped_matmul", partial(measured.order, "jax"))
BACKENDS.add(
    name="tokamax",
    load=_load_tokamax,
    needs=("tokamax", "jax_triton", "triton"),
    install="pip install 'tokamax>=0.0.17' 'jax-triton>=0.4.1', on Python 3.12 and jax 0.11.1 or later (beside torch "
    "2.11, which pins triton 3.6, jax-triton with --no-deps)",
    supports=_tokamax_supports,
    note="tokamax's kernels: on Hopper Mosaic's for the products; Triton's for the weights' gradient and elsewhere",
)
BACKENDS.add(name="loop", load=_load_loop, note="blocks of rows, one expert each; any dtype, cost follows the rows")
BACKENDS.add(
    name="ragged_dot",
    load=_load_ragged_dot,
    only_when_named=True,
    note="jax.lax.ragged_dot: every row times every expert on a CPU; NaN in one expert's matrix reaches every row",
)
BACKENDS.add(
    name="te",
    load=_load_te,
    needs=("transformer_engine",),
    install="pip install --no-build-isolation 'transformer-engine[jax]>=2.20.2'",
    supports=_te_supports,
    only_when_named=True,
    reads_host=True,
    note="Transformer Engine's grouped GEMM; FP8 inside its autocast; reads sizes on the host before cuBLAS 13.8.1",
    says=_te_says,
)
BACKENDS.add(
    name="triton",
    load=_load_triton,
    needs=("jax_triton", "triton"),
    install="pip install 'jax-triton>=0.4.1', on Python 3.12 and jax 0.11.1 or later (beside torch 2.11, which pins "
    "triton 3.6, with --no-deps)",
    supports=plan_grouped.against,
    when_measured=True,
    unsplit=True,
    note="moebius' own kernels for every step, with the bits of the PyTorch frontend's; fast where those are; over "
    "several devices in a shard_map alone",
)
