"""The experts as PyTorch's own operators give them: sort, gather, grouped_mm, silu, weight, gather back, sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu_problem import Candidate, Problem


def swiglu(gate_RI: Tensor, value_RI: Tensor) -> Tensor:
    """[R, I]."""
    return F.silu(gate_RI) * value_RI


def experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    up_EDU: Tensor,
    down_EID: Tensor,
    activate: Callable[[Tensor, Tensor], Tensor] = swiglu,
) -> Tensor:
    """[T, D]; every id is an expert. Nothing in it waits for the device."""
    n_tokens, k = indices_TK.shape
    ids_R, order_R = torch.sort(indices_TK.reshape(-1), stable=True)
    experts_E = torch.arange(up_EDU.shape[0], device=ids_R.device, dtype=ids_R.dtype)
    ends_E = torch.searchsorted(ids_R, experts_E, right=True, out_int32=True)
    place_R = torch.arange(order_R.shape[0], device=order_R.device)
    inverse_R = torch.empty_like(order_R).scatter(0, order_R, place_R)
    hidden_RU = F.grouped_mm(x_TD[order_R // k], up_EDU, offs=ends_E)
    gate_RI, value_RI = hidden_RU.chunk(2, dim=-1)
    act_RI = activate(gate_RI, value_RI) * weights_TK.reshape(-1)[order_R][:, None]
    out_RD = F.grouped_mm(act_RI, down_EID, offs=ends_E)
    return out_RD[inverse_R].view(n_tokens, k, -1).sum(dim=1)


def build(problem: Problem, *, compiled: bool = False) -> Candidate:
    """The composite, as it is or under torch.compile with its default mode."""
    up, down = nn.Parameter(problem.up), nn.Parameter(problem.down)
    run = torch.compile(experts, dynamic=False, backend=problem.compiler) if compiled else experts
    return Candidate(
        call=lambda x, weights, indices: run(x, weights, indices, up, down),
        parameters=(up, down),
        gradients=lambda expert: (up.grad[expert], down.grad[expert]),  # type: ignore[index]
        note=f"torch {torch.__version__}",
    )
