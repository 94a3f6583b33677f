"""Launches of the grouped products on Hopper, alone and with what follows them, as data; see plan.py."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from moebius.core.activations import Activation
from moebius.core.kernels.plan import Launch, blocks, formula

HEIGHT = 128  # rows of a tile
# Measured on an H200, bfloat16, four models' shapes. Slower: four stages without a buffer for the output (2 to 10 %),
# groups of 4 or 8 tiles (up to 4 %), of 24 (1 %), one warpgroup alone where a tile's second half is empty (1 %).
_ROWS = (64, 64)  # a block of rows
_BLOCK = {"COLS": 256, "DEEP": 64, "STAGES": 3, "GROUP": 16}
# Where there are fewer tiles than multiprocessors: twice as many, of half as many columns.
_FEW = {"COLS": 128, "DEEP": 64, "STAGES": 5, "GROUP": 16}


def serves(dtype: str, capability: tuple[int, int], *widths: int) -> bool:
    """Whether products of these widths are computed here: 16 bits on compute capability 9.0, in whole groups of 8."""
    return dtype in ("bfloat16", "float16") and capability == (9, 0) and not any(width % 8 for width in widths)


def few(n_rows: int, n_experts: int, width_out: int, processors: int) -> bool:
    """Whether whole tiles would leave multiprocessors idle, with as many experts in use as there can be."""
    tiles = n_rows // HEIGHT + min(n_rows, n_experts)
    return tiles * blocks(width_out, _BLOCK["COLS"]) < processors


@lru_cache(maxsize=1024)
def product(processors: int, width_in: int, width_out: int, transposed: bool, few: bool = False) -> Launch:
    """Rows of width_in times matrices [e, width_in, width_out], or [e, width_out, width_in] where `transposed`.

    Args:
        processors: of the device; one program each. few: narrow tiles; see `few`.
    """
    block = _FEW if few else _BLOCK
    constants = {"D": width_in, "F": width_out, "TRANSPOSED": transposed, **block}
    return _specialised("matmul_hopper.product", processors, constants, _ROWS, _weight_block(block, transposed))


@lru_cache(maxsize=1024)
def weight_gradient(processors: int, n_experts: int, width_in: int, width_out: int) -> Launch:
    """One [width_in, width_out] an expert."""
    constants = {"E": n_experts, "D": width_in, "F": width_out, **_BLOCK}
    dout_block = (_BLOCK["DEEP"], _BLOCK["COLS"])
    return _specialised("matmul_hopper.weight_gradient", processors, constants, _ROWS, dout_block)


@lru_cache(maxsize=1024)
def activated_product(
    processors: int,
    dim: int,
    inter_dim: int,
    activation: Activation,
    biased: bool,
    weighted: bool,
    few: bool = False,
) -> Launch:
    """Rows of `dim` times matrices [e, dim, U], and their activation; see `product`."""
    block = _FEW if few else _BLOCK
    constants = {"D": dim, **_fused(inter_dim, activation), "BIASED": biased, "WEIGHTED": weighted, **block}
    return _specialised("fused_hopper.activated_product", processors, constants, _ROWS, _weight_block(block, False))


@lru_cache(maxsize=1024)
def differentiated_product(processors: int, dim: int, inter_dim: int, activation: Activation) -> Launch:
    """Rows of `dim` times matrices [e, inter_dim, dim] transposed, and what the activation's derivative makes of it."""
    constants = {
        "D": dim,
        **_fused(inter_dim, activation),
        **_BLOCK,
        "UNROLL": _unroll(dim, activation),
    }
    blocks = _ROWS, _weight_block(_BLOCK, True), (8, _BLOCK["COLS"])
    return _specialised("fused_hopper.differentiated_product", processors, constants, *blocks)


def dots(inter_dim: int) -> int:
    """Parts of a routing weight's gradient: columns of dots of `differentiated_product`."""
    return blocks(inter_dim, _BLOCK["COLS"])


def _fused(inter_dim: int, activation: Activation) -> dict[str, Any]:
    left_out = "E", "BIASED", "WEIGHTED"
    told = formula(inter_dim, activation, None, False)
    return {name: value for name, value in told.items() if name not in left_out}


def _unroll(dim: int, activation: Activation) -> int:
    """Panels that the derivative computes at once: many where the product is short and waits for it (7 %), as far as
    registers go; else few, which disturb the product less (7 %)."""
    if dim >= 4096:
        return 1
    return 2 if activation.limit is not None else 4


def _weight_block(block: dict[str, int], transposed: bool) -> tuple[int, ...]:
    half, deep = block["COLS"] // 2, block["DEEP"]
    return (1, half, deep) if transposed else (1, deep, half)


def _specialised(kernel: str, processors: int, constants: dict[str, Any], *blocks: tuple[int, ...]) -> Launch:
    # Three warpgroups of 168 registers a thread are the whole file of a multiprocessor.
    return Launch(kernel=kernel, programs=processors, constants=constants, registers=168, blocks=blocks)
