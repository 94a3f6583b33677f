"""Ranks that were set up unlike one another, or that never come: what each of them is told."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import faults
import pytest
import ranks
import torch
import torch.distributed as dist

from moebius.core import ConfigError, RankLost
from moebius.core.config import BackendConfig, MoEConfig
from moebius.torch_frontend import dispatch_choice, liveness, preflight
from moebius.torch_frontend.grouped_experts import GroupedExperts, GroupedExpertsDeepEP

SIZES: dict[str, Any] = {"dim": 4, "moe_inter_dim": 8, "n_routed_experts": 4, "n_activated_experts": 2}


# ----------------------------------------------------------------------------------------------------- what a rank does
def _layer(
    mesh: Any,
    dispatcher: str = "alltoall",
    param_dtype: Any = None,
    experts: str = "loop",
    combine_dtype: Any = None,
    compute: Any = None,
    dispatcher_max_tokens: int | None = None,
    **sizes: int,
) -> Any:
    config = MoEConfig(inter_dim=8, n_shared_experts=0, dtype="float32", **(SIZES | sizes))
    own = {"combine_dtype": combine_dtype, "dispatcher_max_tokens": dispatcher_max_tokens}
    backend = BackendConfig(experts=experts, **own)
    layer = GroupedExpertsDeepEP(config, backend, dispatcher, dtype=compute, param_dtype=param_dtype)
    layer.init_token_dispatcher(mesh)
    return layer


def _called(layer: Any) -> Any:
    k, width, n = layer.config.n_activated_experts, layer.config.dim, layer.config.n_routed_experts
    ids = torch.arange(3 * k).view(3, k) % n
    return layer(torch.ones(3, width), torch.ones(3, dtype=torch.bool), torch.ones(3, k), ids)


# Name -> what the layers of rank 0 are, and of rank 1: settings that are not the usual ones.
UNLIKE: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "D": ([{}], [{"dim": 8}]),
    "E": ([{}], [{"n_routed_experts": 8}]),
    "K": ([{}, {}], [{}, {"n_activated_experts": 1}]),
    "I": ([{"moe_inter_dim": 16}], [{}]),
    "dtype": ([{}], [{"param_dtype": "bfloat16"}]),
    "compute": ([{}], [{"compute": "bfloat16"}]),
    "experts": ([{}], [{"experts": "grouped_mm"}]),
    "dispatcher": ([{}], [{"dispatcher": "allgather"}]),
    "combine_dtype": ([{"combine_dtype": "float32"}], [{}]),
    "max_tokens": ([{"dispatcher": "allgather", "dispatcher_max_tokens": 8}], [{"dispatcher": "allgather"}]),
    "order": ([{}, {"dim": 8}], [{"dim": 8}, {}]),
    "missing": ([{}, {}], [{}]),
    "version": ([{}], [{}]),
    "gradients": ([{"dispatcher": "allgather", "dispatcher_max_tokens": 8}],) * 2,
    "named": ([{}], [{"dim": 8}]),
}
WORDS = {
    "D": ["layer 0: D is 4 on rank 0, 8 on rank 1"],
    "E": ["layer 0: E is 4 on rank 0, 8 on rank 1"],
    "K": ["layer 1: K is 2 on rank 0, 1 on rank 1"],
    "I": ["layer 0: I is 16 on rank 0, 8 on rank 1"],
    "dtype": ["layer 0: dtype is float32 on rank 0, bfloat16 on rank 1"],
    "compute": ["layer 0: dtype is float32 on rank 0, float32, computed in bfloat16 on rank 1"],
    "experts": ["layer 0: experts is loop on rank 0, grouped_mm on rank 1"],
    "dispatcher": ["layer 0: dispatcher is alltoall on rank 0, allgather on rank 1"],
    "combine_dtype": ["layer 0: combine_dtype is float32 on rank 0, null on rank 1"],
    "max_tokens": ["layer 0: max_tokens is 8 on rank 0, null on rank 1"],
    "order": ["layer 0: D is 4 on rank 0, 8 on rank 1", "layer 1: D is 8 on rank 0, 4 on rank 1"],
    "missing": ["layers is 2 on rank 0, 1 on rank 1"],
    "version": [f"torch is {torch.__version__} on rank 0, 9.9.9 on rank 1"],
    "gradients": ["found: gradients is enabled on rank 0, disabled on rank 1\n"],
    "named": ["layer 0 (blocks.0): D is 4 on rank 0, 8 on rank 1"],
    "added": ["found: layer 1: D is 4 on rank 0, 8 on rank 1\n"],
    "closed": ["found: layer 0: D is 4 on rank 0, 8 on rank 1\n"],
}


def _mesh() -> Any:
    """Over a group of its own, so that each case begins anew."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(dist.new_group(list(range(dist.get_world_size()))), "cpu")


