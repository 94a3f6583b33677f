"""Backend "triton": the grouped products of core.kernels, alone and fused with the activation, for Hopper.

Nothing waits for the host. A weight is read as it lies, in either orientation; an operand is copied only where it is in
neither, or starts between 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moebius.core.activations import Activation
from moebius.torch_frontend import launch
from moebius.torch_frontend.matmul_grouped_mm import aligned


@dataclass
class Prepared:
    """The group sizes, and what is made of them once for all products of as many rows."""

    group_sizes_e: Tensor
    _listed: tuple[int, Tensor, Tensor] | None = None

    def listed(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """(tiles, starts); see launch.list_tiles."""
        if self._listed is None or self._listed[0] != n_rows:
            self._listed = (n_rows, *launch.list_tiles(self.group_sizes_e, n_rows))
        return self._listed[1:]


def product(rows: Tensor, weight: Tensor, prepared: Prepared) -> Tensor:
    """[R, F]; see Kernels.product."""
    tiles_Q4, _ = prepared.listed(len(rows))
    transposed = weight.mT.is_contiguous() and not weight.is_contiguous()
    weight = weight.mT if transposed else weight
    return launch.grouped_product(_whole(rows), _whole(weight), tiles_Q4, transposed)


def weight_gradient(rows: Tensor, dout: Tensor, prepared: Prepared) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    _, starts_e = prepared.listed(len(rows))
    return launch.grouped_weight_gradient(_whole(rows), _whole(dout), starts_e)


def activated_product(
    rows: Tensor,
    up: Tensor,
    prepared: Prepared,
    row_weights: Tensor | None,
    activation: Activation,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(hidden, act); see Fused.up."""
    tiles_Q4, _ = prepared.listed(len(rows))
    return launch.activated_product(_whole(rows), _whole(up), tiles_Q4, row_weights, activation, bias)


def differentiated_product(
    dout: Tensor,
    down: Tensor,
    prepared: Prepared,
    hidden: Tensor,
    row_weights: Tensor,
    activation: Activation,
    bias: Tensor | None,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, act, dots); see Fused.down_gradient."""
    tiles_Q4, _ = prepared.listed(len(dout))
    operands = _whole(dout), _whole(down), tiles_Q4, _whole(hidden)
    return launch.differentiated_product(*operands, row_weights, activation, bias, in_place=in_place)


def _whole(operand: Tensor) -> Tensor:
    """As the kernels read it: copied where it is not contiguous, or starts between 16 bytes."""
    return aligned(operand.contiguous())
