"""The documented modules over several ranks: equal to one rank, dispatchers, DTensors in and out, the gather."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from sides import Problem, cached_problem, expected
from torch import nn

from moebius.core import BackendConfig
from moebius.core.tolerance import within
from moebius.torch_frontend import load_parameters
from moebius.torch_frontend.automodel import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE

LENGTHS = [(3, 2), (5, 0)]
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "experts": (GroupedExperts, ()),
    "deepep": (GroupedExpertsDeepEP, ("torch",)),
    "te": (GroupedExpertsTE, ("allgather",)),
}


def settled(tokens: int) -> Problem:
    return cached_problem(tokens=tokens, expert_bias=True, dtype="float32", seed=2)


def built(kind: str, p: Problem) -> Any:
    cls, arguments = KINDS[kind]
    module = cls(p.config, BackendConfig(experts="torch"), *arguments)
    load_parameters(module, {name: torch.from_numpy(value) for name, value in p.parameters.items()})
    return module


def mesh_of(**dims: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


# --------------------------------------------------------------------------------------------------- equal to one rank
def computed(lengths: tuple[int, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """On one rank: this rank's y, dx and dweights, and every parameter's whole gradient."""
    from moebius.torch_frontend.sharding import shard_experts

    p, mesh, rank = settled(sum(lengths)), mesh_of(ep=len(lengths)), dist.get_rank()
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    found = {}
    for kind in KINDS:
        module = built(kind, p)
        if kind == "experts":
            shard_experts(module, mesh)
        else:
            module.init_token_dispatcher(mesh)
        x = torch.from_numpy(p.x[own]).float().requires_grad_()
        weights = torch.from_numpy(p.weights[own]).float().requires_grad_()
        y = module(x, torch.from_numpy(p.token_mask[own]), weights, torch.from_numpy(p.ids[own]))
        y.backward(torch.from_numpy(p.dy[own]).float())
        grads = {name: value.grad.full_tensor() for name, value in module.named_parameters()}
        found[kind] = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}
    return found


@cache
def results(lengths: tuple[int, ...]) -> list[dict[str, dict[str, torch.Tensor]]]:
    return ranks.run(computed, len(lengths), lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_modules_over_ranks_agree_with_reference_on_one(kind: str, lengths: tuple[int, ...]) -> None:
    exact, limits = expected(settled(sum(lengths)))
    answers = [answer[kind] for answer in results(lengths)]
    for name, wanted in exact.items():
        if name in ("y", "dx", "dweights"):
            value = torch.cat([answer[name] for answer in answers])
        else:
            value = answers[0][name]
            assert all(torch.equal(answer[name], value) for answer in answers)
        assert within(value.double().numpy(), wanted, limits[name]), name


# -------------------------------------------------------------------------------------------------------- dispatchers
def refused() -> dict[str, str]:
    """On one rank: what is said where a dispatcher is missing, or cannot be."""
    from moebius.core import MoEError
    from moebius.torch_frontend.sharding import shard_experts

    p, mesh = settled(5), mesh_of(ep=2)
    arguments = torch.zeros(5, 16), torch.ones(5, dtype=torch.bool), torch.ones(5, 2), torch.zeros(5, 2).long()
    said = {}

    def note(name: str, call: Any) -> None:
        try:
            call()
        except MoEError as error:
            said[name] = str(error)

    for kind in ("deepep", "te"):
        module = shard_experts(built(kind, p), mesh)
        note(f"{kind} forward", lambda module=module: module(*arguments))
    default = GroupedExpertsDeepEP(p.config)
    note("deepep", lambda: default.init_token_dispatcher(mesh))
    note("buffer", lambda: default._init_deepep_buffer(mesh.get_group()))
    return said


def test_modules_without_a_dispatcher_that_serves_say_so_on_every_rank() -> None:
    for said in ranks.run(refused, 2):
        assert said.keys() == {"deepep forward", "te forward", "deepep", "buffer"}
        for kind in ("deepep", "te"):
            assert "do: call init_token_dispatcher(ep_mesh) first" in said[f"{kind} forward"]
        assert "'deepep'" in said["deepep"] and "'deepep'" in said["buffer"]


def buffered() -> dict[str, Any]:
    """On one rank: what `_init_deepep_buffer` leaves, called once, again, and for one rank."""
    from moebius.torch_frontend import liveness

    p = settled(5)
    group, alone = dist.new_group([0, 1]), [dist.new_group([rank]) for rank in (0, 1)][dist.get_rank()]
    module = GroupedExpertsDeepEP(p.config, BackendConfig(experts="torch"), "alltoall")
    found: dict[str, Any] = {}
    for name, ranks_ in [("once", group), ("again", group), ("alone", alone)]:
        module._init_deepep_buffer(ranks_)
        here = liveness.known(group)
        open_ = 0 if here is None else len(here.dispatchers)
        found[name] = type(module.token_dispatcher).__name__, module.ep_size, module.ep_rank, open_
    return found


def test_init_deepep_buffer_builds_the_dispatcher_that_was_named_and_closes_the_one_before() -> None:
    for rank, found in enumerate(ranks.run(buffered, 2)):
        assert found["once"] == found["again"] == ("AllToAll", 2, rank, 1)
        assert found["alone"] == ("Local", 1, 0, 0)


# -------------------------------------------------------------------------------------------------- DTensors in and out
def stated() -> dict[str, Any]:
    """On one rank of two: what GroupedExpertsTE gives and takes."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    p, mesh, rank = settled(5), mesh_of(ep=2), dist.get_rank()
    te, whole = built("te", p), built("te", p)
    te.init_token_dispatcher(mesh)
    found: dict[str, Any] = {"kept": te.ep_mesh is mesh and te.moe_mesh is None, "sizes": (te.ep_size, te.ep_rank)}
    state = te.state_dict(prefix="a.")
    found["keys"] = sorted(state)
    found["placed"] = {str(value.placements) for value in state.values()}
    found["values"] = all(
        torch.equal(value.full_tensor(), whole.state_dict()[name.removeprefix("a.")]) for name, value in state.items()
    )
    torch.manual_seed(0)
    other = {name: torch.randn_like(value) for name, value in whole.state_dict().items()}
    own = slice(2 * rank, 2 * rank + 2)
    forms = {
        "all experts": {name: value.clone() for name, value in other.items()},
        "this rank's": {name: value[own].clone() for name, value in other.items()},
        "DTensors": {name: DTensor.from_local(value[own].clone(), mesh, [Shard(0)]) for name, value in other.items()},
        "copies": {name: DTensor.from_local(value.clone(), mesh, [Replicate()]) for name, value in other.items()},
    }
    for form, values in forms.items():
        nn.Module.load_state_dict(te, {name: torch.zeros_like(value) for name, value in te.state_dict().items()})
        te.load_state_dict(values)
        local = {name: value.to_local() for name, value in te.named_parameters()}
        found[form] = all(torch.equal(value, other[name][own]) for name, value in local.items())
    te.down_projs = torch.full((4, 8, 16), 3.0)
    te.gate_and_up_projs = torch.full((2, 16, 16), 5.0)
    found["assigned"] = te.down_projs.to_local().unique().tolist(), te.gate_and_up_projs.to_local().unique().tolist()
    try:
        te.load_state_dict({**other, "down_projs": torch.zeros(3, 8, 16)})
    except RuntimeError as error:
        found["wrong shape"] = str(error)
    tensor = torch.full((2, 3), float(rank))
    wrapped = te._to_ep_dtensor(tensor)
    found["wrapped"] = tuple(wrapped.shape), str(wrapped.placements), wrapped.full_tensor()[:, 0].tolist()
    found["again"] = te._to_ep_dtensor(wrapped) is wrapped
    return found


