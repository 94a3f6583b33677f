"""The PyTorch layer, traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moebius.compare.problem import Problem
from moebius.compare.sides import Side
from moebius.compare.sides.answer import Answer, Desk, leaving
from moebius.compare.sides.precise import precise
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import BackendUnavailable
from moebius.torch_frontend import MoE, trace
from moebius.torch_frontend.matmul import choose


def check(side: Side, config: MoEConfig, dtype: str) -> None:
    """Refuse a backend or device that cannot be used; see `sides.check`."""
    rows_RD = torch.empty(1, config.expert_dim, dtype=getattr(torch, dtype), device=on(side.device))
    width = config.activation.up_width(config.moe_inter_dim)
    choose(BackendConfig(experts=side.backend).experts, rows_RD, (config.n_routed_experts, config.expert_dim, width))


def run(p: Problem, desk: Desk, side: Side) -> Answer:
    """Every stage and gradient of moebius' PyTorch layer, with its parameters' memory shared with the problem."""
    return traced(build(p, side.backend).to(on(side.device)), p, desk)


def traced(layer: MoE, p: Problem, desk: Desk, **about: Any) -> Answer:
    """A layer's trace as an answer; gradients leave one at a time."""
    device = next(layer.parameters()).device
    with precise():
        found = trace(layer, p.tensor(p.x_TD).to(device), p.tensor(p.dy_TD).to(device))
    return desk.answer(leaving(found), device=str(device), **about)


def build(p: Problem, backend: str | None = None) -> MoE:
    """The layer around the problem's own tensors: nothing is drawn, nothing copied."""
    with torch.device("meta"):
        layer = MoE(p.config, BackendConfig(experts=backend), param_dtype=p.dtype)
    state = {name: nn.Parameter(value, requires_grad=True) for name, value in p.parameters.items()}
    tensors: dict[str, Any] = dict(state)
    if p.correction_bias_E is not None:
        tensors["gate.e_score_correction_bias"] = p.correction_bias_E
    layer.load_state_dict(tensors, assign=True)
    return layer.eval()


def on(device: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one.

    Raises:
        BackendUnavailable: it is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # "meta" is a device too, without data
    except Exception as error:  # torch raises RuntimeError, AssertionError and others
        words = " ".join(str(error).split())[:200]
        raise BackendUnavailable(f"device {device!r} of PyTorch", words, "name a device that torch sees") from error
    return chosen
