"""Full precision in both frameworks while sides run, and what was in force otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import jax  # isort: skip


# torch's switches of sums in 16 bits.
_SUMS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextmanager
def precise() -> Iterator[None]:
    """No TF32 and no short sums: JAX would multiply float32 in TF32 on a GPU, PyTorch sum bfloat16 short."""
    matmul = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in _SUMS}
    try:
        for name in _SUMS:
            setattr(matmul, name, False)
        with _ieee(), jax.default_matmul_precision("highest"):
            yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


@contextmanager
def _ieee() -> Iterator[None]:
    """torch multiplies float32 in float32, on a GPU and in oneDNN.

    torch has an older and a newer switch, and raises where the older is read after the newer was set otherwise: both
    are set alike, and put back exactly.
    """
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # a caller set the newer alone
        older = None
    try:
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


SETTINGS = (
    "torch: TF32 off, no reduced-precision reductions",
    "jax: default_matmul_precision highest",
)
