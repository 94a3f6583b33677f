"""Inside torch.autocast: what computes in its dtype, what keeps its own, and in what dtype gradients come back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from moebius.core import BackendConfig, MoEConfig
from moebius.torch_frontend import Gate, GroupedExperts, GroupedExpertsDeepEP, MoE, linear

D, E, K, T = 16, 4, 2, 9
SHORT = (torch.bfloat16, torch.float16)
Tensors = dict[str, Any]
shorts = pytest.mark.parametrize("short", SHORT, ids=["bfloat16", "float16"])


def config(**changes: Any) -> MoEConfig:
    sizes = {"n_routed_experts": E, "n_activated_experts": K, "dim": D, "moe_inter_dim": 8}
    return MoEConfig(**{**sizes, "dtype": "float32", "expert_bias": True, **changes})


def drawn(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layer


def arguments(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    weights = torch.rand(T, K, generator=generator).requires_grad_()
    ids = torch.randint(-1, E + 1, (T, K), generator=generator)
    return x.requires_grad_(), torch.arange(T) != 2, weights, ids


def autocast(dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> Any:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


def run(layer: Any, given: tuple[torch.Tensor, ...], region: Any = None, backward_inside: bool = False) -> Tensors:
    """Output and every gradient, forward inside of `region`; backward outside of it, as torch advises, or inside."""
    with region or nullcontext():
        y = layer(*given)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        if backward_inside:
            y.backward(dy)
    if not backward_inside:
        y.backward(dy)
    leaves = {str(i): value.grad for i, value in enumerate(given) if value.requires_grad}
    return {"y": y.detach(), **leaves, **{name: value.grad for name, value in layer.named_parameters()}}


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.abs().max() > 0 and torch.equal(found[name], value), name


@shorts
@pytest.mark.parametrize("double", [False, True], ids=["lean", "steps"])
@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_experts_under_autocast_compute_in_its_dtype_bit_for_bit(
    backend: str, double: bool, short: torch.dtype
) -> None:
    settings = BackendConfig(experts=backend, double_backward=double)
    wanted = run(drawn(GroupedExperts(config(), settings, dtype=short)), arguments())
    found = run(drawn(GroupedExperts(config(), settings)), arguments(), autocast(short))
    with autocast(short):
        assert found["y"].dtype == short == nn.Linear(D, D)(torch.ones(1, D)).dtype
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", [GroupedExperts, GroupedExpertsDeepEP, MoE])
def test_layer_under_autocast_returns_gradients_in_the_dtypes_of_their_owners(kind: Any) -> None:
    layer, given = drawn(kind(config(n_shared_experts=1))), arguments()
    found = run(layer, given[:1] if kind is MoE else given, autocast())
    assert found.pop("y").dtype == torch.bfloat16
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert all(value.abs().max() > 0 for value in found.values())


@pytest.mark.parametrize("kind", [GroupedExperts, MoE])
def test_backward_inside_autocast_equals_backward_outside(kind: Any) -> None:
    cut = 1 if kind is MoE else 4
    found, wanted = (
        run(drawn(kind(config())), arguments()[:cut], autocast(), backward_inside) for backward_inside in (True, False)
    )
    assert_same(found, wanted)


@pytest.mark.parametrize("double", [False, True], ids=["lean", "steps"])
@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_experts_of_a_dtype_of_their_own_keep_it_under_autocast(backend: str, double: bool) -> None:
    def layer() -> Any:
        return drawn(GroupedExperts(config(), BackendConfig(experts=backend, double_backward=double), dtype="float32"))

    wanted = run(layer(), arguments())
    assert wanted["y"].dtype == torch.float32
    assert_same(run(layer(), arguments(), autocast()), wanted)


@pytest.mark.parametrize("kind", [GroupedExperts, MoE])
def test_layer_in_float64_stays_in_float64_under_autocast_as_torchs_own_do(kind: Any) -> None:
    given = arguments(torch.float64)[: 1 if kind is MoE else 4]
    found = run(drawn(kind(config(dtype="float64"))), given, autocast())
    wanted = run(drawn(kind(config(dtype="float64"))), arguments(torch.float64)[: len(given)])
    with autocast():
        assert nn.Linear(D, D, dtype=torch.float64)(given[0]).dtype == torch.float64 == found["y"].dtype
    assert_same(found, wanted)


def test_layer_in_a_region_that_disables_autocast_computes_in_xs_dtype() -> None:
    layer = drawn(MoE(config()))
    with autocast(), autocast(enabled=False):
        assert layer(arguments()[0]).dtype == torch.float32


def test_experts_in_bfloat16_under_autocast_to_float16_compute_in_float16() -> None:
    layer, given = drawn(GroupedExperts(config(dtype="bfloat16"))), arguments(torch.bfloat16)
    found = run(layer, given, autocast(torch.float16))
    assert found["y"].dtype == torch.float16 and given[0].grad.dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------- the router
def logits(gate: Gate, region: Any = None) -> torch.Tensor:
    """What the gate routes by."""
    seen: list[torch.Tensor] = []

    def record(name: str, value: torch.Tensor) -> torch.Tensor:
        seen.append(value)
        return value

    gate.tap = record
    with region or nullcontext():
        gate(*arguments()[:2])
    return seen[0]


@shorts
def test_gate_follows_autocast_as_a_linear_layer_does(short: torch.dtype) -> None:
    gate, x = drawn(Gate(config(router_bias=True))), arguments()[0]
    with autocast(short):
        wanted = nn.functional.linear(x, gate.weight, gate.bias)
    found = logits(gate, autocast(short))
    assert found.dtype == short and torch.equal(found, wanted)


@shorts
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_gate_of_a_precision_of_its_own_keeps_it_under_autocast(precision: str, short: torch.dtype) -> None:
    gate = drawn(Gate(config(router_bias=True), precision))
    found, wanted = logits(gate, autocast(short)), logits(gate)
    assert found.dtype == getattr(torch, precision) and torch.equal(found, wanted)


def test_gate_of_a_precision_of_its_own_has_the_same_gradient_under_autocast() -> None:
    grads = []
    for region in (autocast(), nullcontext()):
        gate = drawn(Gate(config(softmax_before_topk=True), "float32"))
        with region:
            weights, _, _ = gate(*arguments()[:2])
        weights.square().sum().backward()
        grads.append(gate.weight.grad)
    assert grads[0].abs().max() > 0 and torch.equal(*grads)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_computes_in_xs_dtype_under_autocast_when_told_to(bias: bool) -> None:
    weight, x = torch.randn(5, D, dtype=torch.float64), torch.randn(3, D)
    offset = torch.randn(5) if bias else None
    wanted = linear(x, weight, offset)
    with autocast():
        told, free = linear(x, weight, offset, autocast=False), linear(x, weight, offset)
    assert told.dtype == torch.float32 and torch.equal(told, wanted) and free.dtype == torch.bfloat16
