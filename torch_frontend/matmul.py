"""Steps 5 and 7: one matrix per expert; and the plain dense projection.

Every backend is a pair of kernels, `product` and `weight_gradient`, behind one pair of `torch.library` operators that
are each other's derivatives. So autograd, double backward and torch.compile work the same for every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moebius.core import checks, measured
from moebius.core.kernels import plan_grouped
from moebius.core.registry import Backend, Problem, Registry, layer_of, sizes
from moebius.torch_frontend import dtypes
from moebius.torch_frontend.checks import check_group_sizes
from moebius.torch_frontend.operators import call, differentiate

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_ANY = ""  # operators take no optional string
_WITH = "+"  # between a backend's name and what the caller's context asks of it


class Fused(NamedTuple):
    """Products of one backend with the activation, or its derivative, inside; for at least one row and one expert.

    Attributes:
        serves: down [e, I, D] -> whether both compute such experts.
        up: (rows [R, D], up [e, D, U], prepared, row weights [R] or None, activation, bias [e, U] or None)
            -> (hidden [R, U] with its bias, act [R, I]).
        down_gradient: (dout [R, D], down [e, I, D], prepared, hidden, row weights [R], activation, in_place)
            -> (dhidden, act, dots [R, B] float32, the parts of the row weights' gradients).
    """

    serves: Callable[[Tensor], bool]
    up: Callable[..., tuple[Tensor, Tensor]]
    down_gradient: Callable[..., tuple[Tensor, Tensor, Tensor]]


class Packed(NamedTuple):
    """What a backend prepared of group sizes, as tensors, and the rest of it: hashable, the same for equal sizes."""

    tensors: tuple[Tensor, ...]
    form: tuple[Any, ...]


class Kernels(NamedTuple):
    """One backend of the grouped matmul, for at least one row and one expert.

    Attributes:
        prepare: group_sizes [e] -> what the two others take for them, made once for several products.
        product: (rows [R, D], weight [e, D, F] in any layout, prepared) -> [R, F]; rows past the end hold anything.
        weight_gradient: (rows [R, D], dout [R, F], prepared) -> [e, D, F]; empty experts zero.
        fused: what it computes together; None for nothing.
        pack, unpack: prepared -> Packed, and (group_sizes [e], Packed) -> prepared, of a backend that launches kernels
            of core.kernels and does nothing else; None for another.
    """

    prepare: Callable[[Tensor], Any]
    product: Callable[[Tensor, Tensor, Any], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Any], Tensor]
    fused: Fused | None = None
    pack: Callable[[Any], Packed] | None = None
    unpack: Callable[[Tensor, Packed], Any] | None = None


def grouped_matmul(
    rows_RD: Float[Tensor, "R D"],
    weight_eDF: Float[Tensor, "e D F"],
    group_sizes_e: Int[Tensor, " e"],
    *,
    backend: str | None = None,
) -> Tensor:
    """Multiply each group of rows by its own expert's matrix.

    Spec: core.reference.grouped_matmul. Source: MegaBlocks, arXiv:2211.15841.

    Args:
        rows_RD: rows sorted by expert; float64 ("loop"), float32, bfloat16 or float16. Rows past
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
    told = in_context(backend)
    if _WITH in told:  # there a transposed view says that an input gradient is asked for
        weight_eDF = weight_eDF.contiguous()
    # Resolved inside the operator, at run time, so that torch.compile does not trace the registry.
    out_RF: Tensor = call(_product, rows_RD, weight_eDF, group_sizes_e, told)
    return out_RF


def linear(
    x: Tensor,
    weight_FD: Float[Tensor, "F D"],
    bias_F: Float[Tensor, " F"] | None = None,
    *,
    autocast: bool = True,
) -> Tensor:
    """x @ weight^T + bias in x's dtype, with the output-major weight of dense projections cast to it.

    Args:
        x: [..., D]. weight_FD: [F, D]. bias_F: [F] or None.
        autocast: inside torch.autocast compute in its dtype, as torch.nn.Linear does; False for x's dtype there too.
    """
    bias_F = None if bias_F is None else bias_F.to(x.dtype)
    if autocast or not dtypes.autocast(x.device.type):
        return F.linear(x, weight_FD.to(x.dtype), bias_F)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight_FD.to(x.dtype), bias_F)


def choose(
    backend: str | None, rows: Tensor, weight_shape: Any, down_shape: Any = None, n_rows: int | None = None
) -> Backend:
    """The registry row that serves `rows` against a weight of shape [e, D, F]; see Registry.choose.

    Args:
        backend: a registered name, None, or what registry.of_layer made. rows: of the rows' dtype, and on their device.
        weight_shape: of one product or, with `down_shape`, [e, D, U] of the up projection of experts: one backend for
            both of their products.
        down_shape: [e, I, D]. n_rows: R, of all experts; None for many, as in training.
    """
    if n_rows is None and layer_of(backend) is not None:
        n_rows = rows.shape[0]
    backend, shape, n_rows = sizes(backend, weight_shape, down_shape, n_rows)
    where = _kind(rows.device), _capability(rows.device)
    return _choose(backend, *where, str(rows.dtype), shape, measured.bucket(n_rows))


