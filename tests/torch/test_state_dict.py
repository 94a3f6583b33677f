"""State dicts: any class reads what any other wrote, and what does not fit changes nothing."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any

import pytest
import ranks
import torch
from torch import nn

from moebius.core import BackendConfig, CheckpointError, MoEConfig, StateDictError
from moebius.torch_frontend import (
    Gate,
    GroupedExperts,
    GroupedExpertsDeepEP,
    GroupedExpertsTE,
    MoE,
    load_state,
    shard_experts,
)

CONFIG = MoEConfig(
    n_routed_experts=4,
    n_activated_experts=2,
    dim=8,
    moe_inter_dim=6,
    dtype="float32",
    expert_bias=True,
    router_bias=True,
    score_func="sigmoid",
    force_e_score_correction_bias=True,
    n_shared_experts=1,
    moe_latent_size=8,
)
LOOP = BackendConfig(experts="loop")
EXPERTS: dict[str, Any] = {
    "GroupedExperts": lambda **kwargs: GroupedExperts(CONFIG, LOOP, **kwargs),
    "GroupedExpertsDeepEP": lambda **kwargs: GroupedExpertsDeepEP(CONFIG, LOOP, **kwargs),
    "GroupedExpertsTE": lambda **kwargs: GroupedExpertsTE(CONFIG, LOOP, **kwargs),
}
MODULES: dict[str, Any] = {
    **EXPERTS,
    "Gate": lambda **kwargs: Gate(CONFIG, **kwargs),
    "MoE": lambda **kwargs: MoE(CONFIG, LOOP, **kwargs),
}
# Of each module a tensor that torch loads after others: those would be changed already.
LATE = {"Gate": "bias", "MoE": "fc2_latent_proj.weight"}
modules = pytest.mark.parametrize("kind", MODULES)


def drawn(kind: str, seed: int = 0, **kwargs: Any) -> Any:
    """A module of that kind, drawn; no two tensors alike, biases neither."""
    module, generator = MODULES[kind](**kwargs), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    return module


def snapshot(module: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Which tensors a module holds, and their values."""
    return {name: (id(value), value.detach().clone()) for name, value in module.state_dict(keep_vars=True).items()}


