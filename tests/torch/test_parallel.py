"""The experts over several ranks: output and gradients, against the reference's list of ranks and against one rank.

All ranks' tokens together are one problem, so what the ranks return, put together, is what one rank returns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from sides import Arrays, Problem, cached_problem, reference_over_ranks

from moebius.core import BackendConfig
from moebius.core.tolerance import Bound, bounds, within
from moebius.torch_frontend import load_parameters
from moebius.torch_frontend.grouped_experts import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE

E, K = 8, 2
LENGTHS = [(3, 2), (5, 0), (0, 0), (4, 1, 0, 3)]
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"expert_bias": True},
    "bfloat16": {"expert_bias": True, "dtype": "bfloat16", "expert_activation": "swigluoai"},
    "float16": {"dtype": "float16", "expert_activation": "relu2"},
    "weight_after": {"expert_bias": True, "dtype": "bfloat16", "apply_router_weight_after_down": True},
    "k_1": {"k": 1},
    "k_3": {"expert_bias": True, "k": 3},
    "k_8": {"k": 8},
}
over_ranks = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def _poison(p: Problem) -> Problem:
    """Token 1 is masked, and nothing of it is a number."""
    x, weights, dy = p.x.copy(), p.weights.copy(), p.dy.copy()
    x[1], weights[1], dy[1] = np.nan, np.inf, np.nan
    return _masked(p).but(x=x, weights=weights, dy=dy)


def _masked(p: Problem) -> Problem:
    mask = p.token_mask.copy()
    mask[1] = False
    return p.but(token_mask=mask)


def _odd_ids(p: Problem) -> Problem:
    ids = p.ids.copy()
    ids[0], ids[1], ids[2, 1], ids[3, 0] = -1, [E, 1], 2**31 - 1, -7
    return p.but(ids=ids, token_mask=np.ones_like(p.token_mask))


SITUATIONS = {
    "masked": _masked,
    "poison": _poison,
    "odd_ids": _odd_ids,
    "duplicates": lambda p: p.but(ids=p.ids[:, :1].repeat(K, axis=1)),
    # Of 2 or 4 ranks, only the last holds expert 7.
    "last_rank": lambda p: p.but(ids=np.full_like(p.ids, E - 1)),
    "all_masked": lambda p: p.but(token_mask=np.zeros_like(p.token_mask)),
}
# Module, its arguments, and the backend: each must give what the first gives.
MODULES: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "GroupedExperts": (GroupedExperts, (), {"experts": "loop"}),
    "grouped_mm": (GroupedExperts, (), {"experts": "grouped_mm", "dispatcher": "torch"}),
    "double_backward": (GroupedExperts, (), {"experts": "loop", "double_backward": True}),
    "alltoall": (GroupedExperts, (), {"experts": "loop", "dispatcher": "alltoall"}),
    "static": (GroupedExperts, (), {"experts": "loop", "dispatcher_max_tokens": 6}),
    "DeepEP": (GroupedExpertsDeepEP, ("alltoall",), {"experts": "loop", "combine_dtype": "float32"}),
    "TE": (GroupedExpertsTE, ("allgather",), {"experts": "loop"}),
}
# In every case; the others in two of them.
THROUGHOUT = ("GroupedExperts", "alltoall", "static")


@cache
def _problem(lengths: tuple[int, ...], name: str) -> Problem:
    """Of SETTINGS, or a situation of the first of them."""
    settings = {"k": K, **SETTINGS[name if name in SETTINGS else "float32"]}
    p = cached_problem(tokens=sum(lengths), n_experts=E, seed=1, **settings)
    return SITUATIONS[name](p) if name in SITUATIONS else p


def _names(lengths: tuple[int, ...]) -> list[str]:
    return [*SETTINGS, *(SITUATIONS if sum(lengths) else ())]


def _manners(lengths: tuple[int, ...]) -> list[str]:
    """Beside a plain call; compiled for one number of ranks, since it takes seconds."""
    return ["recomputed", "compiled"] if lengths == (5, 0) else ["recomputed"]


# ----------------------------------------------------------------------------------------------------- what a rank does
def _computed(lengths: tuple[int, ...]) -> dict[Any, dict[str, torch.Tensor]]:
    """This rank's part of every case: the names of `_names` in every module; recomputed and compiled, the first."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (len(lengths),), mesh_dim_names=("ep",))
    found = {}
    for name in _names(lengths):
        for module in MODULES:
            if name in ("float32", "bfloat16") or module in THROUGHOUT:
                found[name, module] = _one(_problem(lengths, name), lengths, mesh, module, "plain")
    for manner in _manners(lengths):
        found[manner, "GroupedExperts"] = _one(_problem(lengths, "float32"), lengths, mesh, "GroupedExperts", manner)
    return found


def _one(p: Problem, lengths: tuple[int, ...], mesh: Any, name: str, manner: str) -> dict[str, torch.Tensor]:
    from moebius.torch_frontend.sharding import shard_experts

    module = _module(p, name)
    if name in ("DeepEP", "TE"):
        module.init_token_dispatcher(mesh)
    else:
        shard_experts(module, mesh)
    rank = mesh.get_local_rank()
    own = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    found = _run(module, p, own, manner)
    placements = {str(value.grad.placements) for value in module.parameters()}
    assert placements == {"(Shard(dim=0),)"}, placements
    return {name: getattr(value, "to_local", lambda value=value: value)() for name, value in found.items()}