def _unlike() -> dict[str, Any]:
    os.environ.update(MOEBIUS_PREFLIGHT="30")
    rank, found, versions = dist.get_rank(), {}, preflight._versions
    found["one more choice"] = _one_more_choice(rank)
    dispatch_choice.exchange = lambda what, value, *_: [value]  # or that would find most of it
    for name, layers in UNLIKE.items():
        mesh = _mesh()
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList(_layer(mesh, **settings) for settings in layers[rank])
        if name == "named":
            preflight.name_layers(model)
        if name == "version" and rank == 1:
            preflight._versions = lambda: {**versions(), "torch": "9.9.9"}
        found[name] = []
        for _ in range(2):  # whoever goes on is told again
            try:
                with torch.set_grad_enabled(name != "gradients" or rank == 0):
                    _called(model.blocks[0])
            except Exception as error:
                found[name].append(error)
        preflight._versions = versions
        liveness.close(mesh.get_group())
    return found | _unlike_later(rank)


def _one_more_choice(rank: int) -> str:
    """Two layers of one kind; on rank 1 the second is of another, so that the ranks are not alike in what they do."""
    mesh = _mesh()
    try:
        layers = [_layer(mesh), _layer(mesh, ("alltoall", "allgather")[rank])]
        _called(layers[0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _unlike_later(rank: int) -> dict[str, list[Exception]]:
    """Layers that differ, where others were alike before: added to them, or built anew after a close."""
    found: dict[str, list[Exception]] = {"added": [], "closed": []}
    mesh = _mesh()
    layer = _layer(mesh)
    _called(layer)
    for name in found:
        if name == "closed":
            liveness.close(mesh.get_group())
        layer = _layer(mesh, dim=4 + 4 * rank)
        time.sleep(0.5 * rank)  # what the store has of before is there to be read
        for _ in range(2):
            try:
                _called(layer)
            except Exception as error:
                found[name].append(error)
    return found


class _Counted:
    """A group's store that counts what is asked of it."""

    def __init__(self, store: Any):
        self.store, self.calls = store, 0

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        self.store.set(key, value)

    def get(self, key: str) -> str | None:
        self.calls += 1
        found: str | None = self.store.get(key)
        return found


def _alike() -> dict[str, Any]:
    """How often ranks that are alike are compared, and when."""
    os.environ.update(MOEBIUS_PREFLIGHT="30", MOEBIUS_HEARTBEAT="off")
    found: dict[str, Any] = {"calls": []}
    mesh = _mesh()
    here = liveness.peers(mesh.get_group())
    counted = _Counted(here.store())
    here.store = lambda: counted  # type: ignore[method-assign]
    calls = found["calls"]
    layers = [_layer(mesh), _layer(mesh, dim=8)]
    layers[0].to(torch.bfloat16).float()  # what counts is how it is at the first call
    calls.append(counted.calls)
    for layer in [layers[0], layers[0], layers[1], layers[0]]:
        _called(layer)
        calls.append(counted.calls)
    layers.append(_layer(mesh))
    for layer in layers:
        _called(layer)
        calls.append(counted.calls)
    found["rounds"], found["compared"] = here.rounds, here.compared

    # A layer that nobody spread by a call of moebius' own registers when it is first called.
    plain = GroupedExperts(layers[0].config, BackendConfig(experts="loop", dispatcher="alltoall"))
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, value in list(plain.named_parameters()):
        setattr(
            plain, name, torch.nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None))
        )
    _called(plain)
    found["late"] = here.compared, here.rounds

    os.environ["MOEBIUS_PREFLIGHT"] = "off"
    other = _mesh()
    here = liveness.peers(other.get_group())
    counted = _Counted(here.store())
    here.store = lambda: counted  # type: ignore[method-assign]
    _called(_layer(other, n_activated_experts=2))
    found["off"] = counted.calls

    os.environ["MOEBIUS_PREFLIGHT"] = "30"
    found["exchanged"] = [
        preflight.exchange("says who it is", {"rank": dist.get_rank(), "turn": turn}, None) for turn in range(2)
    ]
    found["facts"] = preflight.facts(layers[0])
    return found