def test_te_class_over_ranks_gives_and_takes_dtensors() -> None:
    for rank, found in enumerate(ranks.run(stated, 2)):
        assert found["kept"] and found["sizes"] == (2, rank)
        assert found["keys"] == ["a.down_proj_bias", "a.down_projs", "a.gate_and_up_projs", "a.gate_up_proj_bias"]
        assert found["placed"] == {"(Shard(dim=0),)"} and found["values"]
        for form in ("all experts", "this rank's", "DTensors", "copies"):
            assert found[form], form
        assert found["assigned"] == ([3.0], [5.0])
        assert "down_projs" in found["wrong shape"] and "[3, 8, 16]" in found["wrong shape"]
        assert found["wrapped"] == ((4, 3), "(Shard(dim=0),)", [0, 0, 1, 1]) and found["again"]


def wrapped_on(dims: dict[str, int]) -> tuple[tuple[int, ...], str, tuple[str, ...]]:
    """On one rank: shape, placements and mesh of a [2, 3] tensor wrapped on a mesh of these dimensions."""
    te, mesh = built("te", settled(5)), mesh_of(**dims)
    te.set_moe_mesh(mesh)
    wrapped = te._to_ep_dtensor(torch.zeros(2, 3))
    return tuple(wrapped.shape), str(wrapped.placements), wrapped.device_mesh.mesh_dim_names


