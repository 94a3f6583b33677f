"""Which dispatcher a layer gets: limits in words, what of a library was found, and one answer on all ranks."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from fakes import deep_ep

from moebius.core import BackendConfig, MoEConfig, MoEError
from moebius.core.errors import BackendUnavailable, Unsupported
from moebius.core.registry import Problem
from moebius.core.store import Members
from moebius.torch_frontend import (
    dispatch_choice,
    dispatch_deepep,
    dispatch_elastic,
    dispatch_hybridep,
    liveness,
    shard_experts,
)
from moebius.torch_frontend.dispatch import DISPATCHERS, Local, Options
from moebius.torch_frontend.dispatch_choice import agreed, candidates
from moebius.torch_frontend.dispatch_limits import LIMITS, against, require
from moebius.torch_frontend.grouped_experts import GroupedExperts, GroupedExpertsDeepEP

CONFIG = MoEConfig(n_routed_experts=8, n_activated_experts=1, dim=16, moe_inter_dim=6, dtype="bfloat16")


def problem(**changes: Any) -> Problem:
    """Of DeepSeek-V3's layers on 8 GPUs; `changes` of it."""
    usual = {"device": "cuda", "dtype": "bfloat16", "dim": 7168, "inter_dim": 2048, "n_experts": 32, "ranks": 8}
    return Problem(**{**usual, **changes})


def options(**changes: Any) -> Options:
    """Of those layers; `changes` of them."""
    return Options(**{"dim": 7168, "n_experts": 256, "k": 2, **changes})


# --------------------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize("name", LIMITS)
def test_against_is_silent_of_a_usual_layer_and_of_one_rank(name: str) -> None:
    assert against(name, problem(), 8) is None
    assert against(name, problem(ranks=1, device="cpu", dtype="float64", dim=7), 99) is None


@pytest.mark.parametrize(
    "name, changes, k, words",
    [
        ("deepep", {"ranks": 3}, 8, "it takes 2, 4, 8 ranks, not 3; 'deepep_elastic', 'hybridep', 'alltoall' can"),
        ("deepep", {"ranks": 16}, 8, "it takes 2, 4, 8 ranks, not 16"),
        ("uccl_ep", {"dim": 7176}, 8, "it takes hidden sizes that are multiples of 16 up to 8176, not 7176"),
        ("deepep", {"dim": 8192}, 8, "up to 8176, not 8192; 'deepep_elastic', 'hybridep', 'alltoall' can"),
        ("deepep", {"n_experts": 129}, 8, "it takes up to 128 experts on a rank, not 129"),
        ("deepep", {}, 33, "it takes K up to 32, not 33"),
        ("deepep", {"dtype": "float16"}, 8, "it sends bfloat16 alone; 'alltoall' can"),
        ("deepep", {"device": "cpu"}, 8, "it needs CUDA tensors; 'alltoall' can"),
        ("deepep", {"capability": (7, 5)}, 8, "it needs compute capability 8.0; 'alltoall' can"),
        ("hybridep", {"capability": (8, 0)}, 8, "it needs compute capability 9.0; 'deepep', 'uccl_ep'"),
        ("deepep_elastic", {"dim": 2880}, 8, "it takes hidden sizes that are multiples of 256, not 2880; 'deepep'"),
        ("deepep_elastic", {"ranks": 2048, "n_experts": 1}, 8, "it takes 2 to 1024 ranks, not 2048"),
        ("deepep_elastic", {"n_experts": 257}, 8, "it takes up to 256 experts on a rank, not 257"),
        ("deepep_elastic", {"n_experts": 256, "ranks": 9}, 8, "it takes up to 2048 experts, not 2304"),
        ("hybridep", {"ranks": 3, "n_experts": 2}, 2, "it takes numbers of experts that are multiples of 4, not 6"),
    ],
)
def test_against_names_the_limit_and_who_can(name: str, changes: dict[str, Any], k: int, words: str) -> None:
    found = against(name, problem(**changes), k)
    assert found is not None and words in found, found


