"""A stand-in for Transformer Engine 2.20: the grouped GEMM, the recipes and the quantizers that `matmul_te*` use.

What the C++ side checks is checked here: layouts, rows in a multiple of 16, a columnwise copy where the GEMM reads one,
two operands in e5m2, blocks of 128x128 against blocks of 128x128, columnwise data alone under per-tensor scaling.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fakes import as_pointer, install

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CALLS: list[dict[str, Any]] = []  # of the grouped GEMM


# ------------------------------------------------------------------------------------------------------------- recipes
class Format(Enum):
    """Formats of the forward and of the backward pass."""

    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class QParams:
    """How a scale is made."""

    power_2_scale: bool = False
    amax_epsilon: float = 0.0


@dataclass
class MMParams:
    """How a GEMM adds."""

    use_split_accumulator: bool = True


@dataclass
class Recipe:
    """Says of which kind it is by methods, as the package's does."""

    fp8_format: Format = Format.HYBRID
    backward_override: str | None = None
    kind = ""

    def __getattr__(self, name: str) -> Any:
        if name in ("delayed", "mxfp8", "nvfp4", "custom", "float8_current_scaling", "float8_block_scaling"):
            return lambda: self.kind == name
        raise AttributeError(name)


@dataclass
class Float8CurrentScaling(Recipe):
    """One scale a tensor."""

    fp8_quant_fwd_inp: QParams = field(default_factory=lambda: QParams(power_2_scale=True))
    fp8_quant_fwd_weight: QParams = field(default_factory=QParams)
    fp8_quant_bwd_grad: QParams = field(default_factory=lambda: QParams(amax_epsilon=11.0))
    fp8_gemm_fprop: MMParams = field(default_factory=lambda: MMParams(use_split_accumulator=False))
    fp8_gemm_dgrad: MMParams = field(default_factory=MMParams)
    fp8_gemm_wgrad: MMParams = field(default_factory=MMParams)
    kind = "float8_current_scaling"


@dataclass
class Float8BlockScaling(Recipe):
    """A scale for 128 values of rows, for 128x128 of matrices."""

    fp8_format: Format = Format.E4M3
    kind = "float8_block_scaling"


@dataclass
class MXFP8BlockScaling(Recipe):
    """A scale for 32 values."""

    fp8_format: Format = Format.E4M3
    kind = "mxfp8"


@dataclass
class DelayedScaling(Recipe):
    """Refused by the backend under test."""

    kind = "delayed"


@dataclass
class NVFP4BlockScaling(Recipe):
    """Refused by the backend under test."""

    kind = "nvfp4"


@dataclass
class CustomRecipe(Recipe):
    """Refused by the backend under test."""

    kind = "custom"


@dataclass
class NewRecipe(Recipe):
    """Of a kind that nobody knows yet."""

    kind = "new"


class FP8GlobalStateManager:
    """The autocast that is open."""

    recipe: Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Whether one is open."""
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        """Its recipe."""
        return cls.recipe


@contextmanager
def autocast(recipe: Recipe):
    """Open an autocast."""
    FP8GlobalStateManager.recipe = recipe
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = None


# ---------------------------------------------------------------------------------------------------------- quantizers
@dataclass
class QuantizerRole:
    """Which operand a quantizer is for."""

    module_type: str = ""
    tensor_type: str = ""


@dataclass
class Quantised:
    """An operand: the values that its FP8 data stand for, along rows and along columns; None where not asked for."""

    rowwise: Tensor | None
    columnwise: Tensor | None
    dtype: torch.dtype
    two_dimensional: bool

    @property
    def device(self) -> torch.device:
        """As a tensor's."""
        return next(t for t in (self.rowwise, self.columnwise) if t is not None).device


@dataclass
class Quantizer:
    """Makes operands."""

    kind: str
    dtype: torch.dtype
    two_dimensional: bool
    force_pow_2_scales: bool = False
    amax_epsilon: float = 0.0
    internal: bool = False
    usage: tuple[bool, bool] = (True, True)

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        """Which data to make."""
        self.usage = rowwise, columnwise

    def __call__(self, tensor: Tensor) -> Quantised:
        assert self.internal and tensor.is_contiguous() and tensor.dim() == 2 and 0 not in tensor.shape
        rowwise, columnwise = self.usage
        if self.kind == "float8_current_scaling" and not rowwise:
            raise NotImplementedError("Columnwise-only per-tensor FP8 quantization is not implemented")
        assert rowwise or not self.two_dimensional, "the package's modules ask for a weight's rowwise data always"
        rows = self.values(tensor, columnwise=False) if rowwise else None
        columns = self.values(tensor, columnwise=True) if columnwise else None
        return Quantised(rows, columns, self.dtype, self.two_dimensional)

    def values(self, tensor: Tensor, *, columnwise: bool) -> Tensor:
        """What the data stand for, float32."""
        wide = tensor.float()
        amax = self._amax(wide, columnwise).clamp(min=self.amax_epsilon)
        scale = torch.where(amax > 0, torch.finfo(self.dtype).max / amax, 1.0)
        if self.force_pow_2_scales or self.kind != "float8_current_scaling":
            scale = scale.log2().floor().exp2()
        return (wide * scale).to(self.dtype).float() / scale

    def _amax(self, wide: Tensor, columnwise: bool) -> Tensor:
        if self.kind == "float8_current_scaling":
            return wide.abs().max()
        length = 32 if self.kind == "mxfp8" else 128
        down, across = (length, 1) if columnwise else (1, length)
        if self.two_dimensional:
            down = across = length
        height, width = wide.shape
        padded = torch.nn.functional.pad(wide.abs(), (0, -width % across, 0, -height % down))
        blocks = padded.unflatten(1, (-1, across)).unflatten(0, (-1, down)).amax(dim=(1, 3))
        return blocks.repeat_interleave(down, 0).repeat_interleave(across, 1)[:height, :width]


