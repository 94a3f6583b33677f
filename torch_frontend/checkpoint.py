"""Published checkpoints to PyTorch modules: plays the recipes of moebius.core.families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moebius.core import checkpoint
from moebius.core.errors import BackendUnavailable
from moebius.core.folder import read_folder
from moebius.torch_frontend.moe import MoE
from moebius.torch_frontend.weights import parameters, state


@torch.no_grad()
def load_moe(
    folder: Any, layer: int | None = None, *, dtype: Any = None, backend: Any = None, recipe: str | None = None
) -> MoE:
    """An MoE layer with the weights of a Hugging Face checkpoint; reads that layer's tensors alone.

    Args:
        folder: with config.json and safetensors, of a family in moebius.core.families.
        layer: index of the layer; None for the first MoE layer.
        dtype: of the parameters; None for the stored one.
        backend: BackendConfig, or any object with its attributes, or None.
        recipe: one of the family's recipes; None for the one that the tensors' names tell. "gate and up
            de-interleaved" loads GPT-OSS in halves, with the activation that reads halves.
    Returns:
        MoE on the CPU, its `config` as config.json and the recipe say.
    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, quantised or of an unknown family, the layer is
            dense, or the family has no such recipe.
        ConfigError: config.json contradicts itself.
        BackendUnavailable: safetensors is not installed.
    """
    plan = checkpoint.plan(read_folder(folder), layer, dtype=dtype, recipe=recipe)
    module = MoE(plan.config, backend, device="meta").to_empty(device="cpu")  # nothing is drawn to be overwritten
    checkpoint.fill(plan, {**parameters(module), **state(module)}, _opened)
    return module


def _opened(file: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise BackendUnavailable(
            f"the tensors of {file}", "safetensors is not installed", "pip install safetensors"
        ) from error
    return safe_open(file, framework="pt")