def test_require_of_what_is_within_the_limits_is_silent() -> None:
    require("deepep", problem(dim=8176, n_experts=128), options(k=32, num_sms=24, asynchronous=True), "bfloat16")
    require("hybridep", problem(dim=8192), options(k=64, num_sms=24))
    require("deepep", problem(ranks=1), options(num_sms=21))


@pytest.mark.parametrize("ranks", [1, 8])
def test_require_of_a_number_of_tokens_for_a_dispatcher_that_counts_is_refused_on_any_ranks(ranks: int) -> None:
    with pytest.raises(Unsupported, match="dispatcher_max_tokens=4\nfound: alltoall counts what travels"):
        require("alltoall", problem(ranks=ranks), options(max_tokens=4))


def test_modules_with_alltoall_and_max_tokens_are_refused_when_they_are_built() -> None:
    backend = BackendConfig(dispatcher="alltoall", dispatcher_max_tokens=4, experts="loop")
    for build in (
        lambda: GroupedExperts(CONFIG, backend),
        lambda: GroupedExpertsDeepEP(CONFIG, backend, "alltoall"),
    ):
        with pytest.raises(Unsupported, match="do: name 'allgather', or leave it out"):
            build()


def test_candidates_leave_out_what_the_settings_of_a_layer_rule_out() -> None:
    names = [choice.name for choice in candidates(problem(), 2)]
    assert names == ["deepep", "alltoall", "allgather"]
    for asked, combine_dtype in [(options(num_sms=21), None), (options(), "float32")]:
        assert [choice.name for choice in candidates(problem(), 2, asked, combine_dtype)] == names[1:]
    assert [choice.name for choice in candidates(problem(), 2, options(max_tokens=9))] == ["deepep", "allgather"]


# ------------------------------------------------------------------------------------------------------- what was found
@pytest.fixture
def put(monkeypatch: Any) -> Any:
    """Makes modules importable that have these classes."""

    def put_one(place: str, *names: str, config: Any = deep_ep.Config) -> None:
        for name in (place.partition(".")[0], place):
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[place]).update({name: deep_ep.CLASSES[name] for name in names}, Config=config, __path__=[])

    return put_one


def test_loaded_of_a_package_with_other_classes_says_which_it_has(put: Any) -> None:
    put("deep_ep", "ElasticBuffer")
    for module, name in [(dispatch_deepep, "deepep"), (dispatch_hybridep, "hybridep")]:
        with pytest.raises(BackendUnavailable, match="deep_ep of unknown version has ElasticBuffer"):
            module.loaded(name)
    assert dispatch_elastic.loaded("deepep_elastic")
    assert dispatch_deepep.says("deepep") == "deep_ep of unknown version has ElasticBuffer"
    assert "nvcc" in dispatch_hybridep.says("hybridep")


def test_loaded_of_elastic_without_infiniband_turns_off_what_needs_it(put: Any, monkeypatch: Any) -> None:
    put("deep_ep", "Buffer")
    monkeypatch.delenv("EP_DISABLE_GIN", raising=False)
    monkeypatch.setattr(dispatch_elastic, "_has_infiniband", lambda: True)
    with pytest.raises(BackendUnavailable, match="has Buffer"):
        dispatch_elastic.loaded("deepep_elastic")
    assert "InfiniBand; NCCL none" in dispatch_elastic.says("deepep_elastic")
    put("deep_ep", "ElasticBuffer")
    monkeypatch.setattr(dispatch_elastic, "_has_infiniband", lambda: False)
    dispatch_elastic.loaded("deepep_elastic")
    assert "no InfiniBand, EP_DISABLE_GIN=1" in dispatch_elastic.says("deepep_elastic")
    monkeypatch.setenv("EP_DISABLE_GIN", "0")
    dispatch_elastic.loaded("deepep_elastic")
    assert "EP_DISABLE_GIN=0" in dispatch_elastic.says("deepep_elastic")


