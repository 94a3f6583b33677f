"""The experts over the libraries' dispatchers: output and every gradient, against the reference's list of ranks.

The libraries are stand-ins over gloo that refuse what the libraries do. One spawn of ranks runs all cases of its
number of ranks and tokens.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from sides import Arrays, Problem, cached_problem, reference_over_ranks

from moebius.core import BackendConfig
from moebius.core.tolerance import Bound, bounds, within
from moebius.torch_frontend import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, experts, load_parameters

E = 8
LENGTHS = [(3, 2), (5, 0), (0, 0), (4, 1, 0, 3)]
over_ranks = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
# Name of the dispatcher, and Options beside the sizes.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepep": ("deepep", {}),
    "deepep async": ("deepep", {"asynchronous": True, "num_sms": 24}),
    "deepep static": ("deepep", {"max_tokens": 6}),
    "uccl_ep": ("uccl_ep", {"share": False}),
    "elastic": ("deepep_elastic", {}),
    "elastic async static": ("deepep_elastic", {"asynchronous": True, "max_tokens": 5}),
    "hybridep": ("hybridep", {}),
    "hybridep static": ("hybridep", {"max_tokens": 70}),
    "te static": ("te", {"max_tokens": 6}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    # A smooth one: at the kink of a clamped activation a rounding may turn a gradient off.
    "plain": {"expert_bias": True, "expert_activation": "geglu"},
    "weight_after": {"expert_bias": True, "apply_router_weight_after_down": True},
    "k_1": {"k": 1},
    "k_8": {"k": 8},
}


def _masked(p: Problem) -> Problem:
    mask = p.token_mask.copy()
    mask[1] = False
    return p.but(token_mask=mask)


def _poison(p: Problem) -> Problem:
    """Token 1 is masked, and nothing of it is a number."""
    x, weights, dy = p.x.copy(), p.weights.copy(), p.dy.copy()
    x[1], weights[1], dy[1] = np.nan, np.inf, np.nan
    return _masked(p).but(x=x, weights=weights, dy=dy)


def _odd_ids(p: Problem) -> Problem:
    ids = p.ids.copy()
    ids[0], ids[1], ids[2, 1], ids[3, 0] = -1, [E, 1], 2**31 - 1, -7
    return p.but(ids=ids, token_mask=np.ones_like(p.token_mask))


SITUATIONS = {
    "masked": _masked,
    "poison": _poison,
    "odd_ids": _odd_ids,
    "duplicates": lambda p: p.but(ids=p.ids[:, :1].repeat(2, axis=1)),
    "last_rank": lambda p: p.but(ids=np.full_like(p.ids, E - 1)),
    "all_masked": lambda p: p.but(token_mask=np.zeros_like(p.token_mask)),
}


@cache
def _problem(lengths: tuple[int, ...], name: str, dim: int) -> Problem:
    settings = {"k": 2, **SETTINGS.get(name, SETTINGS["plain"])}
    p = cached_problem(tokens=sum(lengths), dim=dim, n_experts=E, seed=1, dtype="bfloat16", **settings)
    return SITUATIONS[name](p) if name in SITUATIONS else p


def _names(lengths: tuple[int, ...]) -> list[str]:
    return [*SETTINGS, *(SITUATIONS if sum(lengths) else ())]


def _dim(kind: str) -> int:
    return 256 if "elastic" in kind else 16


# ----------------------------------------------------------------------------------------------------- what a rank does
def _dispatcher(name: str, p: Problem, **options: Any) -> Any:
    from fakes import deep_ep

    return deep_ep.made(name, p.x.shape[1], p.config.n_routed_experts, p.ids.shape[1], **options)


def _tensors(p: Problem, lengths: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
    """This rank's parameters, and its tokens: x, token_mask, weights, indices and dy; with other strides."""
    rank, e = dist.get_rank(), p.config.n_routed_experts // len(lengths)
    own, mine = slice(sum(lengths[:rank]), sum(lengths[: rank + 1])), slice(rank * e, (rank + 1) * e)
    held = {name: torch.from_numpy(value[mine]).bfloat16().requires_grad_() for name, value in p.parameters.items()}
    x, dy = (torch.from_numpy(value[own]).bfloat16() for value in (p.x, p.dy))
    weights, ids = torch.from_numpy(p.weights[own]).float(), torch.from_numpy(p.ids[own])
    x, weights, ids = (value.T.contiguous().T for value in (x, weights, ids))
    return held, (x.requires_grad_(), torch.from_numpy(p.token_mask[own]), weights.requires_grad_(), ids, dy)


