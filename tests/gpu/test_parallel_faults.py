"""A rank that dies over NCCL: the other's process ends, and its log says who is missing, in which layer and step."""

from __future__ import annotations

import os
import signal
from functools import cache
from typing import Any

import faults
import pytest
import torch

from moebius.core import BackendConfig, MoEConfig
from moebius.core.liveness import SETTING as HEARTBEAT
from moebius.torch_frontend.grouped_experts import GroupedExpertsDeepEP
from moebius.torch_frontend.preflight import name_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.gpu2,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
TIMEOUT = 15.0  # seconds, of the group; NCCL's watchdog and the start of ranks have the rest of faults.WAIT
E, K, D, T = 4, 2, 16, 3


def _dies_in_the_second_step(dispatcher: str, where: str, device: str = "cuda") -> str:
    """Three steps of two layers; rank 1 ends in the second, before its second layer, or in its backward pass."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (2,), mesh_dim_names=("ep",))
    sizes = {"dim": D, "moe_inter_dim": 8, "n_routed_experts": E, "n_activated_experts": K}
    layers = torch.nn.ModuleList(
        GroupedExpertsDeepEP(
            MoEConfig(**sizes, dtype="float32"), BackendConfig(experts="loop"), dispatcher, device=device
        )
        for _ in range(2)
    )
    model: Any = torch.nn.ModuleDict({"blocks": layers})
    for layer in layers:
        layer.init_token_dispatcher(mesh)  # type: ignore[operator]
    name_layers(model)

    def ends(*_: Any) -> None:
        if mesh.get_local_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    for step in range(3):
        y = torch.ones(T, D, device=device, requires_grad=True)
        ids = torch.arange(T * K, device=device).view(T, K) % E
        for number, layer in enumerate(layers):
            if step == 1 and number == 1 and where == "forward":
                ends()
            y = layer(y, torch.ones(T, dtype=torch.bool, device=device), torch.ones(T, K, device=device), ids)
            if step == 1 and number == 0 and where == "backward":
                y.register_hook(ends)
        y.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
    return "done"


@cache
def _ends(dispatcher: str, where: str) -> list[faults.End]:
    told = {"timeout": TIMEOUT, "env": {HEARTBEAT: "0.5"}, "transport": "nccl"}
    return faults.run(_dies_in_the_second_step, 2, dispatcher, where, **told)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_the_process_that_waits_for_a_dead_rank_ends_and_leaves_the_record_in_its_log(
    dispatcher: str, where: str
) -> None:
    waiting, dead = _ends(dispatcher, where)
    assert dead.code == -signal.SIGKILL
    assert waiting.code not in (None, 0)  # it ended, and not by having done its work
    layer = "blocks.1" if where == "forward" else "blocks.0"
    lines = [line for line in waiting.stderr.splitlines() if line.startswith("rank 0 waits since")]
    assert any(f"in layer {layer}, step 2, {where}; missing: rank 1" in line for line in lines), waiting.stderr[-2000:]
