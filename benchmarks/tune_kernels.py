"""The kernels with choices, each with its arguments in a layer of experts: products on Hopper, alone and fused, and
those for any GPU; rows moved, summed and activated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks import tune_variants
from benchmarks.gpu_problem import Shape
from benchmarks.tune_cases import EXACT, Case, Constants, Layer
from moebius.core.errors import Unsupported
from moebius.core.kernels import plan, plan_grouped, plan_hopper, plan_portable
from moebius.core.kernels.plan import Launch, blocks

# Sums of another order, by the norm of the difference: float32 itself, and what is rounded to 16 bits after it.
BOUNDS = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}
SUMS = 1e-5
HOPPERS = (9, 0)  # compute capability


def _hopper(layer: Layer, launch: Launch) -> dict[str, Any]:
    """What all kernels for Hopper say of themselves.

    Raises:
        Unsupported: the device is none.
    """
    if layer.target.capability != HOPPERS:
        found = ".".join(map(str, layer.target.capability))
        raise Unsupported("kernels for Hopper", f"compute capability {found}", "name portable ones")
    return {
        "launch": launch,
        "changes": tune_variants.hopper(launch, layer.limit, layer.whole),
        "programs": lambda constants: layer.target.processors,
        "described": lambda constants: tune_variants.hopper_blocks(launch.kernel, constants),
        "needed": lambda constants: tune_variants.hopper_bytes(launch, constants["COLS"], constants["STAGES"]),
    }


def _grouped(layer: Layer, kernel: str) -> Iterator[Case]:
    """A product alone: down, and the gradient of up's rows, whose matrices are read transposed."""
    s, transposed = layer.shape, kernel.endswith("transposed")
    width_in = layer.up_width if transposed else s.inter
    told = s.rows, s.n_experts, width_in, s.dim, transposed
    if kernel.startswith("portable"):
        options = {"dtype": s.dtype, "capability": layer.target.capability}
        launch = plan_portable.product(*told, height=plan_portable.height(s.rows, s.n_experts, s.dtype), **options)
        how = _portable(layer, launch) | {"programs": lambda c: _tiles(layer, c) * blocks(s.dim, c["COLS"])}
    else:
        launch = plan_grouped.product(*told, s.dtype, layer.target)
        how = _hopper(layer, launch)
    matrix = (s.dim, width_in) if transposed else (width_in, s.dim)

    def inputs(launch: Launch) -> tuple[Any, ...]:
        height = launch.constants.get("ROWS", plan_hopper.HEIGHT)
        return layer.rows(width_in), layer.normal(s.n_experts, *matrix), layer.listed(height)[0]

    yield Case(
        kernel=kernel,
        part="gradient of up's rows" if transposed else "down",
        depth=width_in,
        width=s.dim,
        flops=2.0 * s.rows * width_in * s.dim,
        bytes=layer.product_bytes(width_in, s.dim),
        inputs=inputs,
        outputs=lambda launch: (((s.rows, s.dim), layer.dtype),),
        **how,
    )


def _gradients(layer: Layer, kernel: str) -> Iterator[Case]:
    """Weight gradients of down and of up."""
    s = layer.shape
    yield _gradient(layer, kernel, "down", s.inter, s.dim)
    yield _gradient(layer, kernel, "up", s.dim, layer.up_width)


def _gradient(layer: Layer, kernel: str, part: str, width_in: int, width_out: int) -> Case:
    s = layer.shape
    if kernel.startswith("portable"):
        options = {"dtype": s.dtype, "capability": layer.target.capability}
        launch = plan_portable.weight_gradient(s.n_experts, width_in, width_out, **options)
        how = _portable(layer, launch) | {"programs": _of_matrices(s.n_experts, width_in, width_out)}
    else:
        launch = plan_grouped.weight_gradient(s.n_experts, width_in, width_out, s.dtype, layer.target)
        how = _hopper(layer, launch)
    return Case(
        kernel=kernel,
        part=f"weight gradient of {part}",
        depth=0,
        width=width_out,
        flops=2.0 * s.rows * width_in * width_out,
        bytes=layer.product_bytes(width_in, width_out),
        inputs=lambda launch: (layer.rows(width_in), layer.rows(width_out), layer.listed(plan_hopper.HEIGHT)[1]),
        outputs=lambda launch: (((s.n_experts, width_in, width_out), layer.dtype),),
        **how,
    )


def _activated(layer: Layer, kernel: str) -> Iterator[Case]:
    """Up and its activation."""
    s, U, processors = layer.shape, layer.up_width, layer.target.processors
    few = plan_hopper.few(s.rows, s.n_experts, U, processors)
    launch = plan_hopper.activated_product(processors, s.dim, s.inter, layer.activation, False, True, few)
    # Of what is left out, the bias, any pointer.
    given = (layer.rows(s.dim), layer.normal(s.n_experts, s.dim, U), layer.rows(s.dim), layer.weights)
    yield Case(
        kernel=kernel,
        part="up and its activation",
        depth=s.dim,
        width=U,
        flops=2.0 * s.rows * s.dim * U,
        bytes=layer.product_bytes(s.dim, U) + layer.dtype.itemsize * s.rows * s.inter,
        inputs=lambda launch: (*given, layer.listed(plan_hopper.HEIGHT)[0]),
        outputs=lambda launch: (((s.rows, U), layer.dtype), ((s.rows, s.inter), layer.dtype)),
        bounds=(EXACT, EXACT),
        **_hopper(layer, launch),
    )


