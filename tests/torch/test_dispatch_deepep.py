"""The libraries' dispatchers by themselves: what they call and when, and what they refuse.

Against stand-ins over gloo; one spawn of two ranks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from trips import D, E, K, said, there_and_back, tokens

from moebius.core import BackendConfig, MoEConfig
from moebius.torch_frontend import MoE, load_parameters, shard_experts

DEEPEP_FORWARD = ["get_dispatch_layout", "dispatch", "combine"]


# ----------------------------------------------------------------------------------------------------- what a rank does
class _Noted(Function):
    """Says when it runs, and when its backward does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[Any]) -> Tensor:
        ctx.log = log
        log.append(("computed", {}))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        ctx.log.append(("its gradient computed", {}))
        return dy.clone(), None


def _names(calls: list[tuple[str, dict[str, Any]]]) -> list[str]:
    found = [name.split(".")[-1] + (" again" if told.get("cached") else "") for name, told in calls]
    calls.clear()
    return found


def _calls() -> dict[str, tuple[list[str], list[str]]]:
    """Names of the library's functions, in the forward and the backward pass."""
    from fakes.deep_ep import CALLS, made

    found = {}
    for name, options in [
        ("deepep", {}),
        ("deepep", {"max_tokens": 3}),
        ("deepep_elastic", {}),
        ("hybridep", {}),
    ]:
        dim = 256 if name == "deepep_elastic" else D
        dispatcher = made(name, dim, E, K, **options)
        CALLS.clear()
        y = there_and_back(dispatcher, tokens(dim=dim))
        if name == "deepep":
            found[f"{name} {options} rows"] = [told["worst"] for call, told in CALLS if call == "Buffer.dispatch"]
        forward = _names(CALLS)
        y.sum().backward()
        found[f"{name} {options}"] = forward, _names(CALLS)
        dispatcher.close()
    return found


def _overlap() -> list[str]:
    """What happens in which order where something is computed while tokens travel."""
    from fakes.deep_ep import CALLS, made

    from moebius.torch_frontend.dispatch import During

    dispatcher, shared = made("deepep", D, E, K, asynchronous=True), []
    own = tokens()
    during = During(dispatcher, lambda: shared.append(_Noted.apply(own[0], CALLS)))
    CALLS.clear()
    y = there_and_back(during, own) + shared[0]
    y.sum().backward()
    found = _names(CALLS)
    dispatcher.close()
    return found


def _layers() -> dict[str, Any]:
    """An MoE with shared experts, over ranks: the same with and without overlap, in which order."""
    from fakes.deep_ep import CALLS
    from torch.distributed.device_mesh import init_device_mesh

    config = MoEConfig(
        n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=6, n_shared_experts=1, dtype="bfloat16"
    )
    mesh, found, values = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), {}, None
    for overlaps in (False, True):
        torch.manual_seed(0)
        layer = MoE(config, BackendConfig(experts="loop", dispatcher="deepep", dispatcher_async_dispatch=overlaps))
        if values is not None:
            load_parameters(layer, values)
        values = {name: value.detach().clone() for name, value in layer.named_parameters()}
        layer.shared_experts.register_forward_hook(lambda *_: CALLS.append(("shared", {})))
        shard_experts(layer.experts, mesh)
        x, *_ = tokens(6)
        CALLS.clear()
        y = layer(x)
        order = _names(CALLS)
        y.sum().backward()
        grads = {name: value.grad for name, value in layer.named_parameters()}
        grads = {name: getattr(grad, "to_local", lambda grad=grad: grad)() for name, grad in grads.items()}
        found[overlaps] = order, {"y": y.detach(), "dx": x.grad, **grads}
        layer.experts.close()
    return found


def _refusals() -> dict[str, str]:
    """What is said of what cannot be; none of it is a collective, so that the next one works."""
    from fakes.deep_ep import made

    dispatcher, other, still = made("deepep", D, E, K), made("deepep", D, E, K), made("deepep", D, E, K, max_tokens=2)
    x, weights, ids, mask = tokens()
    sent, state = dispatcher.dispatch(x, weights, ids, mask, E)
    calls = {
        "float32": lambda: there_and_back(dispatcher, (x.float(), weights, ids, mask)),
        "experts": lambda: dispatcher.dispatch(x, weights, ids, mask, 7),
        "many experts": lambda: dispatcher.dispatch(x, weights, ids, mask, 1024),
        "wide": lambda: there_and_back(dispatcher, tokens(dim=2 * D)),
        "odd": lambda: there_and_back(dispatcher, tokens(dim=24)),
        "k": lambda: there_and_back(dispatcher, tokens(k=33)),
        "long": lambda: there_and_back(still, (x, weights, ids, mask)),
        "other": lambda: other.combine(sent.x_SD, state),
        "rows": lambda: dispatcher.combine(sent.x_SD[1:], state),
        "combine_dtype": lambda: made("deepep", D, E, K, "float32"),
        "hidden": lambda: made("deepep", 8192, E, K),
        "num_sms": lambda: made("deepep", D, E, K, num_sms=21),
        "asynchronous": lambda: made("hybridep", D, E, K, asynchronous=True),
        "elastic": lambda: made("deepep_elastic", 640, E, K),
        "hybrid": lambda: made("hybridep", D, 6, K),
    }
    found = {name: said(call) for name, call in calls.items()}
    y = dispatcher.combine(sent.x_SD.float(), state)
    y.sum().backward()
    found["goes on"] = str(bool(torch.isfinite(x.grad).all()))
    for made_ in (dispatcher, other, still):
        made_.close()
    return found


