"""What is tuned: a kernel as a layer of experts launches it, and that layer's operands; see tune_kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_problem import Shape, route
from benchmarks.tune_variants import Change
from moebius.core.activations import ACTIVATIONS, Activation
from moebius.core.kernels import plan_portable
from moebius.core.kernels.plan import Launch
from moebius.core.kernels.plan_grouped import Device
from moebius.torch_frontend import play

Constants = dict[str, Any]
EXACT = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kernel of one layer.

    Attributes:
        kernel: its key in KERNELS. part: of the layer.
        launch: the plan's. changes: what could be other; see tune_variants.
        depth, width: of a product: what is summed (0 for a weight gradient, whose rows are), and columns of the result.
        flops, bytes: what it computes, and what it must read and write once.
        inputs: arguments before the results, for a launch. outputs: shape and dtype of each result.
        programs: of constants. described: Launch.blocks of them. needed: shared memory of them, in bytes.
        compared: of the results, what is held against the plan's. bounds: relative norm of the difference, by result.
    """

    kernel: str
    part: str
    launch: Launch
    changes: list[Change]
    depth: int
    width: int
    flops: float
    bytes: float
    inputs: Callable[[Launch], tuple[Any, ...]]
    outputs: Callable[[Launch], tuple[tuple[tuple[int, ...], torch.dtype], ...]]
    programs: Callable[[Constants], int]
    bounds: tuple[float, ...] = (EXACT,)
    described: Callable[[Constants], tuple[tuple[int, ...], ...]] = field(default=lambda constants: ())
    needed: Callable[[Constants], int] = field(default=lambda constants: 0)
    compared: Callable[[list[Tensor]], list[Tensor]] = field(default=list)

    def launched(self, change: Change) -> Launch:
        """The plan's launch with a change."""
        new = dict(change)
        warps = new.pop("num_warps", self.launch.num_warps)
        constants = self.launch.constants | new
        return replace(
            self.launch,
            constants=constants,
            num_warps=warps,
            programs=self.programs(constants),
            blocks=self.described(constants),
        )


class Layer:
    """Operands of one layer, drawn when they are first asked for; on the meta device they are shapes alone.

    Args:
        device: "cuda" or "meta". target: what launches are planned for. limit: bytes of shared memory of a program.
    """

    def __init__(
        self, shape: Shape, device: str, target: Device, limit: int, activation: str = "swiglu", whole: bool = False
    ):
        self.shape, self.device, self.target, self.limit, self.whole = shape, device, target, limit, whole
        self.activation: Activation = ACTIVATIONS[activation]
        self.dtype = getattr(torch, shape.dtype)
        self.up_width = self.activation.up_width(shape.inter)
        self._drawn: dict[tuple[int, ...], Tensor] = {}
        self._tiles: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def row_of_slot(self) -> Tensor:
        """[T, K] int32, rows in the order of their experts."""
        order = self._indices.flatten().argsort(stable=True)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order), device=self.device)
        return rows.view(self.shape.tokens, self.shape.k).int()

    @cached_property
    def weights(self) -> Tensor:
        """[R] float32."""
        return torch.rand(self.shape.rows, device=self.device)

    @cached_property
    def _indices(self) -> Tensor:
        return route(self.shape, self.device).indices if self.device != "meta" else self.new(self._slots, torch.int64)

    @property
    def _slots(self) -> tuple[int, int]:
        return self.shape.tokens, self.shape.k

    def new(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of this layer's device."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def normal(self, *size: int) -> Tensor:
        """Random numbers of unit variance, of matrices divided by the root of their height; one draw for each size."""
        if size not in self._drawn:
            std = size[1] ** -0.5 if len(size) == 3 else 1.0
            self._drawn[size] = torch.randn(size, dtype=self.dtype, device=self.device).mul_(std)
        return self._drawn[size]

    def rows(self, width: int) -> Tensor:
        """[R, width]."""
        return self.normal(self.shape.rows, width)

    def listed(self, height: int) -> tuple[Tensor, Tensor]:
        """(tiles, starts) of `height` rows."""
        if height not in self._tiles:
            n_experts = self.shape.n_experts
            tiles_Q4 = self.new((1 + plan_portable.tiles(self.shape.rows, n_experts, height), 4), torch.int32)
            starts_e = self.new((n_experts + 1,), torch.int32)
            if self.device != "meta":
                sizes_e = torch.bincount(self._indices.flatten(), minlength=n_experts).int()
                play.run(plan_portable.list_tiles(n_experts, height), sizes_e, tiles_Q4, starts_e)
            self._tiles[height] = tiles_Q4, starts_e
        return self._tiles[height]

    def product_bytes(self, *widths: int) -> float:
        """Rows of each of two widths and a matrix for each expert, once."""
        width_in, width_out = widths
        size = self.dtype.itemsize
        return float(size * (self.shape.rows * (width_in + width_out) + self.shape.n_experts * width_in * width_out))