SHARDED, CUT, COPIED = "Shard(dim=0)", "Shard(dim=1)", "Replicate()"
WRAPPED = {
    "ep": ({"ep": 2}, (4, 3), f"({SHARDED},)", ("ep",)),
    "one_shard": ({"ep_shard": 1, "ep": 2}, (4, 3), f"({SHARDED},)", ("ep",)),
    "shards": ({"ep_shard": 2, "ep": 2}, (4, 6), f"({CUT}, {SHARDED})", ("ep_shard", "ep")),
    "copies": ({"ep_replicate": 2, "ep": 2}, (4, 3), f"({COPIED}, {SHARDED})", ("ep_replicate", "ep")),
    "beside_others": ({"pp": 1, "ep_shard": 2, "ep": 2}, (4, 6), f"({CUT}, {SHARDED})", ("ep_shard", "ep")),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_to_ep_dtensor_places_a_stacked_tensor_by_the_names_of_the_mesh(name: str) -> None:
    dims, shape, placements, names = WRAPPED[name]
    for found in ranks.run(wrapped_on, int(np.prod(list(dims.values()))), dims):
        assert found == (shape, placements, names)


# ----------------------------------------------------------------------------------------------------------- the gather
def gathered(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """On one rank: all ranks' rows, the gradient of the own ones, and whether what came in was left alone."""
    from moebius.torch_frontend.automodel import _AllGatherConcatVarlenFn

    rank = dist.get_rank()
    local = (torch.arange(3.0 * lengths[rank]).view(-1, 3) + 100 * rank).requires_grad_()
    out = _AllGatherConcatVarlenFn.apply(local, dist.group.WORLD, list(lengths), max(lengths))
    upstream = torch.arange(out.numel(), dtype=torch.float32).view_as(out) * (rank + 1)
    before = upstream.clone()
    out.backward(upstream)
    return out.detach(), local.grad, torch.equal(upstream, before)


@pytest.mark.parametrize("lengths", [(2, 2), (3, 1), (0, 2), (1, 0, 2)], ids=str)
def test_all_gather_of_uneven_lengths_concatenates_and_its_gradient_sums_the_ranks(lengths: tuple[int, ...]) -> None:
    found = ranks.run(gathered, len(lengths), lengths)
    wanted = torch.cat([torch.arange(3.0 * n).view(-1, 3) + 100 * rank for rank, n in enumerate(lengths)])
    gradient = torch.arange(wanted.numel(), dtype=torch.float32).view_as(wanted) * sum(range(1, len(lengths) + 1))
    for (out, grad, untouched), own in zip(found, gradient.split(lengths), strict=True):
        assert torch.equal(out, wanted) and torch.equal(grad, own) and untouched
