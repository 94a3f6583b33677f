"""The same layers over two ranks of PyTorch and over two devices of Flax, by either's own collectives."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
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
Found = Mapping[Any, Mapping[str, np.ndarray]]


class Case(NamedTuple):
    """A row of SETTINGS, the two frontends' dispatchers, and who multiplies."""

    name: str
    torch: str
    flax: str
    experts: str = "loop"


# On two devices of one process, which has to be told of them before it starts.
_FLAX = """
import pickle, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from moebius.core import BackendConfig
from moebius.jax_frontend import GroupedExperts, load_parameters

mesh = jax.make_mesh((2,), ("ep",))
cases, found = pickle.load(sys.stdin.buffer), {}
for case, (experts, dispatcher, config, arrays) in cases.items():
    parameters, x, mask, weights, ids, dy = arrays
    backend = BackendConfig(experts=experts, dispatcher=dispatcher)
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
    found[case] = {key: np.asarray(value, np.float64) for key, value in out.items()}
pickle.dump(found, sys.stdout.buffer)
"""


def problem(case: Case) -> Problem:
    """Its tokens, of both ranks, and its parameters."""
    return cached_problem(tokens=sum(LENGTHS), n_experts=8, seed=2, **({"k": 2} | SETTINGS[case.name]))


def in_flax(cases: Sequence[Case], device: str) -> Found:
    """Output and every gradient of each case, by name."""
    given = {}
    for case in cases:
        p = problem(case)
        given[tuple(case)] = (
            case.experts,
            case.flax,
            p.config,
            (p.parameters, p.x, p.token_mask, p.weights, p.ids, p.dy),
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if device == "cpu":
        flags = f"{flags} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", _FLAX],
        input=pickle.dumps(given),
        env=os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    answer: Found = pickle.loads(done.stdout)
    return answer


def in_torch(cases: Sequence[Case], device: str) -> Found:
    """Output and every gradient of each case, by name."""
    transport = "gloo" if device == "cpu" else "nccl"
    parts = ranks.run(_rank, 2, [tuple(case) for case in cases], device, transport=transport)
    return {
        tuple(case): {key: np.concatenate([part[case][key] for part in parts]) for key in parts[0][case]}
        for case in map(tuple, cases)
    }


def _rank(cases: Sequence[tuple[str, ...]], device: str) -> Found:
    """This rank's tokens and experts, of every case."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from moebius.torch_frontend import GroupedExperts, load_parameters, shard_experts

    mesh, found = init_device_mesh(device, (2,), mesh_dim_names=("ep",)), {}
    rank = mesh.get_local_rank()
    own = slice(sum(LENGTHS[:rank]), sum(LENGTHS[: rank + 1]))
    for case in map(Case._make, cases):
        p = problem(case)
        kind = getattr(torch, p.dtype)
        layer = GroupedExperts(p.config, BackendConfig(experts=case.experts, dispatcher=case.torch), device=device)
        load_parameters(layer, {key: torch.from_numpy(value) for key, value in p.parameters.items()})
        shard_experts(layer, mesh)
        x, mask, weights, ids, dy = (
            torch.from_numpy(v[own]).to(device) for v in (p.x, p.token_mask, p.weights, p.ids, p.dy)
        )
        x, weights = x.to(kind).requires_grad_(), weights.float().requires_grad_()
        y = layer(x, mask, weights, ids)
        y.backward(dy.to(kind))
        grads: dict[str, Any] = {key: value.grad.to_local() for key, value in layer.named_parameters()}
        of_all = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}
        found[tuple(case)] = {key: value.double().cpu().numpy() for key, value in of_all.items()}
    return found


def agree(case: Case, torch: Found, flax: Found) -> None:
    """Both are as near to float64, and to each other, as rounding allows."""
    p = problem(case)
    exact = reference_over_ranks(p, LENGTHS)
    limits = bounds(lambda arithmetic: reference_over_ranks(p, LENGTHS, arithmetic), exact, p.dtype)
    one, other = torch[tuple(case)], flax[tuple(case)]
    assert one.keys() == other.keys() == exact.keys()
    for key, value in exact.items():
        assert within(one[key], value, limits[key]) and within(other[key], value, limits[key]), key
        assert within(other[key], one[key], limits[key]), key