@lru_cache(maxsize=4096)
def _choose(
    backend: str | None,
    device: str,
    capability: tuple[int, int] | None,
    dtype: str,
    shape: tuple[int, ...],
    n_rows: int | None,
) -> Backend:
    """`shape`: [e, D, F], or [e, D, I, U] of experts."""
    problem = Problem(
        device=device,
        dtype=dtype.removeprefix("torch."),
        dim=shape[1],
        inter_dim=shape[2],
        n_experts=shape[0],
        capability=capability,
        up_width=shape[3] if len(shape) == 4 else None,
        rows=n_rows,
    )
    return BACKENDS.choose(backend, problem)


def _kind(device: torch.device) -> str:
    """ROCm's devices call themselves CUDA's."""
    return "rocm" if device.type == "cuda" and torch.version.hip is not None else device.type


def _capabilities() -> list[tuple[int, int]]:
    """Of the devices that are here."""
    return [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@torch.library.custom_op(
    "moebius::grouped_matmul",
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor group_sizes, str backend) -> Tensor",
)
def _product(rows: Tensor, weight: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    if 0 in (rows.shape[0], weight.shape[0]):
        return rows.new_zeros(rows.shape[0], weight.shape[2])
    chosen = kernels(backend, rows, weight.shape)
    with dtypes.on(rows.device):
        return _zero_past_end(chosen.product(rows, weight, chosen.prepare(group_sizes)), group_sizes)


@torch.library.custom_op(
    "moebius::grouped_matmul_weight_gradient",
    mutates_args=(),
    schema="(Tensor rows, Tensor dout, Tensor group_sizes, str backend) -> Tensor",
)
def _weight_gradient(rows: Tensor, dout: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    if 0 in (rows.shape[0], group_sizes.shape[0]):
        return rows.new_zeros(group_sizes.shape[0], rows.shape[1], dout.shape[1])
    shape = group_sizes.shape[0], rows.shape[1], dout.shape[1]
    chosen = kernels(backend, rows, shape)
    with dtypes.on(rows.device):
        return chosen.weight_gradient(rows, dout, chosen.prepare(group_sizes))


@_product.register_fake
def _(rows: Tensor, weight: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_weight_gradient.register_fake
def _(rows: Tensor, dout: Tensor, group_sizes: Tensor, backend: str) -> Tensor:
    return rows.new_empty(group_sizes.shape[0], rows.shape[1], dout.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _product_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    rows, weight, group_sizes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    drows = call(_product, dout, weight.mT, group_sizes, ctx.backend) if needs[0] else None
    dweight = call(_weight_gradient, rows, dout, group_sizes, ctx.backend) if needs[1] else None
    return drows, dweight, None, None


def _weight_gradient_backward(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    rows, dout, group_sizes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    drows = call(_product, dout, dweight.mT, group_sizes, ctx.backend) if needs[0] else None
    ddout = call(_product, rows, dweight, group_sizes, ctx.backend) if needs[1] else None
    return drows, ddout, None, None


differentiate(_product, _product_backward, _save)
differentiate(_weight_gradient, _weight_gradient_backward, _save)


def in_context(backend: str | None) -> str:
    """What the operators are told of `backend`: its name, "" for the first that serves, and what surrounds the caller.

    Transformer Engine's autocast is closed when the backward pass runs, so its recipe travels with the name.
    """
    if backend != "te":
        return backend or _ANY
    from moebius.torch_frontend import matmul_te_fp8

    recipe = matmul_te_fp8.asked()
    return f"{backend}{_WITH}{recipe}" if recipe else backend


def kernels(
    backend: str, rows: Tensor, weight_shape: Any, down_shape: Any = None, n_rows: int | None = None
) -> Kernels:
    """The kernels of a backend, told as `in_context` does; the others as of `choose`."""
    name, _, recipe = backend.partition(_WITH)
    chosen = choose(None if name == _ANY else name, rows, weight_shape, down_shape, n_rows)
    implementation: Kernels = BACKENDS.implementation(chosen)
    return _quantised(recipe) if recipe else implementation


def _quantised(recipe: str) -> Kernels:
    from moebius.torch_frontend import matmul_te_fp8 as backend

    prepare = partial(backend.prepare, recipe=backend.recipe_of(recipe))
    return Kernels(prepare, backend.product, backend.weight_gradient)


def _zero_past_end(out: Tensor, group_sizes: Tensor) -> Tensor:
    end = group_sizes.sum(dtype=torch.int32)
    if out.device.type == "cpu":
        out[int(end) :].zero_()
        return out
    rows = torch.arange(out.shape[0], device=out.device, dtype=torch.int32)
    return out.masked_fill_((rows >= end)[:, None], 0.0)


def _load_grouped_mm() -> Kernels:
    from moebius.torch_frontend import matmul_grouped_mm as backend

    return Kernels(backend.prepare, backend.product, backend.weight_gradient)


def _load_loop() -> Kernels:
    from moebius.torch_frontend import matmul_loop as backend

    return Kernels(backend.prepare, backend.product, backend.weight_gradient)


def _load_te() -> Kernels:
    from moebius.torch_frontend import matmul_te as backend

    backend.check_version()
    return Kernels(backend.prepare, backend.product, backend.weight_gradient)


def _load_gmm() -> Kernels:
    from moebius.torch_frontend import matmul_gmm as backend

    backend.load()
    return Kernels(backend.prepare, backend.product, backend.weight_gradient)


def _load_mxfp8() -> Kernels:
    from moebius.torch_frontend import matmul_mxfp8 as backend

    backend.load()
    return Kernels(backend.prepare, backend.product, backend.weight_gradient)


def _load_triton() -> Kernels:
    from moebius.torch_frontend import matmul_triton as backend

    if any(major == 9 for major, _ in _capabilities()):
        import_module("moebius.core.kernels.fused_hopper")  # in Gluon, which an older Triton does not have
    fused = Fused(backend.fuses, backend.activated_product, backend.differentiated_product)
    plain = backend.prepare, backend.product, backend.weight_gradient
    return Kernels(*plain, fused, lambda prepared: Packed(*backend.pack(prepared)), backend.unpack)


def _grouped_mm_supports(problem: Problem) -> str | None:
    if problem.dtype == "float64":
        return "torch's grouped_mm has no float64"
    if problem.device == "cuda" and problem.n_experts >= 1024:
        return f"torch's grouped_mm takes fewer than 1024 experts on CUDA, not {problem.n_experts}"
    return None


def _te_supports(problem: Problem) -> str | None:
    if problem.dtype == "float64":
        return "Transformer Engine has no float64"
    return _cuda("Transformer Engine", problem, (8, 0))


def _gmm_supports(problem: Problem) -> str | None:
    if problem.dtype != "bfloat16":
        return f"grouped_gemm takes bfloat16, not {problem.dtype}"
    return _cuda("grouped_gemm", problem, (8, 0))


def _mxfp8_supports(problem: Problem) -> str | None:
    if problem.dtype != "bfloat16":
        return f"torchao's MXFP8 takes bfloat16, not {problem.dtype}"
    if problem.dim % 32 or problem.inter_dim % 32:  # of the other projection it is asked as it runs
        return f"MXFP8 takes widths that are multiples of 32, not D={problem.dim}, I={problem.inter_dim}"
    return _cuda("MXFP8", problem, (10, 0))


def _cuda(what: str, problem: Problem, least: tuple[int, int]) -> str | None:
    """Why a package for CUDA does not serve; the meta device may become one that it serves."""
    if problem.device not in ("cuda", "meta"):
        return f"{what} computes on CUDA, not on {problem.device}"
    if problem.capability is not None and problem.capability < least:
        wanted, found = (".".join(map(str, pair)) for pair in (least, problem.capability))
        return f"{what} needs CUDA compute capability {wanted}, not {found}"
    return None


BACKENDS = Registry("moebius.torch_frontend", "grouped_matmul", partial(measured.order, "torch"))
BACKENDS.add(
    name="grouped_mm",
    load=_load_grouped_mm,
    supports=_grouped_mm_supports,
    note="torch.nn.functional.grouped_mm: CUTLASS on Hopper in bfloat16; in other dtypes sizes are read on the host",
)
BACKENDS.add(name="loop", load=_load_loop, reads_host=True, note="one matmul per expert; any dtype, float64 too")
BACKENDS.add(
    name="te",
    load=_load_te,
    needs=("transformer_engine",),
    install="pip install --no-build-isolation 'transformer-engine[pytorch]'",
    supports=_te_supports,
    only_when_named=True,
    reads_host=True,
    note="Transformer Engine's grouped GEMM; FP8 inside its autocast; float32 in TF32, where PyTorch allows that",
)
BACKENDS.add(
    name="gmm",
    load=_load_gmm,
    needs=("grouped_gemm",),
    install="pip install --no-build-isolation grouped_gemm",
    supports=_gmm_supports,
    only_when_named=True,
    reads_host=True,
    note="the grouped_gemm package",
)
BACKENDS.add(
    name="torch_mm_mxfp8",
    load=_load_mxfp8,
    needs=("torchao",),
    install="pip install torchao",
    supports=_mxfp8_supports,
    only_when_named=True,
    note="torchao's prototype; gradients of weights in bfloat16",
)
BACKENDS.add(
    name="triton",
    load=_load_triton,
    needs=("triton",),
    install="pip install triton",
    supports=plan_grouped.against,
    when_measured=True,
    note="moebius' own kernels; the fast ones are for Hopper, in bfloat16 and float16, widths of multiples of 8",
)
