"""The Flax layer, traced; its parameters come over dlpack."""

from __future__ import annotations

from typing import Any

import torch

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import nnx  # isort: skip

from moebius import jax_frontend
from moebius.compare.bridge import to_jax, to_torch
from moebius.compare.problem import Problem
from moebius.compare.sides import Side
from moebius.compare.sides.answer import Answer, Desk, leaving
from moebius.compare.sides.precise import precise
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import BackendUnavailable, MoEError
from moebius.jax_frontend import MoE, trace
from moebius.jax_frontend.matmul import choose

# Larger parameters are shared with torch on a CPU instead of copied; nothing writes into them while the side runs.
_SHARED = 1 << 24


def check(side: Side, config: MoEConfig, dtype: str) -> None:
    """Refuse a backend or device that cannot be used; see `sides.check`."""
    rows_RD = jax.device_put(jnp.zeros((1, config.expert_dim), dtype), on(side.device))
    width = config.activation.up_width(config.moe_inter_dim)
    choose(BackendConfig(experts=side.backend).experts, rows_RD, (config.n_routed_experts, config.expert_dim, width))


def run(p: Problem, desk: Desk, side: Side) -> Answer:
    """Every stage and gradient of moebius' Flax layer, under one jit."""
    device = on(side.device)
    with jax.default_device(device), precise():
        layer = build(p, device, side.backend)
        x_TD, dy_TD = (_carried(p.tensor(value), device) for value in (p.x_TD, p.dy_TD))
        found = trace(layer, x_TD, dy_TD)
        del layer
        tensors = ((name, to_torch(array, alias=True)) for name, array in leaving(found))
        return desk.answer(tensors, device=f"{device.platform}:{device.id}")


def build(p: Problem, device: jax.Device, backend: str | None = None) -> MoE:
    """The layer with the problem's parameters; nothing is drawn."""
    layer = MoE(p.config, BackendConfig(experts=backend), rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    jax_frontend.load_parameters(layer, {name: _carried(value, device) for name, value in p.parameters.items()})
    if p.correction_bias_E is not None:
        jax_frontend.load_state(layer, {"gate.e_score_correction_bias": _carried(p.correction_bias_E, device)})
    layer.eval()
    return layer


def on(device: str | None) -> jax.Device:
    """The device of that name ("cpu", "gpu", "gpu:1"), by default the first of JAX's own choice.

    Raises:
        BackendUnavailable: it is not there.
    """
    chosen: jax.Device
    if device is None:
        chosen = jax.devices()[0]
        return chosen
    platform, _, number = device.partition(":")
    try:
        chosen = jax.devices("gpu" if platform == "cuda" else platform)[int(number or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise BackendUnavailable(f"device {device!r} of JAX", words, "name a device that JAX sees") from error
    return chosen


def _carried(value: torch.Tensor, device: jax.Device) -> Any:
    if device.platform == "cpu" and value.numel() * value.element_size() >= _SHARED:
        try:
            return to_jax(value, alias=True)
        except MoEError:  # not aligned or not contiguous: a copy does as well
            return to_jax(value)
    return jax.device_put(to_jax(value), device)