def assert_unchanged(module: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    for name, value in module.state_dict(keep_vars=True).items():
        identity, values = before[name]
        assert id(value) == identity and torch.equal(value, values), name


def assert_holds(module: nn.Module, state: Any) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


def late(kind: str) -> str:
    return LATE.get(kind, "down_proj_bias")


# ------------------------------------------------------------------------------------------------------- what is loaded
@pytest.mark.parametrize("into", EXPERTS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_state_dict_of_any_class_loads_into_any_other(kind: str, into: str) -> None:
    one, other = drawn(kind), drawn(into, seed=1)
    assert other.load_state_dict(one.state_dict()) == ([], [])
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    args = x, torch.arange(5) != 2, weights, torch.randint(-1, 5, (5, 2))
    assert torch.equal(one(*args), other(*args)) and one(*args).abs().max() > 0


@modules
def test_load_state_dict_copies_values_and_keeps_the_tensors(kind: str) -> None:
    module, state = drawn(kind), drawn(kind, seed=1).state_dict()
    before = snapshot(module)
    assert module.load_state_dict(state) == ([], [])
    assert_holds(module, state)
    assert {name: id(value) for name, value in module.state_dict(keep_vars=True).items()} == {
        name: identity for name, (identity, _) in before.items()
    }


@modules
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_load_state_dict_of_another_dtype_casts_as_torch_does(kind: str, dtype: torch.dtype) -> None:
    module = drawn(kind)
    state = {name: (4 * value).to(dtype) for name, value in drawn(kind, seed=1).state_dict().items()}
    module.load_state_dict(state)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert_holds(module, state)


@modules
def test_load_state_dict_leaves_the_callers_dict_as_it_was(kind: str) -> None:
    module, state = drawn(kind), drawn(kind, seed=1).state_dict()
    copied, metadata = OrderedDict(state), {name: dict(noted) for name, noted in state._metadata.items()}
    module.load_state_dict(state, assign=True)
    module.load_state_dict(state)
    assert list(state) == list(copied) and all(state[name] is copied[name] for name in copied)
    assert state._metadata == metadata


def test_load_state_dict_after_one_that_assigned_shares_no_memory() -> None:
    """torch notes `assign` in the dict's metadata, and the next load that is given the dict assigns too."""
    one, two, state = drawn("GroupedExperts"), drawn("GroupedExperts"), drawn("GroupedExperts", seed=1).state_dict()
    one.load_state_dict(state, assign=True)
    two.load_state_dict(state)
    assert one.down_projs.data_ptr() == state["down_projs"].data_ptr() != two.down_projs.data_ptr()


# -------------------------------------------------------------------------------------------------- assign and the meta
@modules
def test_load_state_dict_that_assigns_takes_the_tensors_and_keeps_requires_grad(kind: str) -> None:
    module = drawn(kind)
    for index, value in enumerate(module.parameters()):
        value.requires_grad_(index % 2 == 0)
    trains = {name: value.requires_grad for name, value in module.named_parameters()}
    state = {name: value.double() for name, value in drawn(kind, seed=1).state_dict().items()}
    module.load_state_dict(state, assign=True)
    assert {name: value.requires_grad for name, value in module.named_parameters()} == trains
    for name, value in module.named_parameters():
        assert value.data_ptr() == state[name].data_ptr() and value.dtype == torch.float64, name
    for name, value in module.named_buffers():  # the correction bias is float32 whatever it was given as
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float()), name


@modules
@pytest.mark.parametrize("by", ["argument", "context"])
@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "emptied"])
def test_module_built_on_meta_holds_what_is_loaded(kind: str, by: str, assign: bool) -> None:
    if by == "argument":
        module = MODULES[kind](device="meta")
    else:
        with torch.device("meta"):
            module = MODULES[kind]()
    assert all(value.is_meta for value in module.state_dict().values())
    wanted = drawn(kind, seed=1)
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(wanted.state_dict(), assign=assign)
    assert_holds(module, wanted.state_dict())
    assert all(value.requires_grad for value in module.parameters())


# ------------------------------------------------------------------------------------------------------ what is refused
def without(state: Any, name: str) -> Any:
    return {key: value for key, value in state.items() if key != name}


FAULTS: dict[str, Any] = {
    "missing": lambda state, name: without(state, name),
    "unexpected": lambda state, name: {**state, f"{name}_2": torch.ones(3)},
    "of an unknown module": lambda state, name: {**state, "router.weight": torch.ones(3)},
    "misshaped": lambda state, name: {**state, name: torch.ones(3, 5)},
    "of another number of experts": lambda state, name: {**state, name: state[name][:3]},
    "no tensor": lambda state, name: {**state, name: state[name].numpy()},
    "without values": lambda state, name: {**state, name: state[name].to("meta")},
}
WORDS: dict[str, str] = {
    "missing": "Missing key(s): {name} {own}",
    "unexpected": "Unexpected key(s): {name}_2",
    "of an unknown module": "Unexpected key(s): router.weight",
    "misshaped": "size mismatch for {name}: shape [3, 5] in the state dict, {own} in the module",
    "of another number of experts": "size mismatch for {name}: shape {cut} in the state dict, {own} in the module",
    "no tensor": "{name} is no tensor but a numpy.ndarray",
    "without values": "{name} is on the meta device and holds no values",
}
# A meta tensor can be assigned.
_CASES = [(fault, assign) for fault in FAULTS for assign in (False, True) if not assign or fault != "without values"]


def words(fault: str, name: str, shape: Any) -> str:
    return WORDS[fault].format(name=name, own=list(shape), cut=[3, *shape[1:]])


