"""What every side of a comparison is given: one layer's config and parameters, its input, an upstream gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moebius.core.config import MoEConfig


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One layer and its input.

    Attributes:
        config: of the layer. dtype: that the sides compute in.
        x_TD, dy_TD: [T, dim] input and upstream gradient; float64, exact in `dtype`.
        parameters: by the names of core.layout, in `dtype` on the CPU; read, never written.
        correction_bias_E: [E] float32 of the gate, or None.
    """

    config: MoEConfig
    dtype: str
    x_TD: np.ndarray
    dy_TD: np.ndarray
    parameters: Mapping[str, torch.Tensor]
    correction_bias_E: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.x_TD)

    def tensor(self, value: np.ndarray) -> torch.Tensor:
        """An array as a tensor of the problem's dtype."""
        return torch.from_numpy(np.ascontiguousarray(value)).to(getattr(torch, self.dtype))

    def exact(self, name: str, expert: int | None = None) -> np.ndarray:
        """A parameter, or one expert's part of it, in float64."""
        value = self.parameters[name] if expert is None else self.parameters[name][expert]
        return float64(value)

    @property
    def correction_bias(self) -> np.ndarray | None:
        """The gate's correction bias [E] in float64, or None."""
        return None if self.correction_bias_E is None else float64(self.correction_bias_E)


def rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest values that `dtype` holds, in float64."""
    return float64(torch.from_numpy(np.ascontiguousarray(value)).to(getattr(torch, dtype)))


def upstream(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """A normal upstream gradient that `dtype` holds exactly, in float64."""
    return rounded(np.random.default_rng(seed).standard_normal(shape), dtype)


def float64(value: torch.Tensor) -> np.ndarray:
    """A tensor of any device and dtype as a float64 array."""
    array: np.ndarray = value.detach().cpu().double().numpy()
    return array
