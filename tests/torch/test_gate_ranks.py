"""The gate over two ranks: the correction bias that is theirs together, losses over a context-parallel mesh.

Each rank is a process; one call of them all answers several tests.
"""

from __future__ import annotations

from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist

from moebius.core import ConfigError, MoEConfig, reference
from moebius.torch_frontend import Gate, MoE, set_aux_loss_scale

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 4, "dtype": "float64"}
BALANCED = MoEConfig(**SIZES, score_func="sigmoid", gate_bias_update_factor=0.125)
EVERY_LOSS = {"aux_loss_coeff": 0.5, "z_loss_coeff": 0.25, "seq_aux_loss_coeff": 0.75}
LOSSES = ("last_aux_loss", "last_z_loss", "last_seq_aux_loss")
CASES = {
    "softmax": MoEConfig(**SIZES, **EVERY_LOSS, softmax_before_topk=True),
    "groups_and_bias": MoEConfig(
        **SIZES, **EVERY_LOSS, score_func="sigmoid_with_bias", norm_topk_prob=True, n_expert_groups=4,
        n_limited_groups=2, force_e_score_correction_bias=True,
    ),
}  # fmt: skip
SHAPE = (3, 8, 16)  # sequences, their length, dim


def layer(config, kind=MoE):
    torch.manual_seed(0)
    made = kind(config)
    torch.nn.init.normal_(made.gate.weight if kind is MoE else made.weight, std=0.5)
    return made


def tokens():
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padding = torch.zeros(SHAPE[:2], dtype=torch.bool)
    padding[0, 5:], padding[1], padding[2, 0] = True, True, True  # the second sequence is padding alone
    return x, padding


def half(value, rank):
    """A rank's part of each sequence."""
    return value.chunk(2, dim=1)[rank]


