"""Sharded experts in a model: what they hold, checkpoints over changing numbers of ranks, FSDP, and refusals."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn

from moebius.core import ConfigError, MoEConfig, MoEError, ShapeError, Unsupported
from moebius.core.errors import StateDictError
from moebius.torch_frontend import MoE, load_parameters
from moebius.torch_frontend.grouped_experts import GroupedExperts
from moebius.torch_frontend.sharding import ep_dimension, held, local, matching, mesh_of, shard_experts

CONFIG = MoEConfig(n_routed_experts=8, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32", expert_bias=True)


def _experts(seed: int = 0) -> GroupedExperts:
    """The same values in every process; biases are no zeros."""
    torch.manual_seed(seed)
    module = GroupedExperts(CONFIG)
    module.init_weights(init_std=0.4)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn(value.shape) * 0.1)
    return module


def _tokens(rank: int, n: int = 3) -> tuple[torch.Tensor, ...]:
    """x, token_mask, weights and indices of one rank."""
    generator = torch.Generator().manual_seed(rank)
    x, weights = torch.randn(n, 8, generator=generator), torch.rand(n, 2, generator=generator)
    return x, torch.ones(n, dtype=torch.bool), weights, torch.randint(0, 8, (n, 2), generator=generator)


def _mesh(*sizes: int, names: tuple[str, ...] | None = ("ep",)) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _said(function: Any, *args: Any) -> tuple[str, str]:
    """Name and words of the error that `function` raises."""
    try:
        function(*args)
    except MoEError as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


# ---------------------------------------------------------------------------------------------------- sharding, 4 ranks
def _sharded() -> dict[str, Any]:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh, found = _mesh(2, 2, names=("ep_shard", "ep")), {}
    ep, rank = mesh["ep"], dist.get_rank()

    module, whole = _experts(), _experts()
    module.down_projs.requires_grad_(False)
    module.eval()
    module.gate_and_up_projs.grad = whole.gate_and_up_projs.detach() + 1
    found["same module"] = shard_experts(module, mesh) is module and not module.training
    values = dict(module.named_parameters())
    found["kinds"] = {
        (type(value) is DTensor, value.placements == (Shard(0),), value.device_mesh == ep) for value in values.values()
    }
    found["requires_grad"] = {name: value.requires_grad for name, value in values.items()}
    own = slice(4 * ep.get_local_rank(), 4 * ep.get_local_rank() + 4)
    kept = {name: torch.equal(local(value), getattr(whole, name)[own]) for name, value in values.items()}
    kept["grad"] = torch.equal(values["gate_and_up_projs"].grad.to_local(), whole.gate_and_up_projs[own] + 1)
    found["kept"] = kept
    found["memory"] = {local(value).untyped_storage().nbytes() == local(value).nbytes for value in values.values()}
    plain = dict(whole.named_parameters())
    found["mesh"] = mesh_of(values) == ep, mesh_of(plain), local(whole.down_projs) is whole.down_projs

    # Meta: sharded before there is memory, filled after.
    bare = shard_experts(GroupedExperts(CONFIG, device="meta"), ep).to_empty(device="cpu")
    bare.init_weights(init_std=0.4)
    found["meta"] = {name: tuple(local(value).shape) for name, value in bare.named_parameters()}
    bare.load_state_dict(whole.state_dict())
    found["meta loaded"] = torch.equal(local(bare.down_projs), whole.down_projs[own])

    # Nothing is sent: a rank takes its part of what it was given itself.
    given = whole.down_projs.detach() + rank
    found["given here"] = torch.equal(matching(bare.down_projs, given).to_local(), given[own])

    numbers = {name: value.detach().numpy() + 2 for name, value in whole.named_parameters()}
    load_parameters(bare, numbers)
    found["numbers"] = torch.equal(local(bare.down_projs), whole.down_projs[own] + 2)

    # Placed otherwise: Shard(1) over "ep_shard" into Shard(0) over "ep".
    other = distribute_tensor(whole.down_projs.detach() * 2, mesh["ep_shard"], [Shard(1)])
    found["placed otherwise"] = torch.equal(matching(bare.down_projs, other).to_local(), whole.down_projs[own] * 2)

    # Replicated over the ranks: each computes its own tokens with all experts.
    for name, value in whole.named_parameters():
        setattr(whole, name, nn.Parameter(distribute_tensor(value.detach(), ep, [Replicate()])))
    x, *rest = _tokens(rank)
    whole(x, *rest).sum().backward()
    found["replicated"] = {name: value.grad.full_tensor() for name, value in whole.named_parameters()}

    wrong = {
        "unnamed": (ep_dimension, _mesh(2, 2, names=None)),
        "no ep": (shard_experts, _experts(), _mesh(2, 2, names=("dp", "tp"))),
        "twice": (shard_experts, module, mesh),
        "Shard(1)": (mesh_of, {"down_projs": distribute_tensor(torch.ones(8, 6, 8), ep, [Shard(1)])}),
        "two dimensions": (mesh_of, {"down_projs": distribute_tensor(torch.ones(8, 6), mesh, [Shard(1), Shard(0)])}),
        "some": (mesh_of, {**values, "down_projs": torch.ones(8, 6, 8)}),
        "shape": (matching, values["down_projs"], torch.ones(4, 6, 8)),
        "state dict": (module.load_state_dict, {n: torch.ones(4, *v.shape[1:]) for n, v in values.items()}),
    }
    found["errors"] = {name: _said(*call) for name, call in wrong.items()}
    three = GroupedExperts(MoEConfig(n_routed_experts=6, n_activated_experts=2, dim=8, moe_inter_dim=6))
    found["errors"]["6 over 4"] = _said(shard_experts, three, _mesh(4))
    found["untouched"] = type(three.down_projs) is nn.Parameter
    return found


@cache
def _facts() -> list[dict[str, Any]]:
    return ranks.run(_sharded, 4)


def test_shard_experts_keeps_each_ranks_values_and_all_that_the_module_holds() -> None:
    names = ["gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"]
    for facts in _facts():
        assert facts["same module"] and facts["kinds"] == {(True, True, True)}
        assert facts["requires_grad"] == {name: name != "down_projs" for name in names}
        assert facts["kept"] == dict.fromkeys([*names, "grad"], True)


def test_shard_experts_gives_the_memory_of_the_other_experts_back() -> None:
    assert [facts["memory"] for facts in _facts()] == [{True}] * 4


def test_mesh_of_and_local_of_plain_parameters_change_nothing() -> None:
    assert [facts["mesh"] for facts in _facts()] == [(True, None, True)] * 4


def test_shard_experts_on_meta_then_to_empty_is_drawn_and_loaded() -> None:
    for facts in _facts():
        assert facts["meta"]["down_projs"] == (4, 6, 8) and facts["meta loaded"]


def test_matching_of_a_plain_tensor_is_this_ranks_part_of_what_it_was_given() -> None:
    assert [facts["given here"] for facts in _facts()] == [True] * 4


def test_load_parameters_of_all_experts_leaves_each_rank_its_part() -> None:
    assert [facts["numbers"] for facts in _facts()] == [True] * 4


def test_matching_of_a_tensor_that_is_placed_otherwise_is_this_ranks_part() -> None:
    assert [facts["placed otherwise"] for facts in _facts()] == [True] * 4


def test_experts_replicated_over_ranks_sum_their_gradients() -> None:
    for rank, facts in enumerate(_facts()):
        module = _experts()
        first = rank - rank % 2  # of the two ranks that share an "ep" dimension
        sum(module(*_tokens(r)).sum() for r in (first, first + 1)).backward()
        for name, value in module.named_parameters():
            torch.testing.assert_close(facts["replicated"][name], value.grad, msg=name)


@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("unnamed", ConfigError, "found: 2 dimensions without names"),
        ("no ep", ConfigError, "found: 2 dimensions named dp, tp"),
        ("6 over 4", ConfigError, "asked: 6 experts over 4 ranks\nfound: 2 left over"),
        ("twice", Unsupported, "asked: gate_and_up_projs to be sharded\nfound: a DTensor already"),
        ("Shard(1)", Unsupported, "asked: down_projs placed by Shard(0) or Replicate()\nfound: S"),
        ("two dimensions", Unsupported, "found: a mesh of 2 dimensions ('ep_shard', 'ep')\ndo: call the module"),
        ("some", Unsupported, "down_projs: not sharded"),
        ("shape", ShapeError, "asked: a tensor of shape [8, 6, 8]\nfound: shape [4, 6, 8]"),
        ("state dict", StateDictError, "size mismatch for down_projs"),
    ],
)
def test_experts_that_cannot_be_sharded_or_computed_so_are_refused(name: str, kind: type, words: str) -> None:
    for facts in _facts():
        found, text = facts["errors"][name]
        assert found == kind.__name__ and words in text, text
        assert facts["untouched"]


def test_held_over_ranks_that_divide_the_experts_is_their_share() -> None:
    assert (held(8, 1), held(8, 4)) == (8, 2)
    with pytest.raises(ConfigError, match="use a number of ranks that divides"):
        held(8, 3)


# --------------------------------------------------------------------------------------------------------- state dicts
def _saved(folder: str) -> dict[str, Any]:
    """On each of 2 ranks: a state dict there and back, and a checkpoint into `folder`."""
    mesh, found = _mesh(2), {}
    state = shard_experts(_experts(), mesh).state_dict()
    found["placements"] = {name: str(value.placements) for name, value in state.items()}
    found["full"] = {name: value.full_tensor() for name, value in state.items()}
    checkpoint.save({"experts": state}, checkpoint_id=folder)

    module, other = shard_experts(_experts(), mesh), _experts(seed=1).state_dict()
    before = dict(other)
    module.load_state_dict(other)
    found["callers dict kept"] = all(other[name] is value for name, value in before.items())
    found["loaded"] = {name: value.full_tensor() for name, value in module.named_parameters()}
    mixed = {name: found["full"][name] if "bias" in name else value for name, value in state.items()}
    module.load_state_dict(mixed)
    found["mixed"] = {name: value.full_tensor() for name, value in module.named_parameters()}

    plain = _experts(seed=1)
    with torch.no_grad():
        for name, value in plain.named_parameters():
            value.copy_(matching(value, state[name]))
    found["back"] = {name: value.detach() for name, value in plain.named_parameters()}
    return found


def _loaded(folder: str) -> dict[str, torch.Tensor]:
    """From `folder` into an experts module over all ranks there are."""
    module = shard_experts(_experts(seed=1), _mesh(dist.get_world_size()))
    state = {"experts": module.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    module.load_state_dict(state["experts"])
    return {name: value.full_tensor() for name, value in module.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[str, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    return folder, ranks.run(_saved, 2, folder)


def _assert_same(found: dict[str, torch.Tensor], seed: int = 0) -> None:
    for name, value in _experts(seed).named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=0)


def test_state_dict_of_sharded_experts_is_sharded_and_whole_when_gathered(saved) -> None:
    for facts in saved[1]:
        assert set(facts["placements"].values()) == {"(Shard(dim=0),)"} and len(facts["placements"]) == 4
        _assert_same(facts["full"])


def test_state_dict_of_plain_experts_loads_into_sharded_ones_and_back(saved) -> None:
    for facts in saved[1]:
        _assert_same(facts["loaded"], seed=1)
        _assert_same(facts["mixed"])
        _assert_same(facts["back"])
        assert facts["callers dict kept"]


@pytest.mark.parametrize("n", [1, 4])
def test_checkpoint_of_two_ranks_loads_on_another_number_of_ranks(saved, n: int) -> None:
    for values in ranks.run(_loaded, n, saved[0]):
        _assert_same(values)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_checkpoint_of_two_ranks_loads_without_torch_distributed(saved) -> None:
    module = _experts(seed=1)
    state = {"experts": module.state_dict()}
    checkpoint.load(state, checkpoint_id=saved[0], no_dist=True)
    _assert_same(state["experts"])


# ---------------------------------------------------------------------------------------------------------------- FSDP
class Model(nn.Module):
    """A dense layer and an MoE layer, drawn alike in every process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(8, 8)
        self.moe = MoE(CONFIG)
        self.moe.experts.load_state_dict(_experts().state_dict())
        nn.init.normal_(self.moe.gate.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dense(x)
        return x + self.moe(x)


def _trained(model: nn.Module, batches: list[list[torch.Tensor]], ep: int = 1) -> dict[str, torch.Tensor]:
    """Parameters after one step of SGD a batch; the loss is the mean over a batch's parts, each of one rank.

    FSDP averages gradients over the ranks between which it shards. Those of the experts are sums over the `ep` ranks
    that share them, which makes the mean over all ranks of them too.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parts in batches:
        torch.stack([(model(x) ** 2).sum() for x in parts]).mean().backward()
        for value in model.moe.experts.parameters():
            value.grad /= ep
        optimizer.step()
        optimizer.zero_grad()
    return {name: getattr(v, "full_tensor", lambda v=v: v)().detach() for name, v in model.named_parameters()}


def _batches(n: int) -> list[list[torch.Tensor]]:
    """Two batches for `n` ranks; one rank has no token at all."""
    return [[_tokens(10 * batch + rank, (4, 0, 3, 1)[rank])[0] for rank in range(n)] for batch in range(2)]


def _with_fsdp(n: int, ep: int) -> dict[str, torch.Tensor]:
    """This rank's share of training on `n` ranks: experts over `ep` of them, everything over the rest by FSDP."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    model, mesh = Model(), _mesh(n // ep, ep, names=("ep_shard", "ep"))
    experts, ignored = model.moe.experts, set()
    if ep > 1:
        shard_experts(experts, mesh["ep"])
    if 1 < ep < n:
        fully_shard(experts, mesh=mesh["ep_shard"], shard_placement_fn=lambda value: Shard(1))
        assert experts.down_projs.placements == (Shard(1), Shard(0))
    elif ep > 1:
        ignored = set(experts.parameters())
    fully_shard(model.moe, mesh=_mesh(n), ignored_params=ignored)
    fully_shard(model, mesh=_mesh(n), ignored_params=ignored)
    own = [[parts[dist.get_rank()]] for parts in _batches(n)]
    return _trained(model, own, ep)


@pytest.mark.parametrize("n, ep", [(2, 1), (2, 2), (4, 2)], ids=["fsdp", "ep", "fsdp_and_ep"])
def test_training_sharded_equals_training_on_one_rank(n: int, ep: int) -> None:
    wanted, start = _trained(Model(), _batches(n)), dict(Model().named_parameters())
    for found in ranks.run(_with_fsdp, n, n, ep):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            moved = value - start[name].detach()
            error = (found[name] - value).norm() / moved.norm()
            assert moved.norm() > 0 and error < 1e-5, f"{name}: {error}"