def _run(p: Problem, lengths: tuple[int, ...], dispatcher: Any, manner: str = "plain") -> dict[str, torch.Tensor]:
    held, (x, mask, weights, ids, dy) = _tensors(p, lengths)
    layer = partial(experts, held, config=p.config, backend="loop", dispatcher=dispatcher)
    if manner == "recomputed":
        y = torch.utils.checkpoint.checkpoint(layer, x, mask, weights, ids, use_reentrant=False)
    else:
        y = layer(x, mask, weights, ids)
    y.backward(dy)
    return _found(y, x, weights, held)


def _found(y: Any, x: Any, weights: Any, held: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **{n: value.grad for n, value in held.items()}}


def _computed(lengths: tuple[int, ...]) -> dict[Any, Any]:
    """This rank's part of every case."""
    from fakes import deep_ep, transformer_engine_ep

    deep_ep.ready()
    transformer_engine_ep.install()
    found: dict[Any, Any] = {}
    for kind, (name, options) in KINDS.items():
        for case in _names(lengths):
            p = _problem(lengths, case, _dim(kind))
            dispatcher = _dispatcher(name, p, **options)
            found[case, kind] = _run(p, lengths, dispatcher)
            if case == "plain":
                found["recomputed", kind] = _run(p, lengths, dispatcher, "recomputed")
                found["reads", kind] = dispatcher.reads_host
            dispatcher.close()
    found["open"] = sum(not buffer.destroyed for buffer in deep_ep.BUFFERS if hasattr(buffer, "destroy"))
    found["open"] += transformer_engine_ep.is_ep_bootstrapped()
    for kind in ("deepep async", "elastic", "hybridep"):
        found["interleaved", kind] = _interleaved(lengths, *KINDS[kind])
    if lengths == (3, 2):
        for name in MODULES:
            found["plain", name] = _of_module(name, lengths)
    return found


def _interleaved(lengths: tuple[int, ...], name: str, options: dict[str, Any]) -> list[bool]:
    """Two layers that differ in D, E and K, all four halves of dispatch first; backward in the order of the forward."""
    wide = 512 if name == "deepep_elastic" else 32
    problems = [
        _problem(lengths, "plain", wide // 2),
        cached_problem(tokens=sum(lengths), dim=wide, n_experts=2 * E, k=3, seed=5, dtype="bfloat16"),
    ]
    layers = [_dispatcher(name, p, **options) for p in problems]
    alone = [_run(p, lengths, layer) for p, layer in zip(problems, layers, strict=True)]
    inputs = [_tensors(p, lengths) for p in problems]
    away = []
    for p, layer, (_, (x, mask, weights, ids, _)) in zip(problems, layers, inputs, strict=True):
        away.append(layer.begin(x, weights, ids, mask, p.config.n_routed_experts))
    ends = [layer.end(trip) for layer, trip in zip(layers, away, strict=True)]
    outputs = []
    for p, layer, (sent, state), (held, _) in zip(problems, layers, ends, inputs, strict=True):
        from moebius.torch_frontend.experts import steps

        outputs.append(layer.combine(steps(held, sent, p.config, "loop", partial=True), state))
    found = []
    for y, (held, (x, _, weights, _, dy)) in zip(outputs, inputs, strict=True):
        y.backward(dy)
        found.append(_found(y, x, weights, held))
    for layer in layers:
        layer.close()
    return [
        torch.equal(value, one[key]) for one, other in zip(alone, found, strict=True) for key, value in other.items()
    ]


MODULES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "GroupedExperts": (GroupedExperts, (), {"dispatcher": "deepep", "dispatcher_num_sms": 8}),
    "DeepEP": (GroupedExpertsDeepEP, ("deepep", 16, False, True), {}),
    "TE": (GroupedExpertsTE, ("hybridep", 24), {}),
    "TE by TE": (GroupedExpertsTE, ("te",), {"dispatcher_max_tokens": 6}),
}


