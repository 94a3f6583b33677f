"""The dispatcher "te" by itself: what it calls and when, what it refuses, and what is made once for a process.

Against a stand-in over gloo; one spawn of two ranks. Its outputs and gradients: test_dispatch_buffer.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import fakes
import pytest
import ranks
import torch
import torch.distributed as dist
from sides import Problem as Experts
from sides import cached_problem, reference_over_ranks
from torch import Tensor
from trips import D, E, K, said, there_and_back, tokens

from moebius.core import BackendConfig
from moebius.core.errors import BackendUnavailable, Unsupported
from moebius.core.registry import Problem
from moebius.core.tolerance import bounds, within
from moebius.torch_frontend import dispatch_te
from moebius.torch_frontend.dispatch import DISPATCHERS, Options
from moebius.torch_frontend.dispatch_choice import agreed, candidates
from moebius.torch_frontend.dispatch_limits import against, require

BOTH_WAYS = (["ep_dispatch", "ep_combine"], ["combine_bwd", "dispatch_bwd"])


def problem(**changes: Any) -> Problem:
    """Of DeepSeek-V3's layers on 8 GPUs; `changes` of it."""
    usual = {"device": "cuda", "dtype": "bfloat16", "dim": 7168, "inter_dim": 2048, "n_experts": 32, "ranks": 8}
    return Problem(**{**usual, **changes})


def options(**changes: Any) -> Options:
    """Of those layers; `changes` of them."""
    return Options(**{"dim": 7168, "n_experts": 256, "k": 8, "max_tokens": 64, **changes})


# ----------------------------------------------------------------------------------------------------- what a rank does
def _made(max_tokens: int | None = 3, dim: int = D, **settings: Any) -> Any:
    from fakes.deep_ep import made

    return made("te", dim, settings.pop("n_experts", E), settings.pop("k", K), max_tokens=max_tokens, **settings)


def _calls() -> list[str]:
    from fakes.transformer_engine_ep import CALLS

    found = list(CALLS)
    CALLS.clear()
    return found