def test_loaded_of_uccl_takes_its_python_class_wherever_it_is(put: Any) -> None:
    class Uccls(deep_ep.Config):
        __module__ = "uccl.ep"

    put("deep_ep", "Buffer")
    put("uccl.ep")
    sys.modules["uccl.ep"].Buffer = object  # the extension's own class, of another interface
    with pytest.raises(BackendUnavailable, match=r"uccl.ep .* has Buffer; no module uccl_ep; deep_ep is DeepEP's own"):
        dispatch_deepep.loaded("uccl_ep")
    put("deep_ep", "Buffer", config=Uccls)
    assert dispatch_deepep.loaded("uccl_ep").keywords["module"] is sys.modules["deep_ep"]
    assert "deep_ep of unknown version, UCCL's has Buffer" in dispatch_deepep.says("deepep")
    put("uccl.ep", "Buffer")
    assert dispatch_deepep.loaded("uccl_ep").keywords["module"] is sys.modules["uccl.ep"]


@pytest.mark.parametrize("name", LIMITS)
def test_library_that_is_not_installed_is_refused_in_words_and_never_by_a_package_of_pypi(name: str) -> None:
    with pytest.raises(BackendUnavailable, match="not installed") as caught:
        DISPATCHERS.choose(name, problem())
    assert "pip install" not in caught.value.do and "build" in caught.value.do


def test_experts_on_one_rank_take_the_local_dispatcher_of_a_library_that_is_there(put: Any, monkeypatch: Any) -> None:
    put("deep_ep", "Buffer")
    sys.modules["deep_ep"].__spec__ = dist.__spec__
    from fakes import forget

    forget()
    monkeypatch.setattr(DISPATCHERS, "_loaded", {})
    monkeypatch.setattr(DISPATCHERS, "_broken", {})
    try:
        module = GroupedExperts(CONFIG, BackendConfig(dispatcher="deepep", experts="loop"))
        assert isinstance(module._on_one_rank, Local)
        with pytest.raises(BackendUnavailable, match=r"does not load: deep_ep .* has Buffer"):
            GroupedExperts(CONFIG, BackendConfig(dispatcher="hybridep", experts="loop"))
    finally:
        monkeypatch.undo()
        forget()


# ---------------------------------------------------------------------------------------------------- on all ranks, two
def _chosen() -> dict[str, Any]:
    """On one rank of two: names, or words, before any has DeepEP, where one has it, and where both have."""
    from torch.distributed.device_mesh import init_device_mesh

    from moebius.torch_frontend import dispatch_limits

    dispatch_limits.DEVICES = ("cuda", "meta", "cpu")
    found: dict[str, Any] = {}
    for stage in ("none", "one", "both"):
        liveness.close()  # what the ranks agreed on
        if stage == "both" or (stage == "one" and dist.get_rank() == 0):
            deep_ep.install("Buffer")
        for name in (None, "deepep", "alltoall", "hybridep"):
            found[stage, name] = _name(name)
    found["float32"] = _name(None, dtype="float32")
    found["combine_dtype"] = _name(None, combine_dtype="float32"), _name("deepep", combine_dtype="float32")
    found["k_2"] = _name(None, k=2)
    found["num_sms"] = _name(None, num_sms=21), _name("deepep", num_sms=21), _name("alltoall", num_sms=21)
    found["max_tokens"] = _name(None, max_tokens=4), _name("alltoall", max_tokens=4)
    found["wide"] = _name(None, dim=8192)
    found["unknown"] = _name("pigeon")
    before = liveness.peers(None).rounds
    found["known"] = _name(None), _name("alltoall"), liveness.peers(None).rounds - before
    for case, asked in UNLIKE.items():
        found["unlike", case] = _name(**asked[dist.get_rank()])
    found["afterwards"] = _name(None)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    module = GroupedExpertsDeepEP(CONFIG, BackendConfig(experts="loop"))
    module.init_token_dispatcher(mesh)
    found["module"] = type(module.token_dispatcher).__name__, len(deep_ep.BUFFERS)
    module.init_token_dispatcher(mesh)
    found["again"] = len(deep_ep.BUFFERS), deep_ep.BUFFERS[0].destroyed
    module = _module(("alltoall", None)[dist.get_rank()])
    found["unlike", "modules"] = _said(lambda: module.init_token_dispatcher(mesh))
    found["dtypes"] = _of_both_dtypes(mesh)
    return found


