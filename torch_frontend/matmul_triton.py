"""Backend "triton": the grouped products of core.kernels, for Hopper.

Nothing waits for the host. A weight is read as it lies, in either orientation; an operand is copied only where it is in
neither, or starts between 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
    weight = aligned(weight.mT if transposed else weight.contiguous())
    return launch.grouped_product(aligned(rows.contiguous()), weight, tiles_Q4, transposed)


def weight_gradient(rows: Tensor, dout: Tensor, prepared: Prepared) -> Tensor:
    """[e, D, F]; see Kernels.weight_gradient."""
    _, starts_e = prepared.listed(len(rows))
    return launch.grouped_weight_gradient(aligned(rows.contiguous()), aligned(dout.contiguous()), starts_e)
