"""Backend "triton": the grouped products of core.kernels; on Hopper also fused with the activation.

Nothing waits for the host. A product reads a weight as it lies, in either orientation; an operand is copied only where
it is in neither, or starts between 16 bytes. What is fused wants contiguous weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from moebius.core.activations import Activation
from moebius.torch_frontend import launch
from moebius.torch_frontend.matmul_grouped_mm import aligned


class Prepared(NamedTuple):
    """The group sizes, and what is made of them once for all products of as many rows in tiles of one height."""

    group_sizes_e: Tensor
    made: dict[tuple[int, int], tuple[Tensor, Tensor]]

    def listed(self, rows: Tensor, width_out: int) -> tuple[Tensor, Tensor]:
        """(tiles, starts); see launch.list_tiles."""
        n_rows, width_in = rows.shape
        key = n_rows, launch.height(rows, n_rows, len(self.group_sizes_e), width_in, width_out)
        if key not in self.made:
            self.made[key] = launch.list_tiles(self.group_sizes_e, *key)
        return self.made[key]


def prepare(group_sizes_e: Tensor) -> Prepared:
    """See Kernels.prepare."""
    return Prepared(group_sizes_e, {})


def pack(prepared: Prepared) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """See Kernels.pack."""
    return tuple(tensor for pair in prepared.made.values() for tensor in pair), (*prepared.made,)


def unpack(group_sizes_e: Tensor, packed: tuple[tuple[Tensor, ...], tuple[Any, ...]]) -> Prepared:
    """See Kernels.unpack."""
    tensors, form = packed
    return Prepared(group_sizes_e, dict(zip(form, zip(tensors[::2], tensors[1::2], strict=True), strict=True)))


def product(rows: Tensor, weight: Tensor, prepared: Prepared) -> Tensor:
    """[R, F]; see Kernels.product."""
    tiles_Q4, _ = prepared.listed(rows, weight.shape[2])
    transposed = weight.mT.is_contiguous() and not weight.is_contiguous()
    weight = weight.mT if transposed else weight
    return launch.grouped_product(_whole(rows), _whole(weight), tiles_Q4, transposed)


def weight_gradient(rows: Tensor, dout: Tensor, prepared: Prepared) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    _, starts_e = prepared.listed(rows, dout.shape[1])
    return launch.grouped_weight_gradient(_whole(rows), _whole(dout), starts_e)


fuses = launch.fuses


def activated_product(
    rows: Tensor,
    up: Tensor,
    prepared: Prepared,
    row_weights: Tensor | None,
    activation: Activation,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(hidden, act); see Fused.up."""
    tiles_Q4, _ = prepared.listed(rows, up.shape[2])
    return launch.activated_product(_whole(rows), _whole(up), tiles_Q4, row_weights, activation, bias)


def differentiated_product(
    dout: Tensor,
    down: Tensor,
    prepared: Prepared,
    hidden: Tensor,
    row_weights: Tensor,
    activation: Activation,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, act, dots); see Fused.down_gradient."""
    tiles_Q4, _ = prepared.listed(dout, down.shape[1])
    operands = _whole(dout), _whole(down), tiles_Q4, _whole(hidden)
    return launch.differentiated_product(*operands, row_weights, activation, in_place=in_place)


def _whole(operand: Tensor) -> Tensor:
    """As the kernels read it: copied where it is not contiguous, or starts between 16 bytes."""
    return aligned(operand.contiguous())
