"""Backend "torch_mm_mxfp8": products in MXFP8 by torchao's prototype, weight gradients in bfloat16 by grouped_mm.

Both operands of a product are quantised as it runs, 32 values along the contraction to a scale. Source: torchao 0.18,
prototype.moe_training; the weight gradient stays in high precision, as NeMo Automodel asks of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moebius.core.errors import Unsupported
from moebius.torch_frontend.matmul_grouped_mm import prepare, weight_gradient

__all__ = ["MULTIPLE", "load", "prepare", "product", "weight_gradient"]

MULTIPLE = 32  # values that share a scale


def product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[R, F]; see Kernels.product. A weight whose transpose is contiguous is read as it lies, any other is copied.

    Raises:
        Unsupported: a width is no multiple of 32; each is contracted over, in this product or in its gradient.
    """
    n_in, n_out = weight.shape[1:]
    if n_in % MULTIPLE or n_out % MULTIPLE:
        asked = "grouped_matmul backend 'torch_mm_mxfp8'"
        raise Unsupported(asked, f"matrices [{n_in}, {n_out}]", f"widths that are multiples of {MULTIPLE}")
    matrices = weight if weight.mT.is_contiguous() else weight.mT.contiguous().mT
    # The groups must reach the last row; what lies past the end goes with the last expert, where it meets no other row.
    every = torch.cat([ends[:-1], ends.new_full((1,), rows.shape[0])])
    out: Tensor = load()(rows.contiguous(), matrices, every, out_dtype=rows.dtype, pad_token_groups_for_grouped_mm=True)
    return out


def load() -> Any:
    """torchao's function."""
    return import_module("torchao.prototype.moe_training")._to_mxfp8_then_scaled_grouped_mm
