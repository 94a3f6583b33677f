"""A stand-in for NeMo Automodel's experts: its module names, its signatures, and mathematics of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

PACKAGE = "nemo_automodel"


@dataclass(kw_only=True)
class MoEConfig:
    """The fields that it reads, in its order; the first block has no defaults."""

    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    n_expert_groups: int
    n_limited_groups: int
    train_gate: bool
    gate_bias_update_factor: float
    aux_loss_coeff: float
    score_func: str
    route_scale: float
    dim: int
    inter_dim: int
    moe_inter_dim: int
    norm_topk_prob: bool
    expert_bias: bool = False
    expert_activation: str = "swiglu"
    apply_router_weight_after_down: bool = False
    activation_alpha: float = 1.702
    activation_limit: float = 7.0
    dtype: torch.dtype = torch.bfloat16
    gate_dtype: torch.dtype | None = None
    moe_latent_size: int | None = None


class GroupedExperts(nn.Module):
    """Token by token and slot by slot, in the dtype of x; gated activations alone."""

    swap_halves = False

    def __init__(self, config: MoEConfig, backend: Any = None):
        super().__init__()
        self.config, self.backend = config, backend
        n, inter, dim = config.n_routed_experts, config.moe_inter_dim, config.moe_latent_size or config.dim
        self.gate_and_up_projs = nn.Parameter(torch.empty(n, dim, 2 * inter, dtype=config.dtype))
        self.down_projs = nn.Parameter(torch.empty(n, inter, dim, dtype=config.dtype))
        bias = config.expert_bias
        self.gate_up_proj_bias = nn.Parameter(torch.empty(n, 2 * inter, dtype=config.dtype)) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(n, dim, dtype=config.dtype)) if bias else None

    def forward(self, x: Any, token_mask: Any, weights: Any, indices: Any) -> Any:
        """[T, D]."""
        assert indices.dtype == torch.int64 and bool(token_mask.all())
        y = torch.zeros_like(x)
        for slot in range(indices.shape[1]):
            chosen, weight = indices[:, slot], weights[:, slot, None].to(x.dtype)
            hidden = torch.einsum("td,tdu->tu", x, self.gate_and_up_projs[chosen])
            hidden = hidden if self.gate_up_proj_bias is None else hidden + self.gate_up_proj_bias[chosen]
            act = self._activated(hidden)
            after = self.config.apply_router_weight_after_down
            out = torch.einsum("ti,tid->td", act if after else act * weight, self.down_projs[chosen])
            if self.down_proj_bias is not None:
                out = out + self.down_proj_bias[chosen] * (1.0 if after else weight)
            y = y + (out * weight if after else out)
        return y

    def _activated(self, hidden: Any) -> Any:
        c = self.config
        if c.expert_activation == "quick_geglu":
            gate, up = hidden[..., 0::2].clamp(max=c.activation_limit), hidden[..., 1::2]
            up = up.clamp(-c.activation_limit, c.activation_limit)
            return gate * torch.sigmoid(c.activation_alpha * gate) * (up + 1)
        gate, up = hidden.chunk(2, dim=-1)
        gate, up = (up, gate) if self.swap_halves else (gate, up)
        return nn.functional.silu(gate) * up


def install(monkeypatch: Any, experts: Any = GroupedExperts, config: Any = MoEConfig) -> None:
    """Make the stand-in importable as the package."""
    for name in ("", ".components", ".components.moe", ".components.moe.experts", ".components.moe.config"):
        monkeypatch.setitem(sys.modules, PACKAGE + name, ModuleType(PACKAGE + name))
    sys.modules[f"{PACKAGE}.components.moe.experts"].GroupedExperts = experts
    sys.modules[f"{PACKAGE}.components.moe.config"].MoEConfig = config


def remove(monkeypatch: Any) -> None:
    """Make the package one that is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, PACKAGE, None)
