"""Experts over ranks, as a file: from two ranks of PyTorch over four devices of Flax to four ranks, bit for bit.

A frontend's own checkpoints over other numbers of ranks: tests/torch/test_parallel_state.py, jax/test_checkpoints.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ranks
import torch
from safetensors import torch as files

from moebius.core import BackendConfig, MoEConfig

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 6, "moe_inter_dim": 4, "dtype": "bfloat16"}
CONFIG = MoEConfig(**SIZES, expert_bias=True)

FLAX = """
import sys
import jax
from flax import nnx
from safetensors import flax as files
from moebius.core import BackendConfig, MoEConfig
from moebius.jax_frontend import GroupedExperts, load_parameters, parameters

there, back, sizes = sys.argv[1], sys.argv[2], eval(sys.argv[3])
mesh = jax.make_mesh((4,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
config, zeros = MoEConfig(**sizes, expert_bias=True), {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
layer = GroupedExperts(config, BackendConfig(experts="loop"), mesh=mesh, **zeros)
load_parameters(layer, files.load_file(there))
own = parameters(layer)
shapes = {shard.data.shape for value in own.values() for shard in value.addressable_shards}
assert {shape[0] for shape in shapes} == {2} and all(len(v.addressable_shards) == 4 for v in own.values()), shapes
files.save_file({name: jax.device_put(value, jax.devices()[0]) for name, value in own.items()}, back)
"""


def _layer() -> tuple[Any, Any]:
    """Experts over all ranks, and the mesh."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from moebius.torch_frontend import GroupedExperts, shard_experts

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    return shard_experts(GroupedExperts(CONFIG, BackendConfig(experts="loop")), mesh), mesh


def _saved(path: str) -> dict[str, torch.Tensor]:
    """This rank's part of drawn experts, which it writes together with the others'."""
    layer, mesh = _layer()
    torch.manual_seed(mesh.get_local_rank())
    for value in layer.parameters():
        value.data.to_local().normal_()
    whole = {name: value.full_tensor() for name, value in layer.state_dict().items()}
    if mesh.get_local_rank() == 0:
        files.save_file(whole, path)
    return {name: value.to_local().detach() for name, value in layer.named_parameters()}


def _loaded(path: str) -> dict[str, torch.Tensor]:
    """This rank's part of what the file holds."""
    from moebius.torch_frontend import load_parameters

    layer, _ = _layer()
    load_parameters(layer, files.load_file(path))
    return {name: value.to_local().detach() for name, value in layer.named_parameters()}


def test_experts_of_two_ranks_pass_over_four_devices_of_flax_to_four_ranks_bit_for_bit(tmp_path: Path) -> None:
    there, back = str(tmp_path / "there.safetensors"), str(tmp_path / "back.safetensors")
    two = ranks.run(_saved, 2, there)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FLAX, there, back, repr(SIZES)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    four = ranks.run(_loaded, 4, back)
    assert two[0].keys() == four[0].keys() and len(two[0]) == 4
    for name in two[0]:
        assert [len(part[name]) for part in (*two, *four)] == [4, 4, 2, 2, 2, 2], name
        wanted, found = (torch.cat([part[name] for part in parts]) for parts in (two, four))
        assert wanted.dtype == found.dtype == torch.bfloat16 and wanted.abs().max() > 0
        assert torch.equal(wanted.view(torch.int16), found.view(torch.int16)), name
