"""Activation checkpointing runs the gate twice: what it records, and what it trains on, is that of one pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moebius.core import MoEConfig, RoutingError
from moebius.torch_frontend import Gate, MoE
from moebius.torch_frontend.recompute import once, recomputing
from moebius.torch_frontend.replay import collect, record, replay

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 4, "dtype": "float32"}
BALANCED = MoEConfig(
    **SIZES,
    score_func="sigmoid",
    norm_topk_prob=True,
    gate_bias_update_factor=0.1,
    aux_loss_coeff=0.2,
    z_loss_coeff=0.1,
    seq_aux_loss_coeff=0.3,
    enable_routing_replay=True,
)
STATISTICS = ("last_load", "last_aux_loss", "last_z_loss", "last_seq_aux_loss", "cumulative_load")


def selective():
    """Keeps matrix products and sorts, recomputes the rest."""
    kept = [torch.ops.aten.mm.default, torch.ops.aten.sort.stable]

    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


KINDS = {
    "reentrant": {"use_reentrant": True},
    "not_reentrant": {"use_reentrant": False},
    "no_early_stop": {"use_reentrant": False, "early_stop": False},
    "selective": {"use_reentrant": False, "context_fn": selective},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def layer():
    torch.manual_seed(0)
    made = MoE(BALANCED)
    torch.nn.init.normal_(made.gate.weight, std=0.5)
    return made


def inputs(seed=0):
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def trained(run, layer, microbatches=2):
    """(every gradient, every statistic) after some micro-batches forward, then all of them backward, last first."""
    batches = [inputs(seed) for seed in range(microbatches)]
    outputs = [run(x) for x in batches]
    for y in reversed(outputs):
        y.square().sum().backward()
    gradients = [value.grad for value in layer.parameters()] + [x.grad for x in batches]
    return gradients, [getattr(layer.gate, name) for name in STATISTICS]


@kinds
def test_moe_in_a_checkpoint_has_the_gradients_and_the_load_of_one_pass(kind) -> None:
    plain, kept = layer(), layer()
    wanted, recorded = trained(plain, plain)
    found, again = trained(lambda x: checkpoint(kept, x, **kind), kept)
    for gradient, due in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, due, rtol=1e-6, atol=1e-7)
    assert kept.gate.cumulative_load.sum() == 2 * 10 * 2
    assert torch.equal(again[-1], recorded[-1])


@kinds
def test_moe_in_a_checkpoint_in_a_checkpoint_counts_once(kind) -> None:
    made = layer()
    outer = lambda x: checkpoint(lambda x: checkpoint(made, x, **kind), x, use_reentrant=False)  # noqa: E731
    outer(inputs()).sum().backward()
    assert made.gate.cumulative_load.sum() == 20


@kinds
def test_gate_after_a_checkpointed_step_updates_its_bias_like_one_that_ran_once(kind) -> None:
    plain, kept = layer(), layer()
    trained(plain, plain)
    trained(lambda x: checkpoint(kept, x, **kind), kept)
    plain.gate.update_bias(), kept.gate.update_bias()
    assert torch.equal(plain.gate.e_score_correction_bias, kept.gate.e_score_correction_bias)
    assert plain.gate.e_score_correction_bias.any()


@kinds
def test_record_of_a_checkpointed_pass_keeps_what_the_first_pass_chose(kind) -> None:
    made = layer()
    with record(made):
        y = checkpoint(made, inputs(), **kind)
        first = collect(made)[0]
        y.sum().backward()
    assert collect(made)[0] is first


@kinds
def test_replay_of_a_checkpointed_pass_has_the_gradients_of_one_without(kind) -> None:
    ids = torch.tensor([[7, 0]]).repeat(10, 1)
    gradients = []
    for run in (lambda made, x: made(x), lambda made, x: checkpoint(made, x, **kind)):
        made = layer()
        with replay(made, [ids]):
            run(made, inputs()).square().sum().backward()
        gradients.append([value.grad for value in made.parameters()])
        assert made.experts.down_projs.grad[[0, 7]].any() and not made.experts.down_projs.grad[1:7].any()
    for found, due in zip(*gradients, strict=True):
        torch.testing.assert_close(found, due, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [KINDS["reentrant"], KINDS["not_reentrant"]], ids=["reentrant", "not_reentrant"])
def test_replay_that_ended_before_a_checkpointed_backward_says_so(kind) -> None:
    """The recomputation would choose other experts than the pass whose output the loss was taken of."""
    made = layer()
    with replay(made, [torch.tensor([[7, 0]]).repeat(10, 1)]):
        y = checkpoint(made, inputs(), **kind)
    with pytest.raises(RoutingError, match=r"asked: a replayed pass, recomputed in backward\nfound: .+\ndo: run back"):
        y.sum().backward()
    made(inputs()).sum().backward()  # a new pass is its own


def test_recomputing_tells_a_pass_inside_of_backward() -> None:
    seen = []

    def look(x):
        seen.append(recomputing())
        return x.sin()

    checkpoint(look, inputs(), use_reentrant=False).sum().backward()
    look(inputs())
    assert seen == [False, True, False]


# torch warns of itself when it compiles an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_gate_compiled_and_then_checkpointed_counts_once() -> None:
    torch.compiler.reset()
    gate = Gate(MoEConfig(**SIZES, score_func="sigmoid", gate_bias_update_factor=0.1, aux_loss_coeff=0.1))
    run, mask = torch.compile(gate, backend="aot_eager", fullgraph=True), torch.ones(10, dtype=torch.bool)
    x = torch.randn(10, 16, requires_grad=True)
    for use_reentrant in (True, False):
        weights, *_ = checkpoint(run, x, mask, use_reentrant=use_reentrant)
        weights.sum().backward()
    assert gate.cumulative_load.sum() == 2 * 10 * 2


def test_once_is_an_operator_that_torch_accepts() -> None:
    torch.library.opcheck(torch.ops.moebius.once.default, (torch.arange(4, dtype=torch.int32),))
    counts = torch.arange(4)
    found = once(counts)
    assert torch.equal(found, counts) and found.data_ptr() != counts.data_ptr()
