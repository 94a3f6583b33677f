"""PyTorch's ranks and Flax's devices on the same tokens and weights: as near to each other as rounding allows."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import ranks
from sides import Problem, cached_problem, reference_over_ranks

from moebius.core import BackendConfig
from moebius.core.tolerance import bounds, within

LENGTHS = (8, 8)
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"expert_bias": True},
    "bfloat16": {"expert_bias": True, "dtype": "bfloat16", "expert_activation": "geglu"},
    "k_8": {"k": 8, "dtype": "bfloat16"},
}
DISPATCHERS = ("allgather", "alltoall")
CASES = [(name, dispatcher) for name in SETTINGS for dispatcher in DISPATCHERS]

# On two devices of one process, which has to be told of them before it starts.
FLAX = """
import pickle, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from moebius.core import BackendConfig
from moebius.jax_frontend import GroupedExperts, load_parameters

mesh = jax.make_mesh((2,), ("ep",))
cases, found = pickle.load(sys.stdin.buffer), {}
for (name, dispatcher), (config, arrays) in cases.items():
    parameters, x, mask, weights, ids, dy = arrays
    backend = BackendConfig(experts="loop", dispatcher=dispatcher)
    layer = GroupedExperts(config, backend, mesh=mesh, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    load_parameters(layer, parameters)
    graph, own, rest = nnx.split(layer, nnx.Param, ...)
    x, dy, weights = jnp.asarray(x, config.dtype), jnp.asarray(dy, config.dtype), jnp.asarray(weights, jnp.float32)
    mask, ids = jnp.asarray(mask), jnp.asarray(ids, jnp.int32)

    @jax.jit
    def both(own, x, weights):
        call = lambda own, x, w: nnx.merge(graph, own, rest)(x, mask, w, ids)
        y, pull = jax.vjp(call, own, x, weights)
        grads, dx, dweights = pull(dy)
        return {"y": y, "dx": dx, "dweights": dweights, **{n: g[...] for n, g in grads.items()}}

    out = both(own, x, weights)
    found[name, dispatcher] = {key: np.asarray(value, np.float64) for key, value in out.items()}
pickle.dump(found, sys.stdout.buffer)
"""


def _problem(name: str) -> Problem:
    return cached_problem(tokens=sum(LENGTHS), n_experts=8, seed=2, **({"k": 2} | SETTINGS[name]))


@cache
def _flax() -> dict[Any, dict[str, np.ndarray]]:
    given = {}
    for name, dispatcher in CASES:
        p = _problem(name)
        given[name, dispatcher] = p.config, (p.parameters, p.x, p.token_mask, p.weights, p.ids, p.dy)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", FLAX],
        input=pickle.dumps(given),
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    answer: dict[Any, dict[str, np.ndarray]] = pickle.loads(done.stdout)
    return answer


def _rank() -> dict[Any, dict[str, np.ndarray]]:
    """This rank's tokens and experts, of every case."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from moebius.torch_frontend import GroupedExperts, load_parameters, shard_experts

    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), {}
    rank = mesh.get_local_rank()
    own = slice(sum(LENGTHS[:rank]), sum(LENGTHS[: rank + 1]))
    for name, dispatcher in CASES:
        p = _problem(name)
        kind = getattr(torch, p.dtype)
        layer = GroupedExperts(p.config, BackendConfig(experts="loop", dispatcher=dispatcher))
        load_parameters(layer, {key: torch.from_numpy(value) for key, value in p.parameters.items()})
        shard_experts(layer, mesh)
        x = torch.from_numpy(p.x[own]).to(kind).requires_grad_()
        weights = torch.from_numpy(p.weights[own]).float().requires_grad_()
        y = layer(x, torch.from_numpy(p.token_mask[own]), weights, torch.from_numpy(p.ids[own]))
        y.backward(torch.from_numpy(p.dy[own]).to(kind))
        grads: dict[str, Any] = {key: value.grad.to_local() for key, value in layer.named_parameters()}
        of_all = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}
        found[name, dispatcher] = {key: value.double().numpy() for key, value in of_all.items()}
    return found


@cache
def _torch() -> dict[Any, dict[str, np.ndarray]]:
    parts = ranks.run(_rank, 2)
    return {
        case: {key: np.concatenate([part[case][key] for part in parts]) for key in parts[0][case]} for case in CASES
    }


@pytest.mark.parametrize("name, dispatcher", CASES, ids=str)
def test_ranks_of_pytorch_and_devices_of_flax_agree_in_output_and_every_gradient(name: str, dispatcher: str) -> None:
    p = _problem(name)
    exact = reference_over_ranks(p, LENGTHS)
    limits = bounds(lambda arithmetic: reference_over_ranks(p, LENGTHS, arithmetic), exact, p.dtype)
    in_torch, in_flax = _torch()[name, dispatcher], _flax()[name, dispatcher]
    assert in_torch.keys() == in_flax.keys() == exact.keys()
    for key, value in exact.items():
        assert within(in_torch[key], value, limits[key]) and within(in_flax[key], value, limits[key]), key
        assert within(in_flax[key], in_torch[key], limits[key]), key
