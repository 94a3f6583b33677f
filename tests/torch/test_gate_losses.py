"""The router's losses as PyTorch's autograd sees them: gradients of gradients, how they are attached, their scale."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moebius.core import MoEConfig
from moebius.torch_frontend import Gate, MoE, aux_loss, seq_aux_loss, set_aux_loss_scale, z_loss
from moebius.torch_frontend.losses import attach_aux_loss

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 4, "dtype": "float32"}
MASK = torch.tensor([True, True, False, True, True, True])


def logits(seed=0):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def tokens(n=10, dtype=torch.float32):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(0)).to(dtype), torch.ones(n, dtype=torch.bool)


def gradient(gate, **settings):
    """The weight's gradient where nothing but the losses has one."""
    gate.zero_grad()
    (gate(*tokens(), **settings)[0] * 0).sum().backward()
    return gate.weight.grad


LOSSES = {
    "z": lambda x: z_loss(x, MASK),
    "seq_softmax": lambda x: seq_aux_loss(x, MASK, MoEConfig(**SIZES), n_sequences=2),
    "seq_sigmoid": lambda x: seq_aux_loss(x, MASK, MoEConfig(**SIZES, score_func="sigmoid"), n_sequences=2),
    "seq_sqrtsoftplus": lambda x: seq_aux_loss(x, MASK, MoEConfig(**SIZES, score_func="sqrtsoftplus")),
    "aux": lambda x: aux_loss(x.softmax(-1), torch.arange(8), MASK, 2),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_pass_gradcheck_and_gradgradcheck(loss) -> None:
    assert torch.autograd.gradcheck(loss, logits()) and torch.autograd.gradgradcheck(loss, logits())


@pytest.mark.parametrize("scale", [1.0, 10.0, torch.tensor(10.0), torch.tensor([10.0])], ids=str)
def test_attach_aux_loss_leaves_the_weights_alone_and_gives_the_loss_the_scale(scale) -> None:
    weights, loss = torch.rand(3, 2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    attached = attach_aux_loss(weights, loss, scale)
    assert torch.equal(attached, weights)
    upstream = torch.rand(3, 2)
    attached.backward(upstream)
    assert torch.equal(weights.grad, upstream)
    assert loss.grad == float(scale) and loss.grad.shape == ()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_attach_aux_loss_of_a_short_loss_in_a_checkpoint_has_its_dtype_and_scale(use_reentrant) -> None:
    weights = torch.rand(3, 2, requires_grad=True)
    loss = torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)
    attached = checkpoint(lambda w, a: attach_aux_loss(w, a * 1, 2.0), weights, loss, use_reentrant=use_reentrant)
    attached.sum().backward()
    assert loss.grad.dtype == torch.bfloat16 and loss.grad == 2.0


def test_gate_losses_are_float32_also_of_short_tokens_and_only_in_training() -> None:
    config = MoEConfig(**{**SIZES, "dtype": "bfloat16"}, aux_loss_coeff=0.1, z_loss_coeff=0.1, seq_aux_loss_coeff=0.1)
    gate = Gate(config)
    _, _, loss = gate(*tokens(dtype=torch.bfloat16))
    found = [loss, gate.last_aux_loss, gate.last_z_loss, gate.last_seq_aux_loss]
    assert all(value.dtype == torch.float32 and value.isfinite() and value > 0 for value in found)
    assert not gate.last_aux_loss.requires_grad
    assert gate.eval()(*tokens(dtype=torch.bfloat16))[2] is None
    assert Gate(MoEConfig(**SIZES))(*tokens())[2] is None


def test_gate_with_other_losses_than_the_auxiliary_returns_none_and_records_no_load() -> None:
    gate = Gate(MoEConfig(**SIZES, z_loss_coeff=0.1, seq_aux_loss_coeff=0.1))
    assert gate(*tokens())[2] is None and gate.last_aux_loss is None and gate.last_load is None
    assert gate.last_z_loss > 0 and gate.last_seq_aux_loss > 0


def test_gate_aux_loss_stays_positive_and_falls_to_balance_by_descent() -> None:
    torch.manual_seed(0)
    gate = Gate(MoEConfig(**SIZES, aux_loss_coeff=1.0, softmax_before_topk=True))
    optimizer, seen = torch.optim.SGD(gate.parameters(), lr=1.0), []
    torch.nn.init.normal_(gate.weight, std=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        weights, _, loss = gate(*tokens(64))
        (weights * 0).sum().backward()
        optimizer.step()
        seen.append(loss.item())
    assert min(seen) > 0.9 and seen[-1] < seen[0] - 0.05


@pytest.mark.parametrize("name", ["aux_loss", "z_loss", "seq_aux_loss"])
def test_gate_gradient_of_a_loss_grows_with_its_coefficient_and_the_scale(name) -> None:
    torch.manual_seed(0)
    gate = Gate(MoEConfig(**SIZES, **{f"{name}_coeff": 0.25}, softmax_before_topk=True))
    other = Gate(MoEConfig(**SIZES, **{f"{name}_coeff": 0.5}, softmax_before_topk=True))
    other.load_state_dict(gate.state_dict())
    plain = gradient(gate, n_sequences=2).clone()
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(other, n_sequences=2), 2 * plain)
    for scale in (8.0, torch.tensor(8.0)):
        set_aux_loss_scale(gate, scale)
        torch.testing.assert_close(gradient(gate, n_sequences=2), 8 * plain)


def test_moe_takes_its_leading_axes_for_sequences() -> None:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**SIZES, seq_aux_loss_coeff=0.1))
    x = torch.randn(2, 3, 5, 16)
    layer(x)
    six = layer.gate.last_seq_aux_loss
    layer.gate(x.reshape(-1, 16), torch.ones(30, dtype=torch.bool), n_sequences=6)
    assert torch.equal(layer.gate.last_seq_aux_loss, six)
    layer(x.reshape(-1, 16))
    assert layer.gate.last_seq_aux_loss != six


# torch warns of itself when it compiles an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_scale_held_in_a_tensor_changes_without_compiling_anew() -> None:
    torch.compiler.reset()
    gate, compiled = Gate(MoEConfig(**SIZES, z_loss_coeff=0.5)), []

    def count(graph, inputs):
        compiled.append(None)
        return graph

    scale = torch.tensor(1.0)
    set_aux_loss_scale(gate, scale)
    run = torch.compile(gate, backend=count, fullgraph=True)

    def found():
        gate.zero_grad()
        (run(*tokens())[0] * 0).sum().backward()
        return gate.weight.grad

    before = found().clone()
    scale.fill_(4.0)
    torch.testing.assert_close(found(), 4 * before)
    assert len(compiled) == 1