def found(made, x, padding, *, upstream=1.0, **settings):
    """(losses, gradients, load, output) of one training pass; gradients are those of upstream * y and of the losses."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    y = made(x, padding, **settings)
    (upstream * y).sum().backward()
    gradients = {name: value.grad for name, value in made.named_parameters()} | {"x": x.grad}
    return [getattr(made.gate, name) for name in LOSSES], gradients, made.gate.last_load, y.detach()


def mesh(*shape, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


# ------------------------------------------------------------------------------------------ what the ranks do


def split_over_ranks():
    rank, (x, padding) = dist.get_rank(), tokens()
    made, answers = layer(CASES["softmax"]), {}
    for name, config in CASES.items():
        answers[name] = found(layer(config), half(x, rank), half(padding, rank), cp_mesh=mesh(2, names=("cp",)))
    # All of these mean the same ranks.
    for name, ranks_ in {"group": dist.group.WORLD, "two_dimensions": mesh(1, 2, names=("a", "b"))}.items():
        answers[name] = found(made, half(x, rank), half(padding, rank), cp_mesh=ranks_)
    made.cp_mesh = mesh(2)
    answers["attribute"] = found(made, half(x, rank), half(padding, rank))
    set_aux_loss_scale(made, 2.0)
    answers["scaled"] = found(made, half(x, rank), half(padding, rank), upstream=0.0)
    set_aux_loss_scale(made, 1.0)
    made.cp_mesh = None
    answers["alone"] = found(made, half(x, rank), half(padding, rank))
    return answers


def bias_over_ranks():
    from torch.distributed.tensor import DTensor, Replicate, Shard

    rank, (x, _) = dist.get_rank(), tokens()
    x, answers = x.reshape(2, -1, 16)[rank], {}
    mask = torch.ones(len(x), dtype=torch.bool)
    replicated = lambda gate: DTensor.from_local(gate.e_score_correction_bias, mesh(2), [Replicate()])  # noqa: E731

    gate = layer(BALANCED, Gate)
    gate(x, mask)
    answers["load"] = gate.cumulative_load
    for name, group in {"alone": None, "group": dist.group.WORLD, "mesh": mesh(2)}.items():
        gate = layer(BALANCED, Gate)
        gate(x, mask), gate.update_bias(group)
        answers[name] = gate.e_score_correction_bias
    gate = layer(BALANCED, Gate)
    gate.e_score_correction_bias = replicated(gate)
    before = gate(x, mask)
    gate.update_bias()
    answers["dtensor"] = gate.e_score_correction_bias.to_local().clone()
    answers["cleared"] = gate.cumulative_load
    gate(x, mask)
    answers["refused"] = message(lambda: gate.update_bias(dist.group.WORLD))
    gate.update_bias()

    plain = layer(BALANCED, Gate)
    plain.e_score_correction_bias.copy_(torch.arange(8.0) / 8)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    state["e_score_correction_bias"] = state["e_score_correction_bias"].to(torch.bfloat16)
    for assign in (False, True):
        gate.load_state_dict(state, assign=assign)
        kept = gate.e_score_correction_bias
        answers[f"loaded_{assign}"] = kept.to_local(), kept.dtype, type(kept).__name__, state["e_score_correction_bias"]
    answers["routes"] = torch.equal(gate(x, mask)[1], plain(x, mask)[1]), torch.equal(before[1], plain(x, mask)[1])
    gate.to(torch.bfloat16)
    answers["cast"] = gate.weight.dtype, gate.e_score_correction_bias.dtype, gate.e_score_correction_bias.to_local()
    answers["shape"] = message(lambda: gate.load_state_dict({**state, "e_score_correction_bias": torch.zeros(4)}))
    gate.e_score_correction_bias = DTensor.from_local(torch.zeros(4), mesh(2), [Shard(0)])
    answers["sharded"] = message(lambda: gate.load_state_dict(state))
    return answers


def message(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


# ------------------------------------------------------------------------------------------------ what is due


@cache
def split():
    return ranks.run(split_over_ranks, 2)


@cache
def biased():
    return ranks.run(bias_over_ranks, 2)


@pytest.mark.parametrize("name", CASES)
def test_losses_over_a_mesh_are_those_of_one_rank_with_all_tokens(name) -> None:
    wanted, gradients, load, y = found(layer(CASES[name]), *tokens())
    for rank, answer in enumerate(split()):
        torch.testing.assert_close(answer[name][0], wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(answer[name][3], half(y, rank), rtol=1e-12, atol=1e-12)
    assert torch.equal(sum(answer[name][2] for answer in split()), load)
    for key, due in gradients.items():
        parts = [answer[name][1][key] for answer in split()]
        total = torch.cat(parts, dim=1) if key == "x" else sum(parts)
        torch.testing.assert_close(total, due, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["group", "two_dimensions", "attribute"])
def test_losses_over_a_group_a_larger_mesh_and_the_layers_own_mesh_are_the_same(name) -> None:
    for answer in split():
        torch.testing.assert_close(answer[name], answer["softmax"], rtol=1e-12, atol=1e-14)


def test_losses_without_a_mesh_are_each_ranks_own() -> None:
    for rank, answer in enumerate(split()):
        wanted = found(layer(CASES["softmax"]), *(half(value, rank) for value in tokens()))
        torch.testing.assert_close(answer["alone"], wanted)
        assert not torch.isclose(answer["alone"][0][0], answer["softmax"][0][0])


def test_losses_of_ranks_whose_gradients_are_averaged_are_whole_with_a_scale_of_their_number() -> None:
    wanted = found(layer(CASES["softmax"]), *tokens(), upstream=0.0)[1]["gate.weight"]
    parts = [answer["scaled"][1]["gate.weight"] for answer in split()]
    torch.testing.assert_close(sum(parts) / 2, wanted, rtol=1e-10, atol=1e-12)
    assert wanted.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["group", "mesh", "dtensor"])
def test_update_bias_of_all_ranks_takes_the_step_of_their_load_together(name) -> None:
    load = sum(answer["load"] for answer in biased())
    wanted = torch.from_numpy(reference.updated_correction_bias(torch.zeros(8).numpy(), load.numpy(), 0.125))
    for answer in biased():
        torch.testing.assert_close(answer[name].double(), wanted.double(), rtol=0, atol=0)


def test_update_bias_without_a_group_takes_each_ranks_own_step() -> None:
    for answer in biased():
        own = reference.updated_correction_bias(torch.zeros(8).numpy(), answer["load"].numpy(), 0.125)
        assert torch.equal(answer["alone"].double(), torch.from_numpy(own).double())
    assert not torch.equal(biased()[0]["alone"], biased()[1]["alone"])


def test_update_bias_of_a_dtensor_clears_the_load_and_refuses_a_group() -> None:
    for answer in biased():
        assert answer["cleared"] is None
        kind, text = answer["refused"]
        assert kind == ConfigError.__name__ and "a DTensor" in text and "leave the group out" in text


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_correction_bias_of_a_checkpoint_is_loaded_into_a_dtensor_in_float32(assign) -> None:
    for answer in biased():
        value, dtype, kind, stored = answer[f"loaded_{assign}"]
        assert kind == "DTensor" and dtype == torch.float32 and stored.dtype == torch.bfloat16
        assert torch.equal(value, torch.arange(8.0) / 8)


def test_a_gate_with_a_dtensor_routes_by_it_and_keeps_it_in_float32() -> None:
    for answer in biased():
        assert answer["routes"] == (True, False)
        weight, kept, value = answer["cast"]
        assert (weight, kept) == (torch.bfloat16, torch.float32) and torch.equal(value, torch.arange(8.0) / 8)


def test_a_correction_bias_that_a_dtensor_cannot_take_is_refused() -> None:
    for answer in biased():
        kind, text = answer["shape"]
        assert kind == "StateDictError" and "size mismatch for e_score_correction_bias" in text
        assert "[4] in the state dict, [8] in the module" in text
        kind, text = answer["sharded"]
        assert kind == "StateDictError" and "Shard" in text and "do: replicate it" in text