@modules
@pytest.mark.parametrize("fault, assign", _CASES)
def test_load_state_dict_that_does_not_fit_names_it_and_changes_nothing(kind: str, fault: str, assign: bool) -> None:
    module, state = drawn(kind), drawn(kind, seed=1).state_dict()
    before, name = snapshot(module), late(kind)
    with pytest.raises(StateDictError) as caught:
        module.load_state_dict(FAULTS[fault](state, name), assign=assign)
    assert words(fault, name, state[name].shape) in caught.value.found
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, CheckpointError)
    assert_unchanged(module, before)


@modules
def test_load_state_dict_with_several_faults_names_all_of_them(kind: str) -> None:
    module, state = drawn(kind), drawn(kind, seed=1).state_dict()
    first, *_, last = state
    with pytest.raises(StateDictError) as caught:
        module.load_state_dict({**without(state, first), last: torch.ones(1, 1), "more": torch.ones(1)})
    assert f"Missing key(s): {first} " in caught.value.found
    assert f"size mismatch for {last}: " in caught.value.found and "Unexpected key(s): more" in caught.value.found


@modules
def test_load_state_dict_that_is_not_strict_loads_what_fits_and_reports_the_rest(kind: str) -> None:
    module, state, name = drawn(kind), drawn(kind, seed=1).state_dict(), late(kind)
    before = module.state_dict()[name].clone()
    found = module.load_state_dict({**without(state, name), "more": torch.ones(3)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([name], ["more"])
    assert_holds(module, {**state, name: before})


@modules
def test_load_state_dict_that_is_not_strict_refuses_a_shape_still(kind: str) -> None:
    module, state, name = drawn(kind), drawn(kind, seed=1).state_dict(), late(kind)
    before = snapshot(module)
    with pytest.raises(StateDictError, match=f"size mismatch for {name}"):
        module.load_state_dict({**state, name: torch.ones(3, 5)}, strict=False)
    assert_unchanged(module, before)


def test_load_state_dict_of_no_dict_is_refused_by_torch() -> None:
    with pytest.raises(TypeError, match="dict-like"):
        drawn("MoE").load_state_dict([torch.ones(3)])


# ---------------------------------------------------------------------------------------------------- in a bigger model
def model(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    parts = {"first": nn.Linear(3, 3), "moe": drawn("MoE", seed), "last": nn.Linear(3, 3)}
    return nn.ModuleDict(parts)


def test_model_that_holds_the_modules_loads_by_their_prefix() -> None:
    one, other = model(0), model(1)
    assert other.load_state_dict(one.state_dict()) == ([], [])
    assert_holds(other, one.state_dict())


@pytest.mark.parametrize("fault", ["misshaped", "no tensor", "without values"])
def test_model_with_a_tensor_that_does_not_fit_leaves_that_module_as_it_was(fault: str) -> None:
    """The experts alone: torch asks module by module, and loads the others."""
    one, other, name = model(0), model(1), "moe.experts.down_proj_bias"
    before, state = snapshot(other["moe"].experts), one.state_dict()
    with pytest.raises(RuntimeError) as caught:
        other.load_state_dict({**state, "moe.experts.more": torch.ones(2), **FAULTS[fault]({name: state[name]}, name)})
    assert words(fault, name, state[name].shape) in str(caught.value)
    assert 'Unexpected key(s) in state_dict: "moe.experts.more"' in str(caught.value)
    assert_unchanged(other["moe"].experts, before)
    assert torch.equal(other["last"].weight, one["last"].weight)


def test_model_with_a_missing_key_that_is_not_strict_loads_the_rest_of_the_module() -> None:
    one, other = model(0), model(1)
    kept = other["moe"].experts.down_projs.detach().clone()
    found = other.load_state_dict(without(one.state_dict(), "moe.experts.down_projs"), strict=False)
    assert found.missing_keys == ["moe.experts.down_projs"]
    assert_holds(other, {**one.state_dict(), "moe.experts.down_projs": kept})


# -------------------------------------------------------------------------------------------------- hooks and strangers
def renaming(calls: list[str]) -> Any:
    """A pre-hook that reads an older checkpoint, in which the experts had other names."""

    def hook(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        calls.append(prefix)
        for name in list(state):
            if "experts_down" in name:
                state[name.replace("experts_down", "experts.down")] = state.pop(name)
            elif name.startswith(f"{prefix}w2"):
                state[name.replace("w2", "down_projs")] = state.pop(name)

    return hook


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in_a_model"])
def test_pre_hook_that_renames_is_obeyed(inside: bool) -> None:
    module, state, calls = drawn("GroupedExperts"), drawn("GroupedExperts", seed=1).state_dict(), []
    module.register_load_state_dict_pre_hook(renaming(calls))
    prefix, whole = ("layer.", nn.ModuleDict({"layer": module})) if inside else ("", module)
    old = {prefix + name.replace("down_projs", "w2"): value for name, value in state.items()}
    whole.load_state_dict(old)
    whole.load_state_dict(old)
    assert_holds(module, state)
    assert set(calls) == {prefix} and f"{prefix}w2" in old


def test_pre_hook_that_renames_what_lies_inside_is_obeyed() -> None:
    module, state = drawn("MoE"), drawn("MoE", seed=1).state_dict()
    module.register_load_state_dict_pre_hook(renaming([]))
    module.load_state_dict({name.replace("experts.down", "experts_down"): value for name, value in state.items()})
    assert_holds(module, state)


def test_pre_hooks_run_once_where_torch_would_run_them_once() -> None:
    module, calls = nn.ModuleDict({"layer": drawn("GroupedExperts")}), []
    module["layer"].register_load_state_dict_pre_hook(renaming(calls))
    module.load_state_dict(module.state_dict())
    assert calls == ["layer."]


def test_post_hook_may_forgive_missing_and_unexpected_keys() -> None:
    module, state = drawn("GroupedExperts"), drawn("GroupedExperts", seed=1).state_dict()

    def forgive(module: nn.Module, keys: Any) -> None:
        keys.missing_keys.clear()
        keys.unexpected_keys.clear()

    module.register_load_state_dict_post_hook(forgive)
    assert module.load_state_dict({**without(state, "down_projs"), "more": torch.ones(3)}) == ([], [])
    assert torch.equal(module.gate_and_up_projs, state["gate_and_up_projs"])


class Stranger(nn.Linear):
    """A module of another library, with state of its own."""

    noted: Any = None

    def get_extra_state(self) -> Any:
        return {"scale": 2.0}

    def set_extra_state(self, state: Any) -> None:
        self.noted = state


def test_module_with_a_strangers_module_inside_loads_it_and_leaves_it_when_it_does_not_fit() -> None:
    module, other = drawn("MoE"), drawn("MoE", seed=1)
    module.shared_experts, other.shared_experts = Stranger(8, 8), Stranger(8, 8)
    state, before = other.state_dict(), snapshot(module.experts)
    own = module.shared_experts.weight.detach().clone()
    with pytest.raises(StateDictError, match=r"size mismatch for shared_experts\.bias"):
        module.load_state_dict({**state, "shared_experts.bias": torch.ones(3)})
    assert torch.equal(module.shared_experts.weight, own) and module.shared_experts.noted is None
    assert_unchanged(module.experts, before)
    module.load_state_dict(state)
    assert torch.equal(module.shared_experts.weight, state["shared_experts.weight"])
    assert module.shared_experts.noted == {"scale": 2.0}


def test_correction_bias_loads_with_the_rest_and_by_load_state() -> None:
    gate = drawn("Gate")
    gate.load_state_dict(drawn("Gate", seed=1).state_dict())
    load_state(gate, {"e_score_correction_bias": torch.arange(4.0)})
    assert gate.e_score_correction_bias.tolist() == [0.0, 1.0, 2.0, 3.0]


# -------------------------------------------------------------------------------------------------------------- sharded
def _sharded() -> dict[str, Any]:
    """On each of two ranks: loading between plain and sharded modules, and what is refused."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, rank = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), dist.get_rank()
    whole, found = drawn("GroupedExperts", seed=1).state_dict(), {}
    own = slice(2 * rank, 2 * rank + 2)

    def holds(module: nn.Module) -> bool:
        return all(torch.equal(value.to_local(), whole[name][own]) for name, value in module.named_parameters())

    module = shard_experts(drawn("GroupedExperts"), mesh)
    found["reported"] = tuple(module.load_state_dict(whole))
    found["plain into sharded"] = holds(module)
    plain = drawn("GroupedExpertsDeepEP")
    plain.load_state_dict(module.state_dict())
    found["sharded into plain"] = all(torch.equal(value, whole[name]) for name, value in plain.named_parameters())
    plain.load_state_dict(module.state_dict(), assign=True)
    found["assigned as it is"] = type(plain.down_projs).__name__, holds(plain)

    copies = {name: distribute_tensor(value, mesh, [Replicate()]) for name, value in whole.items()}
    module = shard_experts(drawn("GroupedExperts"), mesh)
    module.load_state_dict(copies)
    found["replicated into sharded"] = holds(module)

    bare = shard_experts(GroupedExperts(CONFIG, LOOP, device="meta"), mesh)
    bare.load_state_dict(whole, assign=True)
    found["assigned on meta"] = holds(bare) and bare.down_projs.to_local().shape == (2, 6, 8)
    bare = shard_experts(GroupedExperts(CONFIG, LOOP, device="meta"), mesh).to_empty(device="cpu")
    bare.load_state_dict(whole)
    found["emptied on meta"] = holds(bare)

    before = {name: value.to_local().clone() for name, value in module.named_parameters()}
    other = drawn("GroupedExperts", seed=2).state_dict()
    try:
        module.load_state_dict({**other, "down_proj_bias": other["down_proj_bias"][own]})
    except StateDictError as error:
        found["refused"] = error.found
    found["kept"] = all(torch.equal(value.to_local(), before[name]) for name, value in module.named_parameters())

    layers = nn.ModuleDict({"moe": MoE(CONFIG, LOOP)})
    shard_experts(layers["moe"].experts, mesh)
    state = nn.ModuleDict({"moe": drawn("MoE", seed=1)}).state_dict()
    layers.load_state_dict(state)
    down = layers["moe"].experts.down_projs.to_local()
    found["in a model"] = torch.equal(down, state["moe.experts.down_projs"][own])
    return found


@cache
def _facts() -> list[dict[str, Any]]:
    return ranks.run(_sharded, 2)


FORMS = (
    "plain into sharded",
    "sharded into plain",
    "replicated into sharded",
    "assigned on meta",
    "emptied on meta",
    "in a model",
)


@pytest.mark.parametrize("form", FORMS)
def test_load_state_dict_over_ranks_leaves_each_rank_its_part(form: str) -> None:
    assert [facts[form] for facts in _facts()] == [True, True]
    assert [facts["reported"] for facts in _facts()] == [([], [])] * 2


def test_load_state_dict_that_assigns_to_a_plain_module_takes_dtensors_as_they_are() -> None:
    assert [facts["assigned as it is"] for facts in _facts()] == [("DTensor", True)] * 2


def test_load_state_dict_of_one_ranks_part_is_refused_and_changes_nothing() -> None:
    said = "size mismatch for down_proj_bias: shape [2, 8] in the state dict, [4, 8] in the module"
    assert [(facts["refused"], facts["kept"]) for facts in _facts()] == [(said, True)] * 2
