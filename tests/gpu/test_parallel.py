"""The experts over several GPUs by NCCL, against the float64 reference of all ranks' tokens."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from sides import Problem, cached_problem, expected

from moebius.core import BackendConfig
from moebius.core.tolerance import within
from moebius.torch_frontend import GroupedExperts, load_parameters, shard_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
LENGTHS = [(24, 16), (40, 0)]


def _problem(dtype: str) -> Problem:
    return cached_problem(tokens=40, dim=64, inter=32, n_experts=8, k=2, expert_bias=True, dtype=dtype)


def _computed(lengths: tuple[int, ...], dtype: str) -> dict[str, torch.Tensor]:
    """This rank's part of the output and of every gradient."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cuda", (len(lengths),), mesh_dim_names=("ep",))
    rank, p, kind = mesh.get_local_rank(), _problem(dtype), getattr(torch, dtype)
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    module: Any = GroupedExperts(p.config, BackendConfig(experts="grouped_mm"), device="cuda")
    load_parameters(module, {name: torch.from_numpy(value) for name, value in p.parameters.items()})
    shard_experts(module, mesh)
    x = torch.from_numpy(p.x[own]).to("cuda", kind).requires_grad_()
    weights = torch.from_numpy(p.weights[own]).float().cuda().requires_grad_()
    y = module(x, torch.from_numpy(p.token_mask[own]).cuda(), weights, torch.from_numpy(p.ids[own]).cuda())
    y.backward(torch.from_numpy(p.dy[own]).to("cuda", kind))
    grads = {name: value.grad.to_local() for name, value in module.named_parameters()}
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_over_gpus_agree_with_reference(lengths: tuple[int, ...], dtype: str) -> None:
    parts = ranks.run(_computed, len(lengths), lengths, dtype, transport="nccl")
    exact, limits = expected(_problem(dtype))
    for name in parts[0]:
        whole = torch.cat([part[name] for part in parts]).double().numpy()
        assert within(whole, exact[name], limits[name]), name
