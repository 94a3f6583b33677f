"""What is PyTorch's own about the gate: precision, state, and what training leaves behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from moebius.core import ConfigError, MoEConfig, MoEWarning
from moebius.torch_frontend import FakeBalancedGate, Gate

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 4}
BALANCED = MoEConfig(**SIZES, score_func="sigmoid", gate_bias_update_factor=0.1, dtype="float32")


def tokens(dtype=torch.float32, n=10):
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize("precision", [None, "float32", torch.float64])
@pytest.mark.parametrize("fp32", [False, True])
def test_gate_returns_weights_in_x_dtype_unless_told_float32(precision, fp32: bool) -> None:
    gate = Gate(MoEConfig(**SIZES, router_weights_fp32=fp32), precision)
    weights, indices, loss = gate(*tokens(torch.bfloat16))
    assert weights.dtype == (torch.float32 if fp32 else torch.bfloat16)
    assert indices.dtype == torch.int32 and loss is None


def test_gate_precision_decides_where_bfloat16_logits_round() -> None:
    config = MoEConfig(**SIZES, router_weights_fp32=True, dtype="float32")
    coarse, fine = Gate(config), Gate(config, "float32")
    fine.load_state_dict(coarse.state_dict())
    x, mask = tokens(torch.bfloat16)
    exact = Gate(config, "float64")
    exact.load_state_dict(coarse.state_dict())
    wanted = exact(x, mask)[0]
    assert (fine(x, mask)[0] - wanted).abs().max() < 1e-6 < (coarse(x, mask)[0] - wanted).abs().max()


def test_gate_correction_bias_stays_float32_when_the_module_is_cast() -> None:
    gate = Gate(BALANCED)
    gate.e_score_correction_bias.fill_(1 + 2**-20)
    gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert (gate.e_score_correction_bias == 1 + 2**-20).all()


def test_gate_correction_bias_loaded_from_a_checkpoint_is_the_one_that_is_updated() -> None:
    gate = Gate(BALANCED)
    x, mask = tokens()
    gate(x, mask)
    gate.update_bias()
    gate.load_state_dict({**gate.state_dict(), "e_score_correction_bias": torch.full((8,), 5.0)})
    gate(x, mask)
    gate.update_bias()
    assert (gate.e_score_correction_bias - 5.0).abs().max() <= 0.1 + 1e-6


def test_gate_accumulates_the_load_in_training_only() -> None:
    gate = Gate(BALANCED)
    x, mask = tokens()
    gate(x, mask), gate(x, mask)
    assert gate.cumulative_load.sum() == 2 * gate.last_load.sum() == 40
    gate.eval()
    gate(x, mask)
    assert gate.cumulative_load.sum() == 40
    gate.update_bias()
    assert gate.cumulative_load is None
    with pytest.raises(ConfigError, match="no load recorded"):
        gate.update_bias()


def test_gate_records_nothing_unless_something_needs_it() -> None:
    gate = Gate(MoEConfig(**SIZES))
    gate(*tokens(torch.bfloat16))
    assert gate.last_load is None
    gate.track_load = True
    gate(*tokens(torch.bfloat16))
    assert gate.last_load.sum() == 20
    with pytest.raises(ConfigError, match="gate_bias_update_factor=0"):
        gate.update_bias()


def test_gate_aux_loss_reaches_the_weight_through_the_routing_weights() -> None:
    config = MoEConfig(**SIZES, aux_loss_coeff=0.5, softmax_before_topk=True, dtype="float32")
    gate = Gate(config)
    x, mask = tokens()
    weights, _, loss = gate(x, mask)
    (weights * 0).sum().backward()
    (wanted,) = torch.autograd.grad(0.5 * gate(x, mask)[2], gate.weight)
    torch.testing.assert_close(gate.weight.grad, wanted)
    assert loss.dtype == torch.float32 and wanted.abs().max() > 0


def test_gate_that_does_not_train_has_a_frozen_weight() -> None:
    gate = Gate(MoEConfig(**SIZES, train_gate=False, dtype="float32"))
    assert not gate.weight.requires_grad
    assert not gate(*tokens())[0].requires_grad


def test_gate_dtype_stores_the_router_apart_from_the_experts() -> None:
    assert Gate(MoEConfig(**SIZES, gate_dtype="float32")).weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_correction_bias_of_a_short_checkpoint_stays_float32_also_when_assigned(dtype) -> None:
    gate = Gate(BALANCED)
    stored = {**gate.state_dict(), "e_score_correction_bias": torch.full((8,), 0.5, dtype=dtype)}
    for assign in (False, True):
        gate.load_state_dict(stored, assign=assign)
        assert gate.e_score_correction_bias.dtype == torch.float32 and (gate.e_score_correction_bias == 0.5).all()
    assert stored["e_score_correction_bias"].dtype == dtype


def test_gate_of_another_size_of_checkpoint_says_so_as_torch_does() -> None:
    gate = Gate(BALANCED)
    with pytest.raises(RuntimeError, match="size mismatch for e_score_correction_bias"):
        gate.load_state_dict({**gate.state_dict(), "e_score_correction_bias": torch.zeros(4)})


def test_gate_says_the_step_of_its_bias_under_the_name_that_callers_of_the_original_ask_for() -> None:
    assert Gate(BALANCED).bias_update_factor == 0.1
    assert Gate(MoEConfig(**SIZES)).bias_update_factor == FakeBalancedGate.bias_update_factor == 0.0


def test_gate_copied_keeps_a_handle_and_a_load_of_its_own() -> None:
    gate = Gate(replace(BALANCED, enable_routing_replay=True))
    other = copy.deepcopy(gate)
    assert other.replay is not gate.replay
    gate(*tokens())
    assert other.cumulative_load is None


def test_gate_of_softmax_with_a_correction_bias_warns_once_and_ignores_it() -> None:
    with pytest.warns(MoEWarning, match="ignores force_e_score_correction_bias") as seen:
        config = MoEConfig(**SIZES, force_e_score_correction_bias=True, dtype="float32")
    assert len(seen) == 1
    gate = Gate(config)
    x, mask = tokens()
    before = gate(x, mask)[1]
    gate.e_score_correction_bias.copy_(torch.arange(8.0))
    assert torch.equal(gate(x, mask)[1], before)


def test_fake_gate_cycles_over_the_experts_it_may_use() -> None:
    weights, indices, _ = FakeBalancedGate(MoEConfig(**SIZES), skip_first_n_experts=3)(*tokens(torch.bfloat16, 4))
    assert indices.tolist() == [[3, 4], [5, 6], [7, 3], [4, 5]]
    assert (weights == 0.5).all() and weights.dtype == torch.bfloat16


def test_fake_gate_with_noise_is_random_but_the_same_for_the_same_tokens() -> None:
    gate = FakeBalancedGate(MoEConfig(**SIZES), skip_first_n_experts=2, noise=0.5)
    x, mask = tokens()
    (weights, indices, _), (again, same, _) = gate(x, mask), gate(x, mask)
    assert torch.equal(weights, again) and torch.equal(indices, same)
    assert not torch.equal(gate(x + 1, mask)[1], indices)
    assert indices.min() >= 2 and (indices[:, 0] != indices[:, 1]).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(10))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_fake_gate_with_noise_takes_a_seed_of_any_tokens(value: float) -> None:
    x, mask = tokens()
    x[0, 0] = value
    weights, indices, _ = FakeBalancedGate(MoEConfig(**SIZES), noise=0.5)(x, mask)
    assert weights.isfinite().all() and indices.max() < 8


def test_fake_gate_draws_in_the_documented_order_from_the_documented_seed() -> None:
    """Weights, popularity, scores; from a million times the sum of the first four numbers."""
    x, mask = tokens()
    weights, indices, _ = FakeBalancedGate(MoEConfig(**SIZES), skip_first_n_experts=2, noise=0.25)(x, mask)
    generator = torch.Generator().manual_seed(int(1e6 * x.flatten()[:4].sum()) & 0x7FFFFFFF)
    random = torch.rand(10, 2, generator=generator)
    popularity = torch.randn(6, generator=generator) * 0.25 * 0.1
    chosen = (torch.rand(10, 6, generator=generator) + popularity).topk(2, dim=-1).indices + 2
    torch.testing.assert_close(weights, 0.75 / 2 + 0.25 * random / random.sum(-1, keepdim=True))
    assert torch.equal(indices.long(), chosen)


def test_fake_gate_that_skips_too_many_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="skip_first_n_experts=7"):
        FakeBalancedGate(MoEConfig(**SIZES), skip_first_n_experts=7)
