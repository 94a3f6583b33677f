"""The experts over several GPUs by NCCL, against the float64 reference of all ranks' tokens."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from sides import Problem, cached_problem, expected
from trips import waits

from moebius.core import BackendConfig
from moebius.core.tolerance import within
from moebius.torch_frontend import GroupedExperts, load_parameters, shard_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu2,
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


def _waits(name: str, max_tokens: int | None) -> list[int]:
    """How often the host waits for the device in a forward pass, and in a backward pass, after one of each."""
    from moebius.torch_frontend.dispatch import DISPATCHERS, Options

    options = Options(64, 8, 2, max_tokens=max_tokens)
    dispatcher = DISPATCHERS.implementation(DISPATCHERS[name])(torch.distributed.group.WORLD, None, options)
    rank, p = torch.distributed.get_rank(), _problem("bfloat16")
    own = slice(24 * rank, 24 + 16 * rank)  # of 40 tokens
    x = torch.from_numpy(p.x[own]).to("cuda", torch.bfloat16).requires_grad_()
    weights, ids = torch.from_numpy(p.weights[own]).float().cuda(), torch.from_numpy(p.ids[own]).cuda()
    mask, found = torch.from_numpy(p.token_mask[own]).cuda(), []

    def forward() -> torch.Tensor:
        sent, state = dispatcher.dispatch(x, weights, ids, mask, 8)
        y: torch.Tensor = dispatcher.combine(sent.x_SD.float() * sent.weights_SK.sum(1, keepdim=True), state)
        return y

    for _ in range(2):  # the first also sets NCCL up
        y, out = waits(forward)
        dy = torch.ones_like(y)
        _, home = waits(lambda y=y, dy=dy: y.backward(dy))
        found = [out, home]
    assert found[0] == dispatcher.reads_host
    return found


@pytest.mark.parametrize("name, max_tokens, out", [("alltoall", None, 1), ("allgather", None, 1), ("allgather", 24, 0)])
def test_dispatchers_wait_for_the_device_at_most_once_in_a_forward_pass_and_never_in_a_backward_pass(
    name: str, max_tokens: int | None, out: int
) -> None:
    assert ranks.run(_waits, 2, name, max_tokens, transport="nccl") == [[out, 0]] * 2