def _some_need_no_gradient() -> bool:
    """Rank 0 needs none, and takes part."""
    from fakes.deep_ep import made

    found = []
    for name in ("deepep", "hybridep"):
        dispatcher = made(name, D, E, K)
        own = tokens(grad=dist.get_rank() == 1)
        there_and_back(dispatcher, own).sum().backward()
        found.append((own[0].grad is not None) == (dist.get_rank() == 1))
        with torch.no_grad():
            found.append(not there_and_back(dispatcher, tokens()).requires_grad)
        dispatcher.close()
    return all(found)


def _bites() -> dict[str, bool]:
    """Whether the stand-in refuses what the library would: each call is wrong in one way; it sends nothing."""
    from fakes.deep_ep import Buffer, Config, ElasticBuffer, HybridEPBuffer

    group, config = dist.group.WORLD, Config(20, 24, 256, 6, 128)
    buffer = Buffer(group, config.get_nvl_buffer_size_hint(2 * D, 2), explicitly_destroy=True)
    x, weights, ids, _ = (value.detach() for value in tokens())
    ranks_, _, experts_, goes, _ = buffer.get_dispatch_layout(ids, E)
    layout = {"num_tokens_per_rank": ranks_, "num_tokens_per_expert": experts_, "is_token_in_rank": goes}
    top = {"topk_idx": ids, "topk_weights": weights, "config": config}
    *_, handle, _ = buffer.dispatch(x, **layout, **top)
    rows, other = len(handle[3]), Config(24, 24, 256, 6, 128)
    y, much = torch.zeros(rows, D).bfloat16(), torch.zeros(rows, 64).bfloat16()
    elastic = ElasticBuffer(group, num_max_tokens_per_rank=4, hidden=256, num_topk=K, explicitly_destroy=True)
    hybrid = HybridEPBuffer(group, D, 64, E // 2)
    gone = Buffer(group, 10**6, explicitly_destroy=True)
    gone.destroy()
    calls = {
        "int32 ids": lambda: buffer.get_dispatch_layout(ids.int(), E),
        "bfloat16 weights": lambda: buffer.dispatch(x, **layout, **{**top, "topk_weights": weights.bfloat16()}),
        "float32 x": lambda: buffer.dispatch(x.float(), **layout, **top),
        "strides": lambda: buffer.dispatch(x.T.contiguous().T, **layout, **top),
        "cached with ids": lambda: buffer.dispatch(x, handle, **top),
        "other SMs": lambda: buffer.dispatch(x, handle, config=other),
        "other SMs home": lambda: buffer.combine(y, handle, config=other),
        "float32 home": lambda: buffer.combine(y.float(), handle, config=config),
        "too wide": lambda: buffer.combine(much, handle, config=config),
        "no config": lambda: buffer.combine(y, handle),
        "odd SMs": lambda: Config(21, 24, 256, 6, 128).get_nvl_buffer_size_hint(64, 2),
        "RDMA hint": lambda: config.get_rdma_buffer_size_hint(64, 2),
        "global SMs": lambda: Buffer.set_num_sms(20),
        "destroyed": lambda: gone.combine(y, handle, config=config),
        "elastic width": lambda: elastic.dispatch(x, ids, weights, num_experts=E, num_sms=20),
        "hybrid -1": lambda: hybrid.dispatch_with_permute(hidden=x, topk_idx=ids * 0 - 1, topk_weights=weights),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = False
        except AssertionError:
            found[name] = True
    for one in (buffer, elastic):
        one.destroy()
    return found


def _facts() -> dict[str, Any]:
    from fakes import deep_ep

    deep_ep.ready()
    facts = (_calls, _overlap, _layers, _refusals, _some_need_no_gradient, _bites)
    return {fact.__name__: fact() for fact in facts}


@cache
def _found() -> list[dict[str, Any]]:
    return ranks.run(_facts, 2)


def _of(name: str) -> list[Any]:
    """What each rank says of it."""
    return [facts[name] for facts in _found()]


# --------------------------------------------------------------------------------------------------------------- tests
def test_forward_reads_counts_once_and_backward_reuses_the_handle() -> None:
    for calls in _of("_calls"):
        assert calls["deepep {}"] == (DEEPEP_FORWARD, ["dispatch again", "combine"])
        assert calls["deepep {} rows"] == [0]
        assert calls["deepep_elastic {}"] == (["dispatch", "combine"], ["dispatch again", "combine"])
        hybrid = ["dispatch_with_permute", "combine_with_unpermute"]
        assert calls["hybridep {}"] == (hybrid, [f"{hybrid[0]} again", hybrid[1]])


def test_forward_with_max_tokens_asks_for_as_many_rows_as_there_could_be() -> None:
    for calls in _of("_calls"):
        assert calls["deepep {'max_tokens': 3}"] == (DEEPEP_FORWARD, ["dispatch again", "combine"])
        assert calls["deepep {'max_tokens': 3} rows"] == [6]


def test_what_is_computed_during_dispatch_overlaps_both_ways() -> None:
    for order in _of("_overlap"):
        assert order == [
            *("get_dispatch_layout", "dispatch", "computed", "waited", "combine", "waited"),
            *("dispatch again", "waited", "combine", "its gradient computed", "waited"),
        ]


def test_moe_with_async_dispatch_computes_shared_experts_while_tokens_travel() -> None:
    for found in _of("_layers"):
        assert found[False][0] == [*DEEPEP_FORWARD, "shared"]
        assert found[True][0] == ["get_dispatch_layout", "dispatch", "shared", "waited", "combine", "waited"]
        for name, value in found[False][1].items():
            torch.testing.assert_close(found[True][1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "name, words",
    [
        ("float32", "DTypeError: asked: dispatch backend 'deepep' of tokens [3, 32] in bfloat16\nfound: torch.float32"),
        ("experts", "ConfigError: asked: 7 experts over 2 ranks"),
        ("many experts", "it takes up to 128 experts on a rank, not 512; 'hybridep', 'alltoall' can"),
        ("wide", "ShapeError: asked: dispatch backend 'deepep' of tokens [3, 64]\nfound: a buffer for D=32"),
        ("odd", "Unsupported: asked: dispatch backend 'deepep' for bfloat16 on cuda, D=24"),
        ("k", "it takes K up to 32, not 33; 'hybridep', 'alltoall' can"),
        ("long", "found: max_tokens=2\ndo: give more, alike on every rank, or None"),
        ("other", "found: the state of another\ndo: pass what the same dispatch returned"),
        ("rows", "found: the state of another\ndo: pass what the same dispatch returned"),
        ("combine_dtype", "asked: combine_dtype='float32'\nfound: 'deepep' adds bfloat16 alone"),
        ("hidden", "multiples of 16 up to 8176, not 8192; 'deepep_elastic', 'hybridep', 'alltoall' can"),
        ("num_sms", "dispatcher_num_sms=21\nfound: no even number of 2 or more\ndo: use 20 or 24"),
        ("asynchronous", "found: 'hybridep' has no asynchronous calls\ndo: leave it out, or name 'deepep'"),
        ("elastic", "multiples of 256, not 640; 'deepep', 'uccl_ep', 'hybridep', 'alltoall' can"),
        ("hybrid", "it takes numbers of experts that are multiples of 4, not 6"),
    ],
)
def test_what_a_library_would_trap_on_is_refused_in_words_before(name: str, words: str) -> None:
    for found in _of("_refusals"):
        assert words in found[name], found[name]
        assert found["goes on"] == "True"


def test_rank_whose_tensors_need_no_gradient_takes_part_in_backward() -> None:
    assert _of("_some_need_no_gradient") == [True, True]


def test_stand_ins_refuse_what_the_libraries_do() -> None:
    for found in _of("_bites"):
        assert all(found.values()), found


@pytest.mark.parametrize("reentrant", [False, True])
def test_moe_with_checkpointed_experts_and_shared_ones_meanwhile_has_the_same_gradients(reentrant: bool) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    from moebius.core import BackendConfig, MoEConfig
    from moebius.torch_frontend import MoE

    sizes = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 4, "inter_dim": 4}
    config = MoEConfig(**sizes, n_shared_experts=1, dtype="float32")
    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        moe = MoE(config, BackendConfig(experts="loop", dispatcher_async_dispatch=True))
        if wrapped:
            kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
            moe.experts = checkpoint_wrapper(moe.experts, kind)
        x = torch.linspace(-1, 1, 40).view(5, 8).requires_grad_()
        moe(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in moe.parameters())])
    for plain, checkpointed in zip(*found, strict=True):
        # x's gradient has three parts, added in another order.
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