def _module(p: Problem, name: str) -> Any:
    kind, arguments, backend = MODULES[name]
    module = kind(p.config, BackendConfig(**backend), *arguments)
    load_parameters(module, {name: torch.from_numpy(value) for name, value in p.parameters.items()})
    return module


def _run(module: Any, p: Problem, own: slice, manner: str = "plain") -> dict[str, torch.Tensor]:
    """y, dx, dweights and every parameter's gradient, of the tokens `own`."""
    kind = getattr(torch, p.dtype)
    x = torch.from_numpy(p.x[own]).to(kind).requires_grad_()
    weights = torch.from_numpy(p.weights[own]).float().requires_grad_()
    arguments = x, torch.from_numpy(p.token_mask[own]), weights, torch.from_numpy(p.ids[own])
    if manner == "recomputed":
        y = torch.utils.checkpoint.checkpoint(module, *arguments, use_reentrant=False)
    else:
        y = (torch.compile(module, backend=_without_collectives) if manner == "compiled" else module)(*arguments)
    y.backward(torch.from_numpy(p.dy[own]).to(kind))
    grads = {name: value.grad for name, value in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}


def _without_collectives(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """A compiler that refuses graphs with collectives in them."""
    from torch._dynamo.backends.debugging import aot_eager

    called = [str(node.target) for node in graph.graph.nodes]
    assert not any("c10d" in name or "all_gather" in name for name in called), called
    return aot_eager(graph, inputs)


# ------------------------------------------------------------------------------------------------- what is due of them
@cache
def _outcomes(lengths: tuple[int, ...]) -> list[dict[Any, dict[str, torch.Tensor]]]:
    return ranks.run(_computed, len(lengths), lengths)


def _whole(lengths: tuple[int, ...], name: str, module: str = "GroupedExperts") -> dict[str, torch.Tensor]:
    """The ranks' parts, one after the other: tokens by rank, and of the parameters each rank's experts."""
    parts = [outcome[name, module] for outcome in _outcomes(lengths)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@cache
def _expected(lengths: tuple[int, ...], name: str) -> tuple[Arrays, dict[str, Bound]]:
    p = _problem(lengths, name)
    exact = reference_over_ranks(p, lengths)
    return exact, bounds(lambda arithmetic: reference_over_ranks(p, lengths, arithmetic), exact, p.dtype)


def _assert_within(found: dict[str, torch.Tensor], exact: Arrays, limits: dict[str, Bound]) -> None:
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert within(value.double().numpy(), exact[name], limits[name]), name


def _assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("lengths, name", [(lengths, name) for lengths in LENGTHS for name in _names(lengths)], ids=str)
def test_experts_over_ranks_agree_with_reference(lengths: tuple[int, ...], name: str) -> None:
    due = _expected(lengths, "masked" if name == "poison" else name)
    for module in THROUGHOUT:
        _assert_within(_whole(lengths, name, module), *due)


@over_ranks
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_experts_over_ranks_of_every_module_agree_with_reference(
    lengths: tuple[int, ...], module: str, name: str
) -> None:
    _assert_within(_whole(lengths, name, module), *_expected(lengths, name))


@over_ranks
@pytest.mark.parametrize("module", MODULES)
def test_experts_over_ranks_in_float32_equal_one_rank_bit_for_bit(lengths: tuple[int, ...], module: str) -> None:
    """K = 2: each sum over slots and ranks has two terms, so it has one rounding however it is split."""
    p = _problem(lengths, "float32")
    _assert_equal(_whole(lengths, "float32", module), _run(_module(p, module), p, slice(None)))


@pytest.mark.parametrize("lengths, manner", [(n, manner) for n in LENGTHS for manner in _manners(n)], ids=str)
def test_experts_over_ranks_recomputed_or_compiled_equal_plain(lengths: tuple[int, ...], manner: str) -> None:
    found, wanted = _whole(lengths, manner), _whole(lengths, "float32")
    if manner == "recomputed":
        _assert_equal(found, wanted)
    else:
        _assert_within(found, *_expected(lengths, "float32"))


@pytest.mark.parametrize("lengths", [(3, 2), (5, 0), (4, 1, 0, 3)], ids=str)
def test_experts_over_ranks_with_poison_in_a_masked_token_are_unchanged_bit_for_bit(lengths: tuple[int, ...]) -> None:
    for module in THROUGHOUT:
        _assert_equal(_whole(lengths, "poison", module), _whole(lengths, "masked", module))


@over_ranks
@pytest.mark.parametrize("name", ["k_3", "bfloat16"])
def test_alltoall_has_the_outputs_of_allgather_bit_for_bit(lengths: tuple[int, ...], name: str) -> None:
    torch.testing.assert_close(*(_whole(lengths, name, m)["y"] for m in ("GroupedExperts", "alltoall")), rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [(3, 2), (5, 0), (4, 1, 0, 3)], ids=str)
@pytest.mark.parametrize("name", ["last_rank", "all_masked"])
def test_experts_over_ranks_without_rows_have_zero_gradients_not_none(lengths: tuple[int, ...], name: str) -> None:
    p = _problem(lengths, name)
    idle = _outcomes(lengths)[: -1 if name == "last_rank" else None]
    assert idle
    for outcome in idle:
        for key in p.parameters:
            grad = outcome[name, "GroupedExperts"][key]
            assert grad.shape[0] == E // len(lengths) and (grad == 0).all(), key
