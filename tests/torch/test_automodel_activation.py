"""The documented activations: each formula and its gradients, the one rounding, shapes, and the selector."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moebius.core import ACTIVATIONS, ConfigError, DTypeError, MoEConfig, ShapeError, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within
from moebius.torch_frontend import automodel

# Name -> the function with its settings, and the row of core that it is.
CASES = {
    "swiglu": (automodel.weighted_bias_swiglu_impl, ACTIVATIONS["swiglu"]),
    "geglu": (automodel.weighted_bias_geglu_impl, ACTIVATIONS["geglu"]),
    "relu2": (automodel.relu2_deepep, ACTIVATIONS["relu2"]),
    "clamped": (
        partial(automodel.swiglu_clamped_deepep, limit=0.5),
        replace(ACTIVATIONS["swiglu_clamped"], limit=0.5),
    ),
    "oai": (
        partial(automodel.swiglu_oai_deepep, alpha=1.3, limit=1.0),
        replace(ACTIVATIONS["swigluoai"], alpha=1.3, limit=1.0),
    ),
    "oai_unclamped": (partial(automodel.swiglu_oai_deepep, limit=0.0), replace(ACTIVATIONS["swigluoai"], limit=None)),
    "quick": (
        partial(automodel.quick_geglu_deepep, alpha=1.3, limit=1.0, linear_offset=0.25),
        replace(ACTIVATIONS["quick_geglu"], alpha=1.3, limit=1.0, up_offset=0.25),
    ),
    "quick_defaults": (automodel.quick_geglu_deepep, ACTIVATIONS["quick_geglu"]),
    "oai_defaults": (automodel.swiglu_oai_deepep, ACTIVATIONS["swigluoai"]),
}
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def width(case: str, inter: int = 16) -> int:
    return CASES[case][1].up_width(inter)


def inputs(case: str, dtype: torch.dtype, rows: int = 24, probs_dtype: torch.dtype | None = None):
    generator = torch.Generator().manual_seed(len(case))
    x = (2 * torch.randn(rows, width(case), generator=generator, dtype=torch.float64)).to(dtype)
    probs = torch.rand(rows, 1, generator=generator, dtype=torch.float64).to(probs_dtype or dtype)
    return x.requires_grad_(), probs.requires_grad_()


# ------------------------------------------------------------------------------------------------------- the formulas
@cases
@dtypes
def test_activations_and_their_gradients_agree_with_reference(case: str, dtype: torch.dtype) -> None:
    function, row = CASES[case]
    # The weights' gradient is a sum in float32; from weights of float32 it comes back unrounded, as the bound has it.
    x, probs = inputs(case, dtype, probs_dtype=torch.promote_types(dtype, torch.float32))
    dact = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    exact_in = [t.detach().double().numpy() for t in (x, probs[:, 0], dact)]

    def run(arithmetic):
        dx, dprobs = reference.activate_vjp(*exact_in[:2], row, exact_in[2], arithmetic)
        return {"y": reference.activate(*exact_in[:2], row, arithmetic), "dx": dx, "dprobs": dprobs}

    exact = run(EXACT)
    limits = bounds(run, exact, dtype)
    y = function(x, probs)
    y.backward(dact)
    assert (y.dtype, x.grad.dtype, probs.grad.dtype) == (dtype, dtype, probs.dtype) and probs.grad.shape == (24, 1)
    found = {"y": y, "dx": x.grad, "dprobs": probs.grad[:, 0]}
    for name, value in found.items():
        assert within(value.detach().double().numpy(), exact[name], limits[name]), name


@cases
def test_activations_have_first_and_second_derivatives(case: str) -> None:
    x, probs = inputs(case, torch.float64, rows=3)
    assert torch.autograd.gradcheck(CASES[case][0], (x, probs))
    # At relu2's kink and at a clamp finite differences of the gradient jump; the seeds keep clear of both.
    assert torch.autograd.gradgradcheck(CASES[case][0], (x, probs), atol=1e-4)


def between(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Where `found` is `exact` rounded once to bfloat16, give or take float32's last places before the rounding."""
    slack = 8 * 2.0**-24 * exact.abs()
    low, high = (exact - slack).bfloat16(), (exact + slack).bfloat16()
    return (low <= found) & (found <= high)


