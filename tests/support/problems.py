"""Problems for the comparison: drawn layers, and a layer of plain PyTorch in which one thing can be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moebius import torch_frontend as moebius
from moebius.compare.problem import Problem, rounded, upstream
from moebius.compare.sides import Side, parse, run
from moebius.compare.sides.answer import Answer, Desk
from moebius.core import MoEConfig, layout
from moebius.torch_frontend.dispatch import Sent

# Every activation, both placements of the weight, biases, groups, shared experts, latent projections.
CONFIGS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gpt_oss": {
        "expert_activation": "quick_geglu",
        "router_bias": True,
        "expert_bias": True,
        "activation_limit": 2.0,
    },
    "weight_after": {"apply_router_weight_after_down": True, "softmax_before_topk": True},
    "deepseek": {
        "score_func": "sigmoid_with_bias",
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "route_scale": 2.5,
        "n_expert_groups": 4,
        "n_limited_groups": 2,
        "force_e_score_correction_bias": True,
    },
    "latent": {
        "expert_activation": "relu2",
        "expert_bias": True,
        "moe_latent_size": 48,
        "n_shared_experts": 1,
        "shared_expert_gate": True,
    },
    "geglu": {"expert_activation": "geglu", "softmax_before_topk": True, "norm_topk_prob": True},
}


def problem(name: str = "swiglu", dtype: str = "float32", seed: int = 0, tokens: int = 64, **changes: Any) -> Problem:
    """A drawn layer of one of CONFIGS: parameters of unit gain, normal input and upstream gradient."""
    sizes = {"n_routed_experts": 16, "n_activated_experts": 4, "dim": 128, "moe_inter_dim": 96}
    config = MoEConfig(dtype=dtype, **{**sizes, **CONFIGS[name], **changes})
    rng = np.random.default_rng(seed)
    parameters = {}
    for row in layout.moe(config):
        fan_in = row.shape[-2] if len(row.shape) == 3 else row.shape[-1]
        value = rng.normal(size=row.shape) * (0.3 if row.zeros else fan_in**-0.5)
        parameters[row.name] = torch.from_numpy(value).to(getattr(torch, dtype))
    bias = torch.from_numpy(rng.normal(size=config.n_routed_experts) * 0.05).float()
    return Problem(
        config=config,
        dtype=dtype,
        x_TD=rounded(rng.normal(size=(tokens, config.dim)), dtype),
        dy_TD=upstream((tokens, config.dim), dtype, seed),
        parameters=parameters,
        correction_bias_E=bias if config.has_correction_bias else None,
    )


def answer(p: Problem, side: Any, desk: Desk) -> Answer:
    """What a side given by name or as a callable makes of a problem."""
    if callable(side):
        return run(p, Side(name="mine", kind="callable", call=side), desk)
    return run(p, parse([side])[0], desk)


class Layer:
    """A plain layer of moebius' steps, stage by stage, in which `bug` names what is wrong; None for nothing.

    Called as a comparison calls it: (x, parameters) -> every stage by name.
    """

    def __init__(self, config: MoEConfig, bug: str | None = None):
        self.c, self.bug = config, bug

    def __call__(self, x: torch.Tensor, w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = torch.nn.functional.linear(x, w["gate.weight"], w.get("gate.bias"))
        weights, ids = self.route(logits)
        sent = Sent(x, weights.float(), ids)
        rows, row_weights, sizes, experts, state = moebius.permute(sent, self.c.n_routed_experts)
        if self.bug == "dropped token":
            rows = torch.where((torch.arange(len(rows)) == 17)[:, None], 0.0, rows)
        up = self.up(rows, w, sizes, experts)
        act = self.activation(up, row_weights)
        out = moebius.grouped_matmul(act, w["experts.down_projs"], sizes)
        scale = None if self.bug == "missing bias weight" else row_weights
        out = moebius.add_bias(out, w.get("experts.down_proj_bias"), experts, scale)
        y = moebius.unpermute(out, state)
        if self.bug == "sum in bfloat16":
            y = self.summed_short(out, ids)
        return {
            "logits": logits,
            "weights": weights,
            "ids": ids,
            "rows": rows,
            "up": up,
            "activation": act,
            "down": out,
            "output": y,
        }

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        source = logits.detach() if self.bug == "router gradient lost" else logits
        routing = moebius.route(source, self.c)
        weights, ids = routing.weights_TK, routing.ids_TK
        if self.bug == "bfloat16 where float32 is due":
            weights = torch.softmax(torch.gather(logits, 1, ids.long()).bfloat16(), dim=-1)
        if self.bug == "wrong expert chosen":
            ids = ids.clone()
            left = [e for e in range(self.c.n_routed_experts) if e not in ids[5]]
            ids[5, 0] = min(left, key=lambda e: logits[5, e].item())
            weights = torch.softmax(torch.gather(logits, 1, ids.long()).float(), dim=-1)
        return weights.to(torch.float32 if self.c.router_weights_fp32 else logits.dtype), ids

    def up(
        self, rows: torch.Tensor, w: dict[str, torch.Tensor], sizes: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        matrices = w["experts.gate_and_up_projs"]
        if self.bug == "off-by-one expert":  # the last expert's rows by the matrix of the one before
            matrices = torch.cat([matrices[:-1], matrices[-2:-1]])
        return moebius.add_bias(
            moebius.grouped_matmul(rows, matrices, sizes), w.get("experts.gate_up_proj_bias"), experts
        )

    def activation(self, up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        a = self.c.activation
        if self.bug == "swapped halves":
            up = up.roll(up.shape[-1] // 2, dims=-1)
        if self.bug == "per-op rounding":  # each operation rounds to up's dtype
            gate, other = up.chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * other * weights[:, None].to(up.dtype)
        if self.bug == "wrong clamp side":  # gate is held from below too
            gate, other = up.unflatten(-1, (up.shape[-1] // 2, 2)).unbind(-1)
            up = torch.stack([gate.clamp(min=-a.limit), other], dim=-1).flatten(-2)
        return moebius.activate(up, weights, a)

    def summed_short(self, out: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        order = torch.argsort(ids.flatten(), stable=True)
        tokens = order // ids.shape[1]
        return torch.zeros(len(ids), out.shape[1]).bfloat16().index_put((tokens,), out.bfloat16(), True).to(out.dtype)
