"""What the Flax frontend's tests on a GPU share: which backends are there, and marks. Import it before jax."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

pytest.importorskip("torch")  # before jax: the first to load cuDNN decides its version

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
# The vendors' packages warn when they are imported, of jax and of themselves.
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible"),
    pytest.mark.filterwarnings("ignore"),
]
BACKENDS = ("loop", "ragged_dot", "tokamax", "te", "triton")
VENDORS = ("tokamax", "te", "triton")  # what tests/gpu/test_experts.py does not try


def require(backend: str, dtype: str = "bfloat16", dim: int = 64, width: int = 64, n_experts: int = 4) -> None:
    """Skip the test, with the reason, where the Flax grouped matmul's backend cannot serve this problem."""
    reason = _against(backend, dtype, dim, width, n_experts)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def served(backend: str) -> bool:
    """Whether the Flax grouped matmul's backend is there and takes bfloat16."""
    return _against(backend, "bfloat16", 64, 64, 4) is None


def require_step(registry: Any, name: str) -> None:
    """Skip the test, with the reason, where this backend of another step cannot serve."""
    from moebius.core import BackendUnavailable, Unsupported
    from moebius.core.registry import Problem

    problem = Problem(device="cuda", dtype="float32", dim=64, inter_dim=64, n_experts=8, capability=(9, 0))
    try:
        registry.choose(name, problem)
    except (BackendUnavailable, Unsupported) as error:
        pytest.skip(f"{name}: {error.found}")


def _against(backend: str, dtype: str, dim: int, width: int, n_experts: int) -> str | None:
    import jax.numpy as jnp

    from moebius.core import BackendUnavailable, Unsupported
    from moebius.jax_frontend.matmul import choose

    try:
        choose(backend, jnp.zeros((0, dim), dtype), (n_experts, dim, width))
    except (BackendUnavailable, Unsupported) as error:
        return error.found
    return None
