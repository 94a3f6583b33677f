"""Asks both frameworks in one process, torch first as everywhere in moebius: the first to load a CUDA library wins."""

from __future__ import annotations

from typing import Any

from moebius.compare.doctor.reply import reply


def main() -> None:
    """Reply with the stages "torch" and "jax"."""
    reply({"torch": _torch, "jax": _jax})


def _torch() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        torch.backends.cudnn.version()  # loads cuDNN, as a first convolution would
        torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda"))
    return {"version": str(torch.__version__)}


def _jax() -> dict[str, Any]:
    import jax.numpy as jnp

    from moebius.compare.doctor.probe_jax import devices

    return {**devices(), "computed": float(jnp.ones((8, 8)).sum())}
