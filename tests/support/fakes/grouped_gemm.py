"""A stand-in for grouped_gemm 0.3.0: its backend's product, with the checks of its C++ side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fakes import as_pointer, install

CALLS: list[dict[str, Any]] = []


def gmm(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None
) -> Tensor:
    """As the package's, with NaN where nothing is written."""
    assert not (trans_a and trans_b) and c is None
    assert batch_sizes.is_cpu and batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1
    assert a.dtype == b.dtype == torch.bfloat16 and a.dim() == 2 and b.dim() == (2 if trans_a else 3)
    assert trans_a or (a.is_contiguous() and b.is_contiguous() and len(b) == len(batch_sizes))
    CALLS.append({"a": a, "b": b, "sizes": batch_sizes, "trans_a": trans_a, "trans_b": trans_b})
    a, b = as_pointer(a), as_pointer(b)
    width = b.shape[1] if trans_a or trans_b else b.shape[2]
    shape = (len(batch_sizes), a.shape[1], width) if trans_a else (a.shape[0], width)
    out = torch.full(shape, torch.nan, dtype=a.dtype)
    end = 0
    for group, size in enumerate(batch_sizes.tolist()):
        part = slice(end, end + size)
        end += size
        if trans_a and size:
            out[group] = (a[part].float().T @ b[part].float()).to(a.dtype)
        elif size:
            matrix = b[group].T if trans_b else b[group]
            out[part] = (a[part].float() @ matrix.float()).to(a.dtype)
    return out


def fake(monkeypatch: Any) -> list[dict[str, Any]]:
    """Install it; the list of calls."""
    CALLS.clear()
    install(monkeypatch, {"grouped_gemm": {}, "grouped_gemm.backend": {"gmm": gmm}})
    return CALLS
