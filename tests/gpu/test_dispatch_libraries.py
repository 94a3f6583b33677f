"""The experts over several GPUs by DeepEP and its kin, against the reference's list of ranks; where they are built."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import ranks
import torch
from sides import Arrays, Problem, cached_problem, reference_over_ranks

from moebius.core import BackendConfig, MoEConfig
from moebius.core.tolerance import Bound, bounds, within
from moebius.torch_frontend import GroupedExpertsDeepEP, load_parameters
from moebius.torch_frontend.dispatch import DISPATCHERS
from moebius.torch_frontend.dispatch_limits import LIMITS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu2,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
LENGTHS = [(24, 16), (40, 0)]
LIBRARIES = [name for name in DISPATCHERS.names if DISPATCHERS[name].needs]


@cache
def _problem() -> Problem:
    settings = {"tokens": 40, "dim": 256, "inter": 64, "n_experts": 8, "k": 2}
    return cached_problem(**settings, expert_bias=True, dtype="bfloat16")


def _computed(lengths: tuple[int, ...], name: str, overlaps: bool, manner: str) -> dict[str, torch.Tensor]:
    """This rank's part of the output and of every gradient."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cuda", (len(lengths),), mesh_dim_names=("ep",))
    rank, p = mesh.get_local_rank(), _problem()
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    # Transformer Engine's EP is made once, for a number of tokens.
    backend = BackendConfig(experts="grouped_mm", dispatcher_max_tokens=40 if LIMITS[name].once else None)
    module: Any = GroupedExpertsDeepEP(p.config, backend, name, 20, True, overlaps, device="cuda")
    load_parameters(module, {name: torch.from_numpy(value) for name, value in p.parameters.items()})
    module.init_token_dispatcher(mesh)
    x = torch.from_numpy(p.x[own]).to("cuda", torch.bfloat16).requires_grad_()
    weights = torch.from_numpy(p.weights[own]).float().cuda().requires_grad_()
    tokens = x, torch.from_numpy(p.token_mask[own]).cuda(), weights, torch.from_numpy(p.ids[own]).cuda()
    if manner == "recomputed":
        y = torch.utils.checkpoint.checkpoint(module, *tokens, use_reentrant=False)
    else:
        y = module(*tokens)
    y.backward(torch.from_numpy(p.dy[own]).to("cuda", torch.bfloat16))
    grads = {name: value.grad.to_local() for name, value in module.named_parameters()}
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}
    found = {name: value.cpu() for name, value in found.items()}
    module.token_dispatcher.close()
    return found


@cache
def _expected(lengths: tuple[int, ...]) -> tuple[Arrays, dict[str, Bound]]:
    exact = reference_over_ranks(_problem(), lengths)
    return exact, bounds(lambda noise: reference_over_ranks(_problem(), lengths, noise), exact, "bfloat16")


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("manner", ["plain", "recomputed"])
@pytest.mark.parametrize("overlaps", [False, True], ids=["", "async"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_experts_over_gpus_by_a_library_agree_with_reference(
    name: str, overlaps: bool, manner: str, lengths: tuple[int, ...]
) -> None:
    why = DISPATCHERS[name].missing() or DISPATCHERS.broken(DISPATCHERS[name])
    if why is not None or (overlaps and not LIMITS[name].overlaps):
        pytest.skip(why or "it has no asynchronous calls")
    parts = ranks.run(_computed, len(lengths), lengths, name, overlaps, manner, transport="nccl")
    exact, limits = _expected(lengths)
    for key in parts[0]:
        whole = torch.cat([part[key] for part in parts]).double().numpy()
        assert within(whole, exact[key], limits[key]), key


def _overlap(asynchronous: bool) -> tuple[int, int]:
    """Kernels that send tokens in a forward pass, and other kernels that run during one of them, by a trace."""
    from torch.autograd import DeviceType
    from torch.distributed.device_mesh import init_device_mesh
    from torch.profiler import ProfilerActivity, profile

    from moebius.torch_frontend import MoE, shard_experts

    sizes = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 4096, "moe_inter_dim": 1024}
    config = MoEConfig(**sizes, n_shared_experts=4, dtype="bfloat16")
    backend = BackendConfig(experts="grouped_mm", dispatcher="deepep", dispatcher_async_dispatch=asynchronous)
    layer = MoE(config, backend, device="cuda")
    shard_experts(layer.experts, init_device_mesh("cuda", (2,), mesh_dim_names=("ep",)))
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            layer(x)
            torch.cuda.synchronize()
    kernels = [one for one in seen.events() if one.device_type == DeviceType.CUDA]
    sending = [one.time_range for one in kernels if "deep_ep" in one.name and "::dispatch" in one.name]
    others = [one.time_range for one in kernels if "deep_ep" not in one.name]
    during = [own for own in others if any(own.start < sent.end and sent.start < own.end for sent in sending)]
    layer.experts.close()
    return len(sending), len(during)


def test_shared_experts_are_computed_while_deepep_sends_by_a_trace() -> None:
    why = DISPATCHERS["deepep"].missing() or DISPATCHERS.broken(DISPATCHERS["deepep"])
    if why is not None:
        pytest.skip(why)
    for asynchronous in (True, False):
        for sending, during in ranks.run(_overlap, 2, asynchronous, transport="nccl"):
            assert sending > 0 and (during > 0) == asynchronous