def _of_module(name: str, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    from moebius.torch_frontend.sharding import shard_experts

    mesh = init_device_mesh("cpu", (len(lengths),), mesh_dim_names=("ep",))
    kind, arguments, backend = MODULES[name]
    p = _problem(lengths, "plain", 16)
    module = kind(p.config, BackendConfig(experts="loop", **backend), *arguments)
    load_parameters(module, {key: torch.from_numpy(value) for key, value in p.parameters.items()})
    if name == "GroupedExperts":
        shard_experts(module, mesh)
    else:
        module.init_token_dispatcher(mesh)
    _, (x, mask, weights, ids, dy) = _tensors(p, lengths)
    y = module(x, mask, weights, ids)
    y.backward(dy)
    found = _found(y, x, weights, dict(module.named_parameters()))
    return {key: getattr(value, "to_local", lambda value=value: value)() for key, value in found.items()}


# ------------------------------------------------------------------------------------------------- what is due of them
@cache
def _outcomes(lengths: tuple[int, ...]) -> list[dict[Any, Any]]:
    return ranks.run(_computed, len(lengths), lengths)


def _whole(lengths: tuple[int, ...], name: str, kind: str) -> dict[str, torch.Tensor]:
    parts = [outcome[name, kind] for outcome in _outcomes(lengths)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@cache
def _expected(lengths: tuple[int, ...], name: str, dim: int) -> tuple[Arrays, dict[str, Bound]]:
    p = _problem(lengths, name, dim)
    exact = reference_over_ranks(p, lengths)
    return exact, bounds(lambda arithmetic: reference_over_ranks(p, lengths, arithmetic), exact, p.dtype)


def _assert_within(found: dict[str, torch.Tensor], exact: Arrays, limits: dict[str, Bound]) -> None:
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert within(value.double().numpy(), exact[name], limits[name]), name


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths, name", [(lengths, name) for lengths in LENGTHS for name in _names(lengths)], ids=str)
def test_experts_over_a_library_agree_with_reference(lengths: tuple[int, ...], name: str, kind: str) -> None:
    due = _expected(lengths, "masked" if name == "poison" else name, _dim(kind))
    _assert_within(_whole(lengths, name, kind), *due)


@over_ranks
@pytest.mark.parametrize("kind", KINDS)
def test_experts_over_a_library_recomputed_equal_plain(lengths: tuple[int, ...], kind: str) -> None:
    found, wanted = _whole(lengths, "recomputed", kind), _whole(lengths, "plain", kind)
    if kind == "te static":  # whose rows have another order in each call, and with it what adds them up
        _assert_within(found, *_expected(lengths, "plain", _dim(kind)))
        wanted = {name: wanted[name] for name in ("y", "dx", "dweights")}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@over_ranks
@pytest.mark.parametrize("kind", ["deepep async", "elastic", "hybridep"])
def test_two_layers_that_differ_under_way_at_once_are_each_as_alone(lengths: tuple[int, ...], kind: str) -> None:
    for outcome in _outcomes(lengths):
        assert outcome["interleaved", kind] == [True] * 12


@over_ranks
def test_close_destroys_every_buffer_on_every_rank(lengths: tuple[int, ...]) -> None:
    assert [outcome["open"] for outcome in _outcomes(lengths)] == [0] * len(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_dispatcher_with_max_tokens_declares_that_it_reads_nothing(kind: str) -> None:
    assert [outcome["reads", kind] for outcome in _outcomes((3, 2))] == ["static" not in kind] * 2


@pytest.mark.parametrize("module", MODULES)
def test_modules_over_a_library_agree_with_reference(module: str) -> None:
    _assert_within(_whole((3, 2), "plain", module), *_expected((3, 2), "plain", 16))