def _differentiated(layer: Layer, kernel: str) -> Iterator[Case]:
    """The gradient of down's rows and what the activation's derivative makes of it."""
    s, U = layer.shape, layer.up_width
    launch = plan_hopper.differentiated_product(layer.target.processors, s.dim, s.inter, layer.activation)
    given = layer.rows(s.dim), layer.normal(s.n_experts, s.inter, s.dim), layer.rows(U), layer.weights
    yield Case(
        kernel=kernel,
        part="gradient of down's rows and the derivative",
        depth=s.dim,
        width=s.inter,
        flops=2.0 * s.rows * s.dim * s.inter,
        bytes=layer.product_bytes(s.dim, s.inter) + 2.0 * layer.dtype.itemsize * s.rows * U,
        inputs=lambda launch: (*given, layer.listed(plan_hopper.HEIGHT)[0]),
        outputs=lambda launch: (
            ((s.rows, U), layer.dtype),
            ((s.rows, s.inter), layer.dtype),
            ((s.rows, blocks(s.inter, launch.constants["COLS"])), torch.float32),
        ),
        bounds=(EXACT, EXACT, SUMS),
        compared=lambda results: [*results[:2], results[2].sum(1)],
        **_hopper(layer, launch),
    )


def _portable(layer: Layer, launch: Launch) -> dict[str, Any]:
    """What all portable products say of themselves."""
    return {
        "launch": launch,
        "changes": tune_variants.portable(launch, layer.limit, layer.whole),
        "needed": lambda constants: tune_variants.portable_bytes(constants, layer.dtype.itemsize),
        "bounds": (BOUNDS[layer.shape.dtype],),
    }


def _tiles(layer: Layer, constants: Constants) -> int:
    return plan_portable.tiles(layer.shape.rows, layer.shape.n_experts, constants["ROWS"])


def _of_matrices(n_experts: int, height: int, width: int) -> Callable[[Constants], int]:
    return lambda constants: n_experts * blocks(height, constants["ROWS"]) * blocks(width, constants["COLS"])


def _scattered(layer: Layer, kernel: str) -> Iterator[Case]:
    """Tokens to their rows."""
    s = layer.shape
    launch = plan.scatter_rows(s.tokens, s.k, s.dim)
    yield Case(
        kernel=kernel,
        part="tokens to rows",
        bytes=float(layer.dtype.itemsize * s.dim * (s.tokens + s.rows) + 4 * s.rows),
        inputs=lambda launch: (layer.normal(s.tokens, s.dim), layer.row_of_slot, s.tokens),
        outputs=lambda launch: (((s.rows, s.dim), layer.dtype),),
        **_elementwise(layer, launch, s.tokens, s.dim),
    )


def _summed(layer: Layer, kernel: str) -> Iterator[Case]:
    """The sum over K."""
    s = layer.shape
    launch = plan.sum_slots(s.tokens, s.k, s.dim, False, False, False)

    def inputs(launch: Launch) -> tuple[Any, ...]:
        rows_RD = layer.rows(s.dim)
        return rows_RD, layer.row_of_slot, rows_RD, rows_RD, rows_RD, s.tokens

    yield Case(
        kernel=kernel,
        part="rows to tokens",
        bytes=float(layer.dtype.itemsize * s.dim * (s.tokens + s.rows) + 4 * s.rows),
        inputs=inputs,
        outputs=lambda launch: (((s.tokens, s.dim), layer.dtype),),
        **_elementwise(layer, launch, s.tokens, s.dim),
    )


def _activation(layer: Layer, kernel: str) -> Iterator[Case]:
    """The activation as a kernel of its own."""
    s, U = layer.shape, layer.up_width
    launch = plan.activate_rows(s.rows, s.inter, layer.activation, None, True)

    def inputs(launch: Launch) -> tuple[Any, ...]:
        hidden_RU = layer.rows(U)
        return hidden_RU, hidden_RU, hidden_RU, layer.weights, s.rows

    yield Case(
        kernel=kernel,
        part="activation",
        bytes=float(layer.dtype.itemsize * s.rows * (U + s.inter) + 4 * s.rows),
        inputs=inputs,
        outputs=lambda launch: (((s.rows, s.inter), layer.dtype),),
        **_elementwise(layer, launch, s.rows, s.inter),
    )


def _elementwise(layer: Layer, launch: Launch, n_rows: int, width: int) -> dict[str, Any]:
    """What all kernels without products say of themselves."""
    return {
        "launch": launch,
        "changes": tune_variants.elementwise(launch, layer.limit, layer.whole),
        "depth": 0,
        "width": width,
        "flops": 0.0,
        "programs": lambda constants: blocks(n_rows, constants["ROWS"]) * blocks(width, constants["COLS"]),
    }


Builder = Callable[[Layer, str], Iterator[Case]]
HOPPER: dict[str, Builder] = {
    "product": _grouped,
    "product_transposed": _grouped,
    "weight_gradient": _gradients,
    "activated_product": _activated,
    "differentiated_product": _differentiated,
}
PORTABLE: dict[str, Builder] = {
    "portable_product": _grouped,
    "portable_product_transposed": _grouped,
    "portable_weight_gradient": _gradients,
}
ELEMENTWISE: dict[str, Builder] = {"scatter_rows": _scattered, "sum_slots": _summed, "activate_rows": _activation}
KERNELS: dict[str, Builder] = HOPPER | PORTABLE | ELEMENTWISE
DTYPES = ("bfloat16", "float32", "odd")  # of the portable products; odd: bfloat16 of widths that are no multiples of 8


def of_dtype(shape: Shape, dtype: str) -> Shape:
    """The shape as portable products see it, of one of DTYPES."""
    if dtype == "odd":
        return replace(shape, dim=shape.dim + 2, inter=shape.inter + 3)
    return replace(shape, dtype=dtype)
