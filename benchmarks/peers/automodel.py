"""NeMo Automodel's own experts, where its package can be imported."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.gpu_problem import Candidate, Problem


def build(problem: Problem) -> Candidate:
    """GroupedExperts with "torch_mm"; its layout is the problem's, so the weights are shared."""
    config_module = import_module("nemo_automodel.components.moe.config")
    experts_module = import_module("nemo_automodel.components.moe.experts")

    s = problem.shape
    config = config_module.MoEConfig(
        n_routed_experts=s.n_experts,
        n_shared_experts=0,
        n_activated_experts=s.k,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        route_scale=1.0,
        dim=s.dim,
        inter_dim=s.inter,
        moe_inter_dim=s.inter,
        norm_topk_prob=False,
        dtype=problem.up.dtype,
    )
    with torch.device("meta"):
        backend = SimpleNamespace(experts="torch_mm", compile_router_weight=False)
        module = experts_module.GroupedExperts(config, backend=backend)
    module.gate_and_up_projs, module.down_projs = nn.Parameter(problem.up), nn.Parameter(problem.down)
    token_mask = torch.ones(s.tokens, dtype=torch.bool, device=problem.up.device)
    return Candidate(
        call=lambda x, weights, indices: module(x, token_mask, weights, indices),
        parameters=tuple(module.parameters()),
        gradients=lambda expert: (module.gate_and_up_projs.grad[expert], module.down_projs.grad[expert]),
        note=f"nemo-automodel {_version()}",
    )


def _version() -> str:
    try:
        return version("nemo-automodel")
    except PackageNotFoundError:
        return "of no known version"