class RecipeState:
    """Makes quantizers of a recipe."""

    def __init__(self, recipe: Recipe, mode: str, roles: list[QuantizerRole]):
        self.recipe, self.mode, self.roles = recipe, mode, roles

    @staticmethod
    def create(recipe: Recipe, *, mode: str, num_quantizers: int, device: Any, roles: list[Any]) -> RecipeState:
        """As the package's."""
        assert mode in ("forward", "backward") and num_quantizers == len(roles) and device is not None
        return RecipeState(recipe, mode, roles)

    def make_quantizers(self) -> list[Quantizer]:
        """One for each role."""
        assert all(role.module_type == "grouped_linear" for role in self.roles)
        dtype = self.recipe.fp8_format.value[self.mode == "backward"]
        square = self.recipe.kind == "float8_block_scaling"
        return [Quantizer(self.recipe.kind, dtype, square and role.tensor_type == "weight") for role in self.roles]


# ------------------------------------------------------------------------------------------------------------ the GEMM
def general_grouped_gemm(
    A: list[Any],
    B: list[Any],
    out: list[Tensor],
    quantization_params: list[Any],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    gelu: bool = False,
    grad: bool = False,
    accumulate: bool = False,
    bias: Any = None,
    use_bias: bool = False,
    use_split_accumulator: bool = False,
    D_dtype: Any = None,
    single_output: bool = False,
) -> tuple[Any, Any, Any]:
    """Write each group's product; reads and writes by address and shape."""
    assert A and len(A) == len(B) == len(quantization_params) and quantization_params == [None] * len(A)
    assert not (gelu or accumulate or use_bias) and bias is None and D_dtype is None
    assert isinstance(m_splits, list) and len(m_splits) == len(A) and out[0].dtype == out_dtype
    CALLS.append({"layout": layout, "splits": m_splits, "accurate": use_split_accumulator, "A": A, "B": B, "out": out})
    trans_a, trans_b = (letter == "T" for letter in layout)
    end = 0
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        value = _product(a, b, trans_a, trans_b).to(out_dtype)
        if single_output:
            assert len(out) == 1 and value.shape[0] == m_splits[i]
            as_pointer(out[0])[end : end + m_splits[i]] = value
            end += m_splits[i]
        else:
            assert out[i].shape == value.shape
            as_pointer(out[i]).copy_(value)
    return out, None, None


def _product(a: Any, b: Any, trans_a: bool, trans_b: bool) -> Tensor:
    if isinstance(a, Quantised):
        _check_fp8(a, b)
    else:
        assert a.dtype == b.dtype and a.dim() == b.dim() == 2
    left, right = _read(b, columnwise=trans_b), _read(a, columnwise=not trans_a)
    if isinstance(a, Quantised):
        assert not any(width % 16 for width in (*left.shape, *right.shape)), "Caller must pad."
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.T if trans_b else left).to(wide) @ (right.T if trans_a else right).to(wide)


def _read(operand: Any, columnwise: bool) -> Tensor:
    if not isinstance(operand, Quantised):
        return as_pointer(operand)
    data = operand.columnwise if columnwise else operand.rowwise
    assert data is not None, f"missing {'column' if columnwise else 'row'}-wise usage"
    return data


def _check_fp8(a: Quantised, b: Quantised) -> None:
    assert isinstance(b, Quantised)
    assert not (a.dtype == b.dtype == E5M2), "cuBLAS multiplies no e5m2 by e5m2"
    assert not (a.two_dimensional and b.two_dimensional), "got 2D by 2D"


def fake(monkeypatch: Any, version: str = "2.20.2") -> list[dict[str, Any]]:
    """Install it; the list of the GEMM's calls."""
    CALLS.clear()
    quantization = {
        "FP8GlobalStateManager": FP8GlobalStateManager,
        "RecipeState": RecipeState,
        "QuantizerRole": QuantizerRole,
    }
    install(
        monkeypatch,
        {
            "transformer_engine": {"__version__": version},
            "transformer_engine.pytorch": {},
            "transformer_engine.pytorch.cpp_extensions": {"general_grouped_gemm": general_grouped_gemm},
            "transformer_engine.pytorch.quantization": quantization,
        },
    )
    return CALLS