@pytest.mark.parametrize("case", ["swiglu", "relu2", "clamped", "oai", "quick"])
@pytest.mark.parametrize("probs_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_in_bfloat16_round_once(case: str, probs_dtype: torch.dtype) -> None:
    function, row = CASES[case]
    x, probs = inputs(case, torch.bfloat16, 200, probs_dtype)
    exact = reference.activate(x.detach().double().numpy(), probs[:, 0].detach().double().numpy(), row)
    assert between(function(x, probs), torch.from_numpy(exact)).all()


def test_rounding_each_operation_in_bfloat16_would_be_seen() -> None:
    x, probs = inputs("swiglu", torch.bfloat16, 200, torch.bfloat16)
    exact = reference.activate(x.detach().double().numpy(), probs[:, 0].detach().double().numpy(), CASES["swiglu"][1])
    gate, up = x.detach().chunk(2, -1)
    assert not between(F.silu(gate) * up * probs.detach(), torch.from_numpy(exact)).all()


@pytest.mark.parametrize("limit", [0.5, 2.0, 7.0])
def test_swiglu_clamped_deepep_is_the_clamped_formula(limit: float) -> None:
    x = 5 * torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    probs = torch.rand(32, 1, generator=torch.Generator().manual_seed(1))
    gate, up = x.double().chunk(2, -1)
    wanted = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * probs.double()
    torch.testing.assert_close(automodel.swiglu_clamped_deepep(x, probs, limit), wanted.float(), rtol=1e-6, atol=1e-6)


def test_swiglu_clamped_deepep_of_values_beyond_the_limit_clamps_them() -> None:
    one = torch.ones(1, 1)
    y = automodel.swiglu_clamped_deepep(torch.tensor([[50.0, 0.5]]), one, limit=1.0)
    assert abs(y.item() - F.silu(torch.tensor(1.0)).item() / 2) < 1e-7
    assert automodel.swiglu_clamped_deepep(torch.tensor([[0.0, -100.0]]), one, limit=1.0).item() == 0.0
    # The gate is not clamped from below: silu(-50) is all but 0, silu(-1) would not be.
    assert 0.0 < automodel.swiglu_clamped_deepep(torch.tensor([[-50.0, -3.0]]), one, limit=1.0).item() < 1e-18


def test_quick_geglu_deepep_reads_even_columns_as_gate_and_swiglu_oai_the_first_half() -> None:
    one, x = torch.ones(1, 1), torch.tensor([[0.5, -2.0, 1.5, 3.0]])
    gate, up = torch.tensor([0.5, 1.5]), torch.tensor([-2.0, 3.0])
    wanted = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    torch.testing.assert_close(automodel.quick_geglu_deepep(x, one)[0], wanted)
    torch.testing.assert_close(automodel.swiglu_oai_deepep(x[:, [0, 2, 1, 3]], one)[0], wanted)


def test_a_limit_of_zero_clamps_to_zero_in_quick_geglu_and_not_at_all_in_swiglu_oai() -> None:
    one, x = torch.ones(1, 1), torch.tensor([[2.0, 3.0]])
    assert automodel.quick_geglu_deepep(x, one, limit=0.0).item() == 0.0
    assert automodel.swiglu_clamped_deepep(x, one, limit=0.0).item() == 0.0
    assert automodel.swiglu_oai_deepep(x, one, limit=-1.0).item() > 7.0


# --------------------------------------------------------------------------------------------------------- the shapes
@cases
@pytest.mark.parametrize("leading", [(2, 3), (2, 1, 3, 2)], ids=str)
def test_activations_of_any_leading_axes_equal_flat_rows(case: str, leading: tuple[int, ...]) -> None:
    function, rows = CASES[case][0], int(np.prod(leading))
    x, probs = (value.detach() for value in inputs(case, torch.float32, rows))
    found = function(x.view(*leading, -1), probs.view(*leading, 1))
    assert torch.equal(found, function(x, probs).view(*leading, 16))
    bent = torch.stack([x, x], -1)[..., 0]
    assert not bent.is_contiguous() and torch.equal(function(bent, probs), function(x, probs))


@cases
def test_activations_of_one_bare_row_take_the_leading_axes_of_the_weights(case: str) -> None:
    function = CASES[case][0]
    x, _ = (value.detach() for value in inputs(case, torch.float32, 1))
    assert torch.equal(function(x[0], torch.ones(1, 1)), function(x, torch.ones(1, 1)))
    assert function(x[0], torch.ones(0, 1)).shape == (0, 16)
    assert function(x[:0], torch.ones(0, 1)).shape == (0, 16)


def test_activations_of_weights_that_broadcast_equal_the_column_written_out() -> None:
    x, probs = (value.detach() for value in inputs("swiglu", torch.bfloat16, 6, torch.float32))
    swiglu = automodel.weighted_bias_swiglu_impl
    half = torch.tensor(0.5)
    assert torch.equal(swiglu(x, half), swiglu(x, torch.full((6, 1), 0.5)))
    assert torch.equal(swiglu(x, half.view(1, 1)), swiglu(x, torch.full((6, 1), 0.5)))
    assert torch.equal(swiglu(x, probs.expand(6, 16)), swiglu(x, probs))


def test_activations_of_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.ones(4, 6)
    with pytest.raises(ShapeError, match=r"found: shape \(3, 1\)"):
        automodel.relu2_deepep(x, torch.ones(3, 1))
    with pytest.raises(ShapeError, match=r"found: shape \(4, 2\)"):
        automodel.weighted_bias_geglu_impl(x, torch.ones(4, 2))
    with pytest.raises(ShapeError, match="gated"):
        automodel.weighted_bias_swiglu_impl(torch.ones(4, 5), torch.ones(4, 1))
    with pytest.raises(DTypeError, match="int64"):
        automodel.relu2_deepep(torch.ones(4, 6, dtype=torch.int64), torch.ones(4, 1))


@pytest.mark.parametrize("function", [automodel.swiglu_clamped_deepep, automodel.quick_geglu_deepep])
def test_activations_of_a_limit_below_zero_are_refused(function) -> None:
    with pytest.raises(ConfigError, match=r"asked: limit=-1"):
        function(torch.ones(1, 2), torch.ones(1, 1), limit=-1.0)


# ------------------------------------------------------------------------------------------------------- the selector
@pytest.mark.parametrize("activation", ["swiglu", "swigluoai", "quick_geglu", "geglu"])
def test_is_gated_activation_of_gated_names_is_true(activation: str) -> None:
    assert automodel.is_gated_activation(activation) is True


@pytest.mark.parametrize("activation", ["relu2", "", "gelu", "swiglu_clamped", None])
def test_is_gated_activation_of_other_names_is_false(activation) -> None:
    assert automodel.is_gated_activation(activation) is False


def config(**settings):
    return MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=4, moe_inter_dim=2, **settings)


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_selector_of_unclamped_swiglu_is_the_function_itself(limit: float) -> None:
    chosen = automodel.get_expert_activation_for_deepep(config(swiglu_limit=limit, activation_limit=3.0))
    assert chosen is automodel.weighted_bias_swiglu_impl


