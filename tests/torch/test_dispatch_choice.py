"""Which dispatcher a layer gets: limits in words, what of a library was found, and one answer on all ranks."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import ranks
import torch.distributed as dist
from fakes import deep_ep

from moebius.core import BackendConfig, MoEConfig, MoEError
from moebius.core.errors import BackendUnavailable
from moebius.core.registry import Problem
from moebius.torch_frontend import dispatch_deepep, dispatch_elastic, dispatch_hybridep
from moebius.torch_frontend.dispatch import DISPATCHERS, Local
from moebius.torch_frontend.dispatch_choice import agreed
from moebius.torch_frontend.dispatch_limits import LIMITS, against, require
from moebius.torch_frontend.grouped_experts import GroupedExperts, GroupedExpertsDeepEP

CONFIG = MoEConfig(n_routed_experts=8, n_activated_experts=1, dim=16, moe_inter_dim=6, dtype="bfloat16")


def problem(**changes: Any) -> Problem:
    """Of DeepSeek-V3's layers on 8 GPUs; `changes` of it."""
    usual = {"device": "cuda", "dtype": "bfloat16", "dim": 7168, "inter_dim": 2048, "n_experts": 32, "ranks": 8}
    return Problem(**{**usual, **changes})


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
    require("deepep", problem(dim=8176, n_experts=128), 32, 24, True)
    require("hybridep", problem(dim=8192), 64, 24, False)


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
        if stage == "both" or (stage == "one" and dist.get_rank() == 0):
            deep_ep.install("Buffer")
        for name in (None, "deepep", "alltoall", "hybridep"):
            found[stage, name] = _name(name)
    found["float32"] = _name(None, dtype="float32")
    found["combine_dtype"] = _name(None, combine_dtype="float32")
    found["k_2"] = _name(None, k=2)
    found["wide"] = _name(None, dim=8192)
    found["unknown"] = _name("pigeon")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    module = GroupedExpertsDeepEP(CONFIG, BackendConfig(experts="loop"))
    module.init_token_dispatcher(mesh)
    found["module"] = type(module.token_dispatcher).__name__, len(deep_ep.BUFFERS)
    module.init_token_dispatcher(mesh)
    found["again"] = len(deep_ep.BUFFERS), deep_ep.BUFFERS[0].destroyed
    return found


def _name(name: str | None, k: int = 1, combine_dtype: str | None = None, **changes: Any) -> str:
    asked = problem(device="cpu", ranks=2, **{"dim": 64, "n_experts": 4, **changes})
    try:
        return agreed(name, asked, k, dist.group.WORLD, combine_dtype).name
    except MoEError as error:
        return f"{type(error).__name__}: {error}"


@cache
def _answers() -> list[dict[str, Any]]:
    answers = ranks.run(_chosen, 2)
    assert answers[0] == answers[1]
    return answers


@pytest.mark.parametrize("stage, name", [("none", "alltoall"), ("one", "alltoall"), ("both", "deepep")])
def test_agreed_of_none_is_what_all_ranks_have(stage: str, name: str) -> None:
    for answer in _answers():
        assert answer[stage, None] == name and answer[stage, "alltoall"] == "alltoall"


@pytest.mark.parametrize("stage, who", [("none", "rank 0, 1"), ("one", "rank 1")])
def test_agreed_of_a_library_that_a_rank_lacks_is_the_same_error_on_all(stage: str, who: str) -> None:
    for answer in _answers():
        assert answer[stage, "deepep"].startswith("BackendUnavailable: asked: dispatch backend 'deepep'")
        assert f"found: {who}: not installed: deep_ep\ndo: build DeepEP v1.2.1" in answer[stage, "deepep"]


def test_agreed_of_a_library_of_another_code_base_says_what_each_rank_has() -> None:
    for answer in _answers():
        assert answer["both", "deepep"] == "deepep"
        assert "rank 0, 1: does not load: deep_ep 9.9 has Buffer" in answer["both", "hybridep"]
        one = answer["one", "hybridep"]
        assert "rank 0: does not load: deep_ep 9.9 has Buffer; rank 1: not installed: deep_ep" in one


def test_agreed_of_none_leaves_a_library_out_where_its_limits_are_passed() -> None:
    for answer in _answers():
        assert (answer["float32"], answer["combine_dtype"], answer["wide"]) == ("alltoall",) * 3
        assert answer["k_2"] == "deepep"  # of 2 ranks a quarter of the tokens stay at home
        assert answer["unknown"].startswith("ConfigError")


def test_init_token_dispatcher_makes_the_buffer_and_keeps_it_when_called_again() -> None:
    for answer in _answers():
        assert answer["module"] == ("DeepEP", 1) and answer["again"] == (1, False)