def _choice() -> dict[str, str]:
    """What both ranks are told where one lacks the NCCL, and where both have it."""
    from fakes import transformer_engine_ep

    from moebius.torch_frontend import liveness

    here, found = problem(device="cpu", dim=D, n_experts=E // 2, ranks=2), {}
    asked = Options(D, E, K, max_tokens=3)
    for stage in ("one lacks it", "both have it"):
        transformer_engine_ep.install(nccl=stage == "both have it" or dist.get_rank() == 1)
        for known in (DISPATCHERS._loaded, DISPATCHERS._broken):
            known.clear()
        found[stage] = said(lambda: agreed("te", here, asked, dist.group.WORLD))
        liveness.close()  # what the ranks agreed on
    return found


def _once() -> dict[str, Any]:
    """Two layers share what is made once; the last that is closed unmakes it, and then others can have it."""
    first, found = _made(max_tokens=5), {}
    second = _made(max_tokens=2, share=True)
    found["made for two"] = _calls()
    y = there_and_back(second, tokens(2))
    forward = _calls()
    y.sum().backward()
    found["ways"] = forward, _calls()
    for name, settings in {
        "D": {"dim": 2 * D},
        "E": {"n_experts": 2 * E},
        "K": {"k": 3},
        "more": {"max_tokens": 9},
    }.items():
        found[name] = said(lambda settings=settings: _made(**settings))
    first.close()
    found["one closed"] = _calls()
    second.close()
    found["both closed"] = _calls()
    other = _made(dim=2 * D, k=3)
    there_and_back(other, tokens(dim=2 * D, k=3)).sum().backward()
    other.close()
    found["others after"] = _calls()
    return found


def _by_others() -> str:
    from fakes import transformer_engine_ep

    transformer_engine_ep.ep_bootstrap(dist.group.WORLD, E, 4, D, K, 16)
    words = said(_made)
    transformer_engine_ep.ep_finalize()
    return words


def _refusals() -> dict[str, str]:
    """What is said of what cannot be; none of it is a collective, so that the next one works."""
    dispatcher, other = _made(), _made()
    x, weights, ids, mask = tokens()
    sent, state = dispatcher.dispatch(x, weights, ids, mask, E)
    calls = {
        "float32": lambda: there_and_back(dispatcher, (x.float(), weights, ids, mask)),
        "wide": lambda: there_and_back(dispatcher, tokens(dim=2 * D)),
        "narrow": lambda: there_and_back(dispatcher, tokens(dim=D // 2)),
        "k": lambda: there_and_back(dispatcher, tokens(k=1)),
        "experts": lambda: dispatcher.dispatch(x, weights, ids, mask, 2 * E),
        "long": lambda: there_and_back(dispatcher, tokens(4)),
        "other": lambda: other.combine(sent.x_SD, state),
        "rows": lambda: dispatcher.combine(sent.x_SD[1:], state),
    }
    found = {name: said(call) for name, call in calls.items()}
    y = dispatcher.combine(sent.x_SD.float(), state)
    other.close()
    dispatcher.close()
    found["closed"] = said(lambda: y.sum().backward())
    found["closed dispatch"] = said(lambda: there_and_back(dispatcher, tokens()))
    return found


def _interleaved() -> list[bool]:
    """Two layers, both out before one comes home; backward in the order of the forward."""
    layers = [_made(), _made()]
    alone = [_gradients([layer], [tokens()], i) for i, layer in enumerate(layers)]
    both = [tokens(), tokens()]
    found = _gradients(layers, both, 0)
    for layer in layers:
        layer.close()
    return [torch.equal(a, b) for a, b in zip([*alone[0], *alone[1]], found, strict=True)]


def _gradients(layers: list[Any], given: list[Any], first: int) -> list[Tensor]:
    away = [layer.dispatch(*one, E) for layer, one in zip(layers, given, strict=True)]
    outputs = []
    for i, (layer, (sent, state)) in enumerate(zip(layers, away, strict=True), start=first):
        outputs.append(layer.combine((i + 1) * sent.x_SD.float() * sent.weights_SK, state))
    for y in outputs:
        y.square().sum().backward()
    return [value for y, one in zip(outputs, given, strict=True) for value in (y.detach(), one[0].grad, one[1].grad)]


def _some_need_no_gradient() -> bool:
    """Rank 0 needs none, and takes part."""
    dispatcher, own = _made(), tokens(grad=dist.get_rank() == 1)
    there_and_back(dispatcher, own).sum().backward()
    found = [(own[0].grad is not None) == (dist.get_rank() == 1)]
    with torch.no_grad():
        found.append(not there_and_back(dispatcher, tokens()).requires_grad)
    dispatcher.close()
    return all(found)


def _layer() -> dict[str, Any]:
    """An MoE whose experts lie over the ranks, forward and backward: what its experts were handed and gave back."""
    from torch.distributed.device_mesh import init_device_mesh

    from moebius.torch_frontend import MoE, load_parameters, shard_experts

    p = _drawn()
    layer = MoE(p.config, BackendConfig(experts="loop", dispatcher="te", dispatcher_max_tokens=4))
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(v.shape, generator=generator) / 4 for name, v in layer.named_parameters()}
    drawn |= {f"experts.{name}": torch.from_numpy(value) for name, value in p.parameters.items()}
    load_parameters(layer, drawn)
    shard_experts(layer.experts, init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)))
    kept: dict[str, Any] = {}

    def before(_: Any, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, mask, weights, ids = own
        kept.update(x=x.clone(), weights=weights.clone(), mask=mask, ids=ids)  # whose gradients are the experts' alone
        kept["x"].retain_grad()
        kept["weights"].retain_grad()
        return kept["x"], mask, kept["weights"], ids

    layer.experts.register_forward_pre_hook(before)
    layer.experts.register_forward_hook(lambda _, own, y: (kept.update(y=y), y.retain_grad())[0])
    layer.shared_experts.register_forward_hook(lambda _, own, shared: kept.update(shared=shared))
    x = torch.randn(4 - rank, D, generator=torch.Generator().manual_seed(rank + 1)).bfloat16().requires_grad_()
    padding = torch.arange(4 - rank) == 1
    _calls()
    y = layer(x, padding)
    calls = _calls()
    y.square().sum().backward()
    found = {
        "calls": (calls, _calls()),
        "whole": torch.equal(y.detach(), kept["y"].detach() + kept["shared"].detach()),
        "router": bool(layer.gate.weight.grad.isfinite().all() and layer.gate.weight.grad.abs().max() > 0),
        "given": {name: kept[name].detach() for name in ("x", "mask", "weights", "ids")} | {"dy": kept["y"].grad},
        "back": {"y": kept["y"].detach(), "dx": kept["x"].grad, "dweights": kept["weights"].grad}
        | {name: value.grad.to_local() for name, value in layer.experts.named_parameters()},
    }
    layer.experts.close()
    return found


def _drawn() -> Experts:
    """Experts of a layer with shared ones; their tokens are those that the gate sends."""
    own = {"n_shared_experts": 1, "router_weights_fp32": True, "expert_bias": True, "expert_activation": "geglu"}
    return cached_problem(tokens=7, dim=D, n_experts=E, k=K, dtype="bfloat16", seed=3, **own)


def _bites() -> dict[str, bool]:
    """Whether the stand-in refuses what the library would: each call is wrong in one way; it sends nothing."""
    from fakes.transformer_engine_ep import EpBuffer, ep_bootstrap, ep_combine, ep_dispatch, ep_finalize

    world, cpu = dist.group.WORLD, torch.device("cpu")
    usual = {"num_experts": E, "max_tokens_per_rank": 4, "hidden_dim": D, "num_topk": K, "recv_capacity_per_rank": 16}
    sizes = (K, 4, D, E // 2, 16)
    x, weights, ids = torch.zeros(3, D).bfloat16(), torch.zeros(3, K), torch.tensor([[0, 1], [2, -1], [-1, -1]])

    def boot(**changes: Any) -> None:
        ep_bootstrap(world, **{**usual, **changes})

    calls = {
        "a handle before": lambda: EpBuffer(*sizes, device=cpu),
        "three on a rank": lambda: boot(num_experts=6),
        "two in all": lambda: boot(num_experts=2),
        "width": lambda: boot(hidden_dim=12),
        "many routes": lambda: boot(num_topk=33, num_experts=64),
        "routes": lambda: boot(num_topk=9),
        "capacity": lambda: boot(recv_capacity_per_rank=3),
        "odd tokens": lambda: boot(max_tokens_per_rank=3),
    }
    found = {name: _refused(call) for name, call in calls.items()}
    boot()
    handle = EpBuffer(*sizes, device=cpu)
    with torch.no_grad():
        calls = {
            "twice": boot,
            "another K": lambda: EpBuffer(K + 1, *sizes[1:], device=cpu),
            "another capacity": lambda: EpBuffer(*sizes[:-1], 8, device=cpu),
            "float32": lambda: ep_dispatch(handle, x.float(), ids, weights),
            "bfloat16 weights": lambda: ep_dispatch(handle, x, ids, weights.bfloat16()),
            "int16 ids": lambda: ep_dispatch(handle, x, ids.short(), weights),
            "strides": lambda: ep_dispatch(handle, x.T.contiguous().T, ids, weights),
            "too many": lambda: ep_dispatch(handle, *(value.repeat(2, 1) for value in (x, ids, weights))),
            "none": lambda: ep_dispatch(handle, x[:0], ids[:0], weights[:0]),
            "an expert twice": lambda: ep_dispatch(handle, x, ids * 0, weights),
            "no such expert": lambda: ep_dispatch(handle, x, ids + E, weights),
            "home before": lambda: ep_combine(handle, torch.zeros(16, D).bfloat16(), num_local_tokens=3),
        }
        found |= {name: _refused(call) for name, call in calls.items()}
        rows, *_ = ep_dispatch(handle, x, ids, weights)
        calls = {
            "a handle again": lambda: ep_dispatch(handle, x, ids, weights),
            "float32 home": lambda: ep_combine(handle, rows.float(), num_local_tokens=3),
            "fewer rows": lambda: ep_combine(handle, rows[1:], num_local_tokens=3),
            "other tokens": lambda: ep_combine(handle, rows),
        }
        found |= {name: _refused(call) for name, call in calls.items()}
    found["its own autograd"] = _refused(lambda: ep_dispatch(EpBuffer(*sizes, device=cpu), x, ids, weights))
    ep_finalize()
    found["home after"] = _refused(lambda: ep_combine(handle, rows, num_local_tokens=3))
    return found


def _refused(call: Any) -> bool:
    try:
        call()
    except (AssertionError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return True
    return False


def _facts() -> dict[str, Any]:
    from fakes import transformer_engine_ep

    transformer_engine_ep.ready()
    facts = (_choice, _once, _by_others, _refusals, _interleaved, _some_need_no_gradient, _layer, _bites)
    return {fact.__name__: fact() for fact in facts}


@cache
def _found() -> list[dict[str, Any]]:
    return ranks.run(_facts, 2)


def _of(name: str) -> list[Any]:
    """What each rank says of it."""
    return [facts[name] for facts in _found()]


# --------------------------------------------------------------------------------------------------------------- tests
def test_library_that_one_rank_lacks_is_refused_on_all_in_the_same_words() -> None:
    first, second = _of("_choice")
    assert first == second and first["both have it"] == "nothing was raised"
    words = "NCCL EP is not there, or NCCL is too old; NCCL none, 2.30.4 is needed"
    assert "BackendUnavailable" in first["one lacks it"] and words in first["one lacks it"], first


def test_layers_of_one_size_share_what_is_made_once_until_the_last_is_closed() -> None:
    for found in _of("_once"):
        assert found["made for two"] == ["ep_bootstrap"]
        assert found["ways"] == BOTH_WAYS
        assert (found["one closed"], found["both closed"]) == ([], ["ep_finalize"])
        assert found["others after"] == ["ep_bootstrap", *BOTH_WAYS[0], *BOTH_WAYS[1], "ep_finalize"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("D", "'te' for D=64, E=8, K=2, 4 tokens, 20 SMs, 2 ranks"),
        ("E", "'te' for D=32, E=16, K=2, 4 tokens"),
        ("K", "'te' for D=32, E=8, K=3, 4 tokens"),
        ("more", "'te' for D=32, E=8, K=2, 12 tokens"),
    ],
)
def test_layer_of_another_size_is_refused_with_what_it_was_made_for(name: str, words: str) -> None:
    for found in _of("_once"):
        assert f"Unsupported: asked: dispatch backend {words}" in found[name]
        made = "it was made for D=32, E=8, K=2, 8 tokens, 20 SMs, 2 ranks, once for this process"
        assert made in found[name] and "build the largest dispatcher_max_tokens first" in found[name]


def test_library_that_others_made_in_this_process_is_refused() -> None:
    for words in _of("_by_others"):
        assert "it was made by others than moebius, once for this process" in words


@pytest.mark.parametrize(
    "name, words",
    [
        ("float32", "DTypeError: asked: dispatch backend 'te' of tokens [3, 32] in bfloat16\nfound: torch.float32"),
        ("wide", "ShapeError: asked: dispatch backend 'te' of tokens [3, 64]\nfound: a buffer for D=32"),
        ("narrow", "asked: dispatch backend 'te' of D=16, E=8, K=2\nfound: made for D=32, E=8, K=2"),
        ("k", "asked: dispatch backend 'te' of D=32, E=8, K=1\nfound: made for D=32, E=8, K=2"),
        ("experts", "asked: dispatch backend 'te' of D=32, E=16, K=2\nfound: made for D=32, E=8, K=2"),
        ("long", "found: max_tokens=3\ndo: give more, alike on every rank"),
        ("other", "found: the state of another\ndo: pass what the same dispatch returned"),
        ("rows", "found: the state of another\ndo: pass what the same dispatch returned"),
        ("closed", "found: its buffer was destroyed\ndo: close dispatchers after the last backward pass"),
        ("closed dispatch", "found: it was closed\ndo: build the dispatcher again"),
    ],
)
def test_what_the_library_would_trap_on_is_refused_in_words_before(name: str, words: str) -> None:
    for found in _of("_refusals"):
        assert words in found[name], found[name]


def test_two_layers_under_way_at_once_are_each_as_alone() -> None:
    assert _of("_interleaved") == [[True] * 6] * 2


def test_rank_whose_tensors_need_no_gradient_takes_part_in_backward() -> None:
    assert _of("_some_need_no_gradient") == [True, True]


def test_moe_over_ranks_by_te_agrees_with_reference_and_trains_its_router() -> None:
    ranks_ = _of("_layer")
    out, home = BOTH_WAYS
    for found in ranks_:
        assert found["calls"] == (["ep_bootstrap", *out], home) and found["whole"] and found["router"]
    given = {n: torch.cat([found["given"][n] for found in ranks_]) for n in ranks_[0]["given"]}
    given = {n: (value.double() if value.is_floating_point() else value).numpy() for n, value in given.items()}
    p = _drawn().but(token_mask=given.pop("mask"), **given)
    assert not p.token_mask.all()
    exact = reference_over_ranks(p, (4, 3))
    limits = bounds(lambda arithmetic: reference_over_ranks(p, (4, 3), arithmetic), exact, "bfloat16")
    assert exact.keys() == ranks_[0]["back"].keys()
    for name, wanted in exact.items():
        value = torch.cat([found["back"][name] for found in ranks_]).double().numpy()
        assert within(value, wanted, limits[name]), name


def test_stand_in_refuses_what_the_library_does() -> None:
    for found in _of("_bites"):
        assert all(found.values()), found


# --------------------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize(
    "changes, k, words",
    [
        ({"dim": 7172}, 8, "it takes hidden sizes that are multiples of 8, not 7172"),
        ({"n_experts": 24}, 8, "it takes a power of two of experts on a rank, not 24; 'deepep', 'uccl_ep', 'deepep_el"),
        ({"n_experts": 1, "ranks": 2}, 1, "it takes numbers of experts that are multiples of 4, not 2"),
        ({}, 33, "it takes K up to 32, not 33; 'hybridep', 'alltoall' can"),
        ({"dtype": "float32"}, 8, "it sends bfloat16 alone; 'alltoall' can"),
        ({"device": "cpu"}, 8, "it needs CUDA tensors"),
        ({"capability": (8, 0)}, 8, "it needs compute capability 9.0"),
    ],
)
def test_against_names_the_limit(changes: dict[str, Any], k: int, words: str) -> None:
    found = against("te", problem(**changes), k)
    assert found is not None and words in found, found


def test_against_of_another_library_does_not_send_to_one_that_is_made_once() -> None:
    found = against("deepep", problem(ranks=3), 8)
    assert found is not None and "'te'" not in found


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_tokens": None}, "dispatcher_max_tokens=None\nfound: 'te' is made once, for a number of tokens"),
        ({"share": False}, "dispatcher_share_token_dispatcher=False\nfound: 'te' has one buffer for a process"),
        ({"asynchronous": True}, "found: 'te' has no asynchronous calls"),
        ({"n_experts": 4, "k": 5}, "it takes K up to the number of experts, 4"),
    ],
)
def test_require_of_what_does_not_fit_a_library_made_once_is_refused(changes: dict[str, Any], words: str) -> None:
    require("te", problem(), options())
    require("te", problem(ranks=1), options(max_tokens=None))
    with pytest.raises(Unsupported) as caught:
        require("te", problem(), options(**changes))
    assert words in str(caught.value)


