"""moebius's own module, as a user calls it."""

from __future__ import annotations

import torch

from benchmarks.gpu_problem import Candidate, Problem


def build(problem: Problem, **backend: object) -> Candidate:
    """GroupedExperts with a BackendConfig of these fields."""
    from moebius.core import BackendConfig, MoEConfig
    from moebius.torch_frontend import GroupedExperts

    s = problem.shape
    config = MoEConfig(
        n_routed_experts=s.n_experts,
        n_activated_experts=s.k,
        dim=s.dim,
        moe_inter_dim=s.inter,
        dtype=str(problem.up.dtype),
    )
    module = GroupedExperts(config, BackendConfig(**backend), device=problem.up.device)  # type: ignore[arg-type]
    with torch.no_grad():
        module.gate_and_up_projs.copy_(problem.up)
        module.down_projs.copy_(problem.down)
    token_mask = torch.ones(s.tokens, dtype=torch.bool, device=problem.up.device)
    return Candidate(
        call=lambda x, weights, indices: module(x, token_mask, weights, indices),
        parameters=tuple(module.parameters()),
        gradients=lambda expert: (module.gate_and_up_projs.grad[expert], module.down_projs.grad[expert]),  # type: ignore[index]
        note=f"backend {module.backend_name}",
    )
