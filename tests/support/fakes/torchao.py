"""A stand-in for torchao 0.18: its MXFP8 grouped product, unquantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fakes import install

CALLS: list[dict[str, Any]] = []


def to_mxfp8_then_scaled_grouped_mm(
    A: Tensor,
    B_t: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    pad_token_groups_for_grouped_mm: bool = False,
) -> Tensor:
    """As the package's."""
    assert pad_token_groups_for_grouped_mm and bias is None and not (torch.is_grad_enabled() and A.requires_grad)
    assert A.is_contiguous() and B_t.mT.is_contiguous() and offs.dtype == torch.int32
    assert not any(width % 32 for width in B_t.shape[1:])
    assert offs[-1] == A.shape[0], "split_sizes to sum exactly"
    CALLS.append({"A": A, "B_t": B_t, "offs": offs})
    out = A.new_empty(A.shape[0], B_t.shape[2], dtype=out_dtype)
    start = 0
    for group, end in enumerate(offs.tolist()):
        out[start:end] = (A[start:end].float() @ B_t[group].float()).to(out_dtype)
        start = end
    return out


def fake(monkeypatch: Any) -> list[dict[str, Any]]:
    """Install it; the list of calls."""
    CALLS.clear()
    module = {"_to_mxfp8_then_scaled_grouped_mm": to_mxfp8_then_scaled_grouped_mm}
    parents = {"torchao": {}, "torchao.prototype": {}}
    install(monkeypatch, {**parents, "torchao.prototype.moe_training": module})
    return CALLS
