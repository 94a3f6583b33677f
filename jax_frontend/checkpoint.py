"""Published checkpoints to Flax modules: plays the recipes of moebius.core.families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moebius.core import checkpoint, layout
from moebius.core.errors import BackendUnavailable
from moebius.core.folder import read_folder
from moebius.jax_frontend.dtypes import as_dtype
from moebius.jax_frontend.moe import MoE
from moebius.jax_frontend.weights import load_parameters, load_state


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
        MoE on the default device, its `config` as config.json and the recipe say.
    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, quantised or of an unknown family, the layer is
            dense, or the family has no such recipe.
        ConfigError: config.json contradicts itself, or float64 while JAX's x64 mode is off.
        BackendUnavailable: safetensors is not installed.
    """
    plan = checkpoint.plan(read_folder(folder), layer, dtype=dtype, recipe=recipe)
    # One buffer on the host, one copy to the device: stacking on the device would hold every expert twice.
    rows, state_rows = layout.moe(plan.config), layout.state(plan.config)
    buffers = {row.name: np.empty(row.shape, jnp.dtype(as_dtype(row.dtype))) for row in rows + state_rows}
    checkpoint.fill(plan, buffers, _opened)
    module = MoE(plan.config, backend, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    load_parameters(module, {row.name: jnp.asarray(buffers.pop(row.name)) for row in rows})
    load_state(module, {row.name: jnp.asarray(buffers.pop(row.name)) for row in state_rows})
    return module


def _opened(file: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise BackendUnavailable(
            f"the tensors of {file}", "safetensors is not installed", "pip install safetensors"
        ) from error
    return safe_open(file, framework="flax")
