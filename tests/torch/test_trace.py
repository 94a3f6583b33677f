"""What is PyTorch's own about a trace: what it leaves behind, and what it holds in memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.core import MoEConfig
from moebius.core.stages import untapped
from moebius.torch_frontend import MoE, trace
from moebius.torch_frontend.trace import tapped

SIZES = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 8}
FULL = MoEConfig(
    **SIZES,
    dtype="float32",
    score_func="sigmoid",
    gate_bias_update_factor=0.1,
    aux_loss_coeff=0.1,
    expert_bias=True,
    n_shared_experts=1,
    moe_latent_size=10,
)


def layer(config: MoEConfig = FULL) -> MoE:
    torch.manual_seed(0)
    made = MoE(config)
    made.init_weights(init_std=0.3)
    return made


def inputs(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_trace_has_the_bits_of_a_pass_and_of_its_gradients(dtype, backward: bool) -> None:
    module, (x, dy) = layer(), inputs(dtype)
    found = trace(module, x, dy if backward else None)
    own = x.clone().requires_grad_()
    y = module(own)
    y.backward(dy)
    wanted = {"output": y}
    if backward:
        wanted |= {"grad.x": own.grad} | {f"grad.{name}": value.grad for name, value in module.named_parameters()}
    for name, value in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), value.detach().view(torch.uint8)), name
    assert not any(value.requires_grad for value in found.values())


def test_trace_leaves_no_gradient_no_load_no_tap_and_the_input_alone() -> None:
    module, (x, dy) = layer(), inputs()
    module(x)
    module.experts.down_projs.grad = torch.ones_like(module.experts.down_projs)
    gate = module.gate
    before = [gate.last_load, gate.last_aux_loss, gate.cumulative_load]
    values = [value.clone() for value in before]
    trace(module, x, dy)
    assert all(a is b for a, b in zip([gate.last_load, gate.last_aux_loss, gate.cumulative_load], before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
    assert {name for name, value in module.named_parameters() if value.grad is not None} == {"experts.down_projs"}
    assert (module.experts.down_projs.grad == 1).all()
    assert module.tap is module.gate.tap is module.experts.tap is untapped
    assert not x.requires_grad


def test_trace_that_fails_puts_tap_and_load_back(monkeypatch) -> None:
    module, (x, dy) = layer(), inputs()
    monkeypatch.setattr(module, "_shared", lambda x_TD: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(module, x, dy)
    assert module.tap is module.gate.tap is module.experts.tap is untapped
    assert module.gate.last_load is None


def test_trace_of_frozen_parameters_has_no_entry_for_them() -> None:
    module, (x, dy) = layer(), inputs()
    whole = trace(module, x, dy)
    module.requires_grad_(False)
    module.experts.down_projs.requires_grad_(True)
    found = trace(module, x, dy)
    frozen = {f"grad.{name}" for name, _ in module.named_parameters()} - {"grad.experts.down_projs"}
    assert whole.keys() - found.keys() == frozen
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def test_trace_under_no_grad_has_every_gradient() -> None:
    module, (x, dy) = layer(), inputs()
    with torch.no_grad():
        found = trace(module, x, dy)
    assert torch.equal(found["grad.up"], trace(module, x, dy)["grad.up"])


def test_trace_makes_one_array_the_size_of_a_parameter_its_gradient() -> None:
    module, (x, dy) = layer(MoEConfig(**SIZES, dtype="float32")), inputs()
    made: dict[int, torch.Tensor] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == module.experts.down_projs.shape:
                made[out.untyped_storage().data_ptr()] = out  # held, so that no storage is used twice
            return out

    with Watch():
        found = trace(module, x, dy)
    made.pop(module.experts.down_projs.untyped_storage().data_ptr(), None)
    assert made.keys() == {found["grad.experts.down_projs"].untyped_storage().data_ptr()}


def test_tapped_goes_on_with_what_the_tap_returns() -> None:
    module, (x, _) = layer(), inputs()
    with tapped(module, lambda name, value: value * 0 if name in ("combine", "shared") else value):
        silent = module(x)
    assert torch.equal(silent, module.fc2_latent_proj(torch.zeros(9, 10)))
    assert not torch.equal(module(x), silent)


def test_tap_is_no_part_of_the_state_and_survives_copies() -> None:
    module, (x, _) = layer(), inputs()
    assert not any("tap" in name for name in module.state_dict())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.experts.tap is untapped
        assert torch.equal(copied(x), module(x))