def test_te_is_chosen_only_where_it_is_named_and_reads_nothing_on_the_host() -> None:
    assert "te" not in [choice.name for choice in candidates(problem(), 8, options())]
    assert DISPATCHERS["te"].only_when_named and not DISPATCHERS["te"].reads_host


# ------------------------------------------------------------------------------------------------------- what was found
def _package(monkeypatch: Any, **content: Any) -> None:
    parts = {name: {} for name in ("transformer_engine.pytorch", "transformer_engine.pytorch.ep")}
    fakes.install(monkeypatch, {"transformer_engine": {"__version__": "2.20.2", **content}, **parts})


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "transformer_engine 2.20.2: no NCCL EP"),
        ({"is_nccl_ep_available": lambda: False}, "NCCL EP is not there, or NCCL is too old; NCCL"),
        ({"is_nccl_ep_available": lambda: True}, "its transformer_engine_ep has no dispatch_bwd and no combine_bwd"),
    ],
)
def test_loaded_of_a_package_that_lacks_something_says_what(monkeypatch: Any, content: Any, words: str) -> None:
    _package(monkeypatch, **content)
    with pytest.raises(BackendUnavailable) as caught:
        dispatch_te.loaded("te")
    assert words in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ once_each
def test_once_each_adds_the_weights_of_an_expert_named_twice_and_drops_those_that_go_nowhere() -> None:
    weights = torch.tensor([[1.0, 2.0, 4.0], [torch.nan, torch.inf, 3.0], [5.0, 6.0, 7.0]], requires_grad=True)
    ids = torch.tensor([[2, 0, 2], [-1, -1, 1], [3, 3, 3]])
    found, once = dispatch_te.once_each(weights, ids)
    assert once.tolist() == [[2, 0, -1], [-1, -1, 1], [3, -1, -1]]
    assert found.tolist() == [[5, 2, 0], [0, 0, 3], [18, 0, 0]]
    found.backward(torch.tensor([[1.0, 10.0, torch.nan], [torch.nan, torch.nan, 7.0], [9.0, torch.nan, torch.nan]]))
    assert weights.grad is not None and weights.grad.tolist() == [[1, 10, 1], [0, 0, 7], [9, 9, 9]]