# Name -> what is asked of `agreed` on rank 0, and on rank 1.
UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "library and own": ({"name": "deepep", "k": 3}, {"name": "alltoall", "k": 3}),
    "own and none": ({"name": "alltoall", "k": 4}, {"name": None, "k": 4}),
    "none and library": ({"name": None, "k": 5}, {"name": "hybridep", "k": 5}),
    "two own": ({"name": "alltoall", "k": 6}, {"name": "allgather", "k": 6}),
    "D": ({"name": None, "k": 7}, {"name": None, "k": 7, "dim": 128}),
    "K": ({"name": "alltoall", "k": 9}, {"name": "alltoall", "k": 8}),
    "num_sms": ({"name": "deepep", "k": 7}, {"name": "deepep", "k": 7, "num_sms": 21}),
}
WORDS = {
    "library and own": "found: dispatcher is deepep on rank 0, alltoall on rank 1",
    "own and none": "found: dispatcher is alltoall on rank 0, not named on rank 1",
    "none and library": "found: dispatcher is not named on rank 0, hybridep on rank 1",
    "two own": "found: dispatcher is alltoall on rank 0, allgather on rank 1\ndo: name the same dispatcher",
    "D": "found: D is 64 on rank 0, 128 on rank 1\ndo: name the same dispatcher, for the same layer, on every rank",
    "K": "found: K is 9 on rank 0, 8 on rank 1",
    "num_sms": "found: num_sms is 20 on rank 0, 21 on rank 1",
    "modules": "found: dispatcher is alltoall on rank 0, not named on rank 1",
}


def _name(name: str | None, k: int = 1, combine_dtype: str | None = None, **changes: Any) -> str:
    own = {field: changes.pop(field) for field in ("num_sms", "max_tokens") if field in changes}
    asked = problem(device="cpu", ranks=2, **{"dim": 64, "n_experts": 4, **changes})
    wanted = Options(asked.dim, 8, k, **own)
    return _said(lambda: agreed(name, asked, wanted, dist.group.WORLD, combine_dtype).name)


def _said(function: Any) -> str:
    try:
        return str(function())
    except MoEError as error:
        return f"{type(error).__name__}: {error}"


def _module(dispatcher: str | None) -> GroupedExpertsDeepEP:
    return GroupedExpertsDeepEP(CONFIG, BackendConfig(experts="loop"), dispatcher)


def _of_both_dtypes(mesh: Any) -> dict[str, list[Any]]:
    """Of the modules that name no dispatcher: who moved tokens of each dtype, and whether the gradients came."""
    found: dict[str, list[Any]] = {}
    plain = GroupedExperts(CONFIG, BackendConfig(experts="loop"))
    given = _module(None)
    shard_experts(plain, mesh)
    given.init_token_dispatcher(mesh)
    for name, module in [("plain", plain), ("given", given)]:
        found[name] = []
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            x = torch.ones(2, 16, dtype=dtype, requires_grad=True)
            deep_ep.CALLS.clear()
            y = module(x, torch.ones(2, dtype=torch.bool), torch.ones(2, 1), torch.tensor([[0], [7]]))
            y.float().sum().backward()
            by_library = any(call == "Buffer.dispatch" for call, _ in deep_ep.CALLS)
            found[name].append((by_library, y.dtype == dtype, x.grad is not None))
        here = liveness.peers(None)
        before = len(here.dispatchers)
        module.close()
        found[name].append(before - len(here.dispatchers))
    return found


@cache
def _answers() -> list[dict[str, Any]]:
    answers = ranks.run(_chosen, 2)
    assert answers[0] == answers[1]
    return answers


