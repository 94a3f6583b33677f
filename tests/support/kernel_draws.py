"""Inputs of the kernels' tests, the same numbers every time, and the distance that float64 allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebius.core.activations import Activation
from moebius.core.precision import DTYPES, EXACT, Arithmetic, dtype_name
from moebius.core.tolerance import bounds, within
from moebius.torch_frontend import launch
from moebius.torch_frontend.permute import Order

NAN = float("nan")


@dataclass(frozen=True)
class Where:
    """Where a case runs and in which dtype; draws what it needs, the same numbers every time."""

    device: str
    dtype: torch.dtype

    def drawn(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Normal numbers in the dtype."""
        values = np.random.default_rng(seed).standard_normal(shape) * scale
        return torch.from_numpy(values).to(self.dtype).to(self.device)

    def weights(self, *shape: int, seed: int = 1) -> Tensor:
        """Routing weights: float32 in (0, 1)."""
        values = np.random.default_rng(seed).uniform(0.05, 0.95, shape).astype(np.float32)
        return torch.from_numpy(values).to(self.device)

    def ints(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.int32)).to(self.device)

    def ids(self, tokens: int, k: int, n_experts: int, seed: int = 2) -> Tensor:
        """Expert ids, n_experts (no route) among them."""
        return self.ints(np.random.default_rng(seed).integers(0, n_experts + 1, (tokens, k)))


def exact(tensor: Tensor) -> np.ndarray:
    """float64, or the integers as they are."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def check(where: Where, found: dict[str, Tensor], run: Callable[[Arithmetic], dict[str, np.ndarray]]) -> None:
    """Each tensor lies as near to its float64 value as the roundings of `run` explain."""
    wanted = run(EXACT)
    limits = bounds(run, wanted, str(where.dtype))
    for name, value in found.items():
        assert value.shape == wanted[name].shape, name
        assert within(exact(value), wanted[name], limits[name]), name


def rounded(value: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 rounded once, to nearest and even, to the dtype's digits."""
    digits = 1 - int(np.log2(2 * DTYPES[dtype_name(dtype)][0]))
    mantissa, exponent = np.frexp(value)
    return np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)


@dataclass(frozen=True)
class Rows:
    """Rows of a few tokens and what sums them; the tail holds NaN."""

    rows_RD: Tensor
    order: Order
    bias_eD: Tensor

    @classmethod
    def of(cls, where: Where, tokens: int, k: int, n_experts: int, width: int) -> Rows:
        ids_SK = where.ids(tokens, k, n_experts)
        order = Order(*launch.sort_routes(ids_SK, where.weights(tokens, k), n_experts))
        rows_RD = where.drawn(tokens * k, width, seed=4)
        rows_RD[int(order.group_sizes_e.sum()) :] = NAN
        return cls(rows_RD, order, where.drawn(n_experts, width, seed=5))


@dataclass(frozen=True)
class Hidden:
    """Pre-activations of sorted rows, with what goes with them; the tail of `experts` has none."""

    hidden_RU: Tensor
    dact_RI: Tensor
    weights_R: Tensor
    bias_eU: Tensor
    experts_R: Tensor

    @classmethod
    def of(cls, where: Where, activation: Activation, rows: int, inter: int) -> Hidden:
        width = activation.up_width(inter)
        experts = np.sort(np.random.default_rng(6).integers(0, 4, rows))  # 3 experts; 3 is none
        hidden_RU = where.drawn(rows, width, scale=4.0)  # some past the limits
        hidden_RU[where.ints(experts) == 3] = NAN
        return cls(
            hidden_RU,
            where.drawn(rows, inter, seed=7),
            where.weights(rows),
            where.drawn(3, width, seed=8),
            where.ints(experts),
        )

    def options(self, biased: bool) -> dict[str, Tensor]:
        return {"bias_eU": self.bias_eU, "row_experts_R": self.experts_R} if biased else {}

    def head(self, tensor: Tensor) -> Tensor:
        """The rows that have an expert."""
        return tensor[: int((self.experts_R < 3).sum())]

    def stored(self, arithmetic: Arithmetic, biased: bool) -> np.ndarray:
        """The head's pre-activations with their bias."""
        hidden = exact(self.head(self.hidden_RU))
        return arithmetic.store(hidden + exact(self.bias_eU)[exact(self.head(self.experts_R))]) if biased else hidden