def _comes_late(seconds: float) -> None:
    """The last rank comes when the others have given up; a short while later than they wait."""
    from torch.distributed.device_mesh import DeviceMesh

    layer = _layer(DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(seconds)
    _called(layer)


def _ends_early(rank: int) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    layer = _layer(DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    if dist.get_rank() == rank:
        os._exit(7)
    _called(layer)


# --------------------------------------------------------------------------------------------------------------- tests
@cache
def _errors() -> list[dict[str, list[Exception]]]:
    found: list[dict[str, list[Exception]]] = ranks.run(_unlike, 2)
    return found


@pytest.mark.parametrize("name", WORDS)
def test_ranks_that_differ_get_the_same_error_which_names_rank_layer_and_field(name: str) -> None:
    errors = [error for rank in _errors() for error in rank[name]]
    assert len(errors) == 4 and {type(error) for error in errors} == {ConfigError}
    assert len({str(error) for error in errors}) == 1
    text = str(errors[0])
    assert all(words in text for words in WORDS[name]), text
    assert text.startswith("asked: 2 ranks that are set up alike\n") and "MOEBIUS_PREFLIGHT=off" in text


@cache
def _facts() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ranks.run(_alike, 2)
    return found


def test_ranks_of_which_one_chooses_a_dispatcher_while_another_calls_its_layers_are_told_so() -> None:
    (text,) = {rank["one more choice"] for rank in _errors()}
    assert text.startswith("ConfigError: asked: 2 ranks that do the same\nfound: rank 0: compares its layers")
    assert "; rank 1: chooses the dispatcher of a layer: allgather\ndo: build the same layers in" in text


def test_ranks_that_are_alike_are_compared_once_and_again_where_a_layer_was_added() -> None:
    for facts in _facts():
        built, first, *rest, added, again, last = facts["calls"]
        assert 0 < built < first and rest == [first] * 3
        assert first < added == again == last
        # Of the rounds two chose dispatchers, for two kinds of layers.
        assert (facts["compared"], facts["rounds"]) == (3, 4)


def test_a_layer_that_was_spread_by_other_means_is_compared_at_its_first_call() -> None:
    assert [facts["late"] for facts in _facts()] == [(4, 5)] * 2


def test_ranks_are_not_compared_where_it_is_switched_off() -> None:
    assert [facts["off"] for facts in _facts()] == [0, 0]


def test_exchange_gives_every_rank_what_each_said() -> None:
    wanted = [[{"rank": rank, "turn": turn} for rank in range(2)] for turn in range(2)]
    assert [facts["exchanged"] for facts in _facts()] == [wanted] * 2


def test_facts_are_those_of_the_layer() -> None:
    assert _facts()[0]["facts"] == {
        "name": None,
        "D": 4,
        "E": 4,
        "K": 2,
        "I": 8,
        "dtype": "float32",
        "experts": "loop",
        "dispatcher": "alltoall",
        "combine_dtype": None,
        "max_tokens": None,
    }


@cache
def _faults() -> dict[str, Future[list[faults.End]]]:
    """All at a time: the ranks wait."""
    pool = ThreadPoolExecutor(3)
    settings: dict[str, Any] = {"timeout": 20.0, "env": {"MOEBIUS_PREFLIGHT": "1.5"}}
    late = pool.submit(faults.run, _comes_late, 4, 3.0, **settings)
    return {
        "late": late,
        **{f"dead {rank}": pool.submit(faults.run, _ends_early, 2, rank, **settings) for rank in (0, 1)},
    }


def test_a_rank_that_comes_too_late_is_named_by_all_and_to_itself() -> None:
    ends = _faults()["late"].result(2 * faults.WAIT)
    for rank, end in enumerate(ends):
        assert end.code == 1 and isinstance(end.error, RankLost), (rank, end.text)
    assert ends[0].error.missing == (3,)
    # On a busy machine rank 0, which hosts the store, may leave before another has read: that is said then.
    for end in ends[1:3]:
        assert str(end.error) == str(ends[0].error) or "the group's store, which rank 0 hosts, is gone" in str(
            end.error
        )
    assert "missing: rank 3, not come within 1.5 s of the others" in str(ends[0].error)
    # To the last: the same, or that rank 0 has left with the store meanwhile.
    assert ends[3].error.missing in ((3,), (0,))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_ends_before_its_first_dispatch_is_named(dead: int) -> None:
    ends = _faults()[f"dead {dead}"].result(2 * faults.WAIT)
    assert [end.code for end in ends] == ([7, 1] if dead == 0 else [1, 7])
    error = ends[1 - dead].error
    assert isinstance(error, RankLost) and error.missing == (dead,), ends[1 - dead].text
    assert f"missing: rank {dead}" in error.found


def _mended() -> tuple[str, bool]:
    """A layer that differs, refused; then cast to what the others have."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    layer = _layer(mesh, param_dtype="bfloat16" if mesh.get_local_rank() else None, compute="float32")
    try:
        _called(layer)
        said = ""
    except ConfigError as error:
        said = str(error)
    layer.float()
    return said, bool(_called(layer).isfinite().all())


def test_ranks_that_differed_and_were_mended_agree_at_the_next_call() -> None:
    first, second = ranks.run(_mended, 2)
    assert "dtype is float32" in first[0] and first[0] == second[0] and first[1] and second[1]


def _closed() -> list[bool]:
    from moebius.torch_frontend.dispatch_alltoall import AllToAll
    from moebius.torch_frontend.liveness import peers

    sub = dist.new_group([0, 1])
    kept = AllToAll(sub)
    before = peers(sub)
    AllToAll().close()
    found = [peers(sub) is before]
    kept.close()
    with AllToAll():
        dist.destroy_process_group()
    return found


def test_close_ends_the_dispatchers_own_group_alone_and_nothing_where_the_group_is_gone() -> None:
    assert ranks.run(_closed, 2) == [[True], [True]]