@pytest.mark.parametrize("stage, name", [("none", "alltoall"), ("one", "alltoall"), ("both", "deepep")])
def test_agreed_of_none_is_what_all_ranks_have(stage: str, name: str) -> None:
    for answer in _answers():
        assert answer[stage, None] == name and answer[stage, "alltoall"] == "alltoall"


@pytest.mark.parametrize("stage, who", [("none", "rank 0, rank 1"), ("one", "rank 1")])
def test_agreed_of_a_library_that_a_rank_lacks_is_the_same_error_on_all(stage: str, who: str) -> None:
    for answer in _answers():
        assert answer[stage, "deepep"].startswith("BackendUnavailable: asked: dispatch backend 'deepep'")
        assert f"found: {who}: not installed: deep_ep\ndo: build DeepEP v1.2.1" in answer[stage, "deepep"]


def test_agreed_of_a_library_of_another_code_base_says_what_each_rank_has() -> None:
    for answer in _answers():
        assert answer["both", "deepep"] == "deepep"
        assert "rank 0, rank 1: does not load: deep_ep 9.9 has Buffer" in answer["both", "hybridep"]
        one = answer["one", "hybridep"]
        assert "rank 0: does not load: deep_ep 9.9 has Buffer; rank 1: not installed: deep_ep" in one


def test_agreed_of_none_leaves_a_library_out_where_its_limits_are_passed() -> None:
    for answer in _answers():
        assert (answer["float32"], answer["combine_dtype"][0], answer["wide"]) == ("alltoall",) * 3
        assert (answer["num_sms"][0], answer["num_sms"][2], answer["max_tokens"][0]) == ("alltoall",) * 2 + ("deepep",)
        assert answer["k_2"] == "deepep"  # of 2 ranks a quarter of the tokens stay at home
        assert answer["unknown"].startswith("ConfigError")


def test_agreed_of_a_name_that_cannot_serve_such_settings_is_refused_on_all() -> None:
    for answer in _answers():
        assert "found: rank 0, rank 1: no even number of 2 or more\ndo: use 20 or 24" in answer["num_sms"][1]
        assert "found: rank 0, rank 1: 'deepep' adds bfloat16 alone\ndo: leave it out" in answer["combine_dtype"][1]
        assert "found: rank 0, rank 1: alltoall counts what travels, on the host" in answer["max_tokens"][1]


def test_agreed_of_what_was_agreed_on_before_is_not_asked_again() -> None:
    for answer in _answers():
        assert answer["known"] == ("deepep", "alltoall", 0)


@pytest.mark.parametrize("name", WORDS)
def test_agreed_of_ranks_that_ask_for_different_things_is_one_error_at_once(name: str) -> None:
    for answer in _answers():
        text = answer["unlike", name]
        assert text.startswith("ConfigError: asked: one dispatcher for a layer over 2 ranks\n")
        assert WORDS[name] in text and answer["afterwards"] == "deepep"


def test_answer_of_ranks_that_have_nothing_in_common_says_what_each_has() -> None:
    said = [{"asks": {}, "usable": ["alltoall"]}, {"asks": {}, "usable": []}]
    with pytest.raises(Unsupported, match="found: rank 0: alltoall; rank 1: none\n"):
        dispatch_choice._answer(None, said, Members(ranks=(0, 1), place=0))


@pytest.mark.parametrize("module", ["plain", "given"])
def test_modules_that_name_no_dispatcher_take_a_library_for_the_tokens_that_it_serves(module: str) -> None:
    for answer in _answers():
        *calls, closed = answer["dtypes"][module]
        assert calls == [(False, True, True), (True, True, True), (False, True, True)]
        assert closed == 2  # one for each dtype


def test_init_token_dispatcher_makes_the_buffer_and_keeps_it_when_called_again() -> None:
    for answer in _answers():
        assert answer["module"] == ("DeepEP", 1) and answer["again"] == (1, False)