def test_selector_of_names_without_settings_is_the_function_itself() -> None:
    select = automodel.get_expert_activation_for_deepep
    assert select(config(expert_activation="geglu", swiglu_limit=2.0)) is automodel.weighted_bias_geglu_impl
    assert select(config(expert_activation="relu2", swiglu_limit=2.0)) is automodel.relu2_deepep


def test_selector_of_names_with_settings_binds_them() -> None:
    settings = {"activation_alpha": 1.5, "activation_limit": 3.0}
    select = automodel.get_expert_activation_for_deepep
    clamped = select(config(swiglu_limit=7.0, **settings))
    assert (clamped.func, clamped.keywords) == (automodel.swiglu_clamped_deepep, {"limit": 7.0})
    oai = select(config(expert_activation="swigluoai", swiglu_limit=7.0, **settings))
    assert (oai.func, oai.keywords) == (automodel.swiglu_oai_deepep, {"alpha": 1.5, "limit": 3.0})
    quick = select(config(expert_activation="quick_geglu", **settings))
    assert quick.func is automodel.quick_geglu_deepep
    assert quick.keywords == {"alpha": 1.5, "limit": 3.0, "linear_offset": 1.0}


def test_selector_of_zero_limits_hands_them_on() -> None:
    select = automodel.get_expert_activation_for_deepep
    for name in ("swigluoai", "quick_geglu"):
        assert select(config(expert_activation=name, activation_limit=0.0)).keywords["limit"] == 0.0


def test_selector_reads_any_object_with_the_attributes() -> None:
    chosen = automodel.get_expert_activation_for_deepep(SimpleNamespace(expert_activation="swiglu"))
    assert chosen is automodel.weighted_bias_swiglu_impl


def test_selector_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="'gelu'"):
        automodel.get_expert_activation_for_deepep(SimpleNamespace(expert_activation="gelu"))


@pytest.mark.parametrize("case", ["swiglu", "clamped", "quick", "relu2"])
def test_activations_compiled_in_one_graph_equal_eager(case: str) -> None:
    function = CASES[case][0]

    def run(x, probs):
        return function(x, probs)

    torch.compiler.reset()
    results = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x, probs = inputs(case, torch.bfloat16, 5, torch.float32)
        y = call(x, probs)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, probs.grad))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
