"""Published checkpoints to PyTorch modules: plays the recipes of moebius.core.families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moebius.core import checkpoint
from moebius.core.errors import BackendUnavailable
from moebius.core.folder import read_folder
from moebius.torch_frontend.moe import MoE
from moebius.torch_frontend.weights import parameters


@torch.no_grad()
def load_moe(folder: Any, layer: int | None = None, *, dtype: Any = None, backend: Any = None) -> MoE:
    """An MoE layer with the weights of a Hugging Face checkpoint; reads that layer's tensors alone.

    Args:
        folder: with config.json and safetensors, of a family in moebius.core.families.
        layer: index of the layer; None for the first MoE layer.
        dtype: of the parameters; None for the stored one.
        backend: BackendConfig, or any object with its attributes, or None.
    Returns:
        MoE on the CPU, its `config` as config.json says.
    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, quantised or of an unknown family, or the layer is
            dense. ConfigError: config.json contradicts itself. BackendUnavailable: safetensors is not installed.
    """
    plan = checkpoint.plan(read_folder(folder), layer, dtype=dtype)
    module = MoE(plan.config, backend, device="cpu")
    checkpoint.fill(plan, parameters(module), _opened)
    return module


def _opened(file: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise BackendUnavailable(
            f"the tensors of {file}", "safetensors is not installed", "pip install safetensors"
        ) from error
    return safe_open(file, framework="pt")
