"""Every stage and every gradient that a trace shows, of both frontends, against the float64 reference's."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
from sides import Side, rounded

from moebius.core import MoEConfig, layout, reference, stages
from moebius.core.precision import EXACT
from moebius.core.stages import GRADIENT
from moebius.core.tolerance import bounds, within

SIZES = {"n_routed_experts": 8, "n_activated_experts": 3, "dim": 16, "moe_inter_dim": 12}
LAYERS = {
    "swiglu": {"aux_loss_coeff": 0.3},
    "quick_geglu_biases": {
        "expert_activation": "quick_geglu",
        "activation_limit": 0.5,
        "expert_bias": True,
        "router_bias": True,
    },
    "shared_gate_latent": {"n_shared_experts": 2, "shared_expert_gate": True, "moe_latent_size": 10},
    "weight_after_down": {"apply_router_weight_after_down": True, "expert_bias": True},
    "relu2": {"expert_activation": "relu2", "score_func": "sigmoid", "norm_topk_prob": True},
}
SIDES = (Side("torch", "loop"), Side("jax", "loop"))


class Case:
    """One layer's weights and inputs, and what the reference makes of them, stage by stage."""

    def __init__(self, name: str, dtype: str):
        rng = np.random.default_rng(list(LAYERS).index(name))
        self.dtype, self.config = dtype, MoEConfig(**SIZES, **LAYERS[name], dtype=dtype)
        self.parameters = {
            row.name: rounded(rng.normal(size=row.shape) * (0.3 if row.zeros else row.shape[-1] ** -0.5), dtype)
            for row in layout.moe(self.config)
        }
        self.x, self.dy = (rounded(rng.normal(size=(20, SIZES["dim"])), dtype) for _ in range(2))

    def reference(self, ids=None, arithmetic=EXACT) -> dict[str, np.ndarray]:
        mask = np.ones(len(self.x), bool)
        settings = {"arithmetic": arithmetic}
        trace = reference.moe(self.x, mask, self.parameters, self.config, ids_TK=ids, **settings)
        with _spied() as calls:
            dx, grads = reference.moe_vjp(trace, self.x, mask, self.parameters, self.config, self.dy, **settings)
        (((_, _, _, ddown, _), (dact, _)), ((_, _, _, dup, _), (drows, _))) = calls["grouped_matmul_vjp"]
        (((_, _, _, dcombine, _), (dlatent, dweights, _)),) = calls["experts_vjp"]
        dlogits = calls["linear_vjp"][-1][0][2]  # the gate's comes last
        of_stages = {"logits": dlogits, "weights": dweights, "latent": dlatent, "combine": dcombine}
        of_stages |= {"rows": drows, "up": dup, "activation": dact, "down": ddown}
        found = _stages(trace) | {GRADIENT + n: v for n, v in {**of_stages, "x": dx, **grads}.items()}
        absent = {stage.name for stage in stages.STAGES} - {stage.name for stage in stages.of(self.config)}
        return {name: value for name, value in found.items() if name.removeprefix(GRADIENT) not in absent}


def _stages(trace: reference.MoETrace) -> dict[str, np.ndarray]:
    routing, experts = trace.routing, trace.experts
    of_gate = {"logits": trace.logits_TE, "weights": routing.weights_TK, "ids": routing.ids_TK}
    of_experts = {"rows": experts.permuted.rows_RD, "up": experts.hidden_RU, "activation": experts.act_RI}
    of_experts |= {"down": experts.out_RD, "combine": experts.y_TD}
    return of_gate | of_experts | {"latent": trace.latent_TD, "shared": trace.shared_TD, "output": trace.y_TD}


@contextmanager
def _spied() -> Iterator[dict[str, list]]:
    """(arguments, result) of each call of the reference's own backward steps, whose results it does not return."""
    calls: dict[str, list] = defaultdict(list)

    def spy(name: str, function):
        def call(*args):
            calls[name].append((args, function(*args)))
            return calls[name][-1][1]

        return call

    with ExitStack() as stack:
        for file, name in (("experts", "grouped_matmul_vjp"), ("moe", "experts_vjp"), ("moe", "linear_vjp")):
            module = sys.modules[f"moebius.core.reference.{file}"]
            stack.enter_context(patch.object(module, name, spy(name, getattr(module, name))))
        yield calls


@cache
def case(name: str, dtype: str) -> Case:
    return Case(name, dtype)


@cache
def expected(name: str, dtype: str, ids: bytes):
    c = case(name, dtype)
    forced = np.frombuffer(ids, np.int32).reshape(-1, SIZES["n_activated_experts"])
    exact = c.reference(forced)
    return exact, bounds(lambda arithmetic: c.reference(forced, arithmetic), exact, dtype)


@cache
def traced(side: Side, name: str, dtype: str) -> dict[str, np.ndarray]:
    c = case(name, dtype)
    layer = side.layer(c.config, c.parameters)
    return side.module.trace(layer, side.array(c.x, dtype), side.array(c.dy, dtype))


cases = pytest.mark.parametrize(
    "name, dtype", [*((name, "float32") for name in LAYERS), ("quick_geglu_biases", "bfloat16")]
)


@cases
@pytest.mark.parametrize("side", SIDES, ids=str)
def test_trace_of_every_stage_and_gradient_agrees_with_the_reference(side: Side, name: str, dtype: str) -> None:
    found = {key: side.numpy(value) for key, value in traced(side, name, dtype).items()}
    if dtype == "float32":  # rounded logits may tie
        np.testing.assert_array_equal(found["ids"], case(name, dtype).reference()["ids"])
    exact, limits = expected(name, dtype, found["ids"].astype(np.int32).tobytes())
    assert found.keys() == exact.keys()
    outside = {
        key: (np.linalg.norm(value - exact[key]), limits[key].norm)
        for key, value in found.items()
        if value.shape != exact[key].shape or not within(value, exact[key], limits[key])
    }
    assert not outside


@cases
def test_trace_of_both_frontends_has_the_same_names_order_shapes_and_dtypes(name: str, dtype: str) -> None:
    torch, jax = (
        [(key, tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in found.items()]
        for found in (traced(side, name, dtype) for side in SIDES)
    )
    assert torch == jax


@cases
def test_trace_holds_each_stage_of_the_config_and_each_parameter_in_order(name: str, dtype: str) -> None:
    config = case(name, dtype).config
    differentiable = [stage.name for stage in stages.of(config) if stage.differentiable]
    gradients = [*differentiable, "x", *(row.name for row in layout.moe(config))]
    wanted = [stage.name for stage in stages.of(config)] + [GRADIENT + key for key in gradients]
    assert list(traced(SIDES[0], name, dtype)) == wanted


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_trace_with_a_fake_gate_has_no_logits_but_the_gradient_of_the_weights(side: Side) -> None:
    c = case("swiglu", "float32")
    values = {name: value for name, value in c.parameters.items() if not name.startswith("gate.")}
    layer = side.layer(c.config, values, fake_balanced_gate=True)
    found = side.module.trace(layer, side.array(c.x, "float32"), side.array(c.dy, "float32"))
    assert not any("logits" in key or "gate.weight" in key for key in found)
    assert side.numpy(found["grad.weights"]).any()


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_trace_of_a_gate_that_is_not_trained_has_no_gradient_of_its_parameters(side: Side) -> None:
    c = case("swiglu", "float32")
    config = MoEConfig(**SIZES, dtype="float32", train_gate=False)
    layer = side.layer(config, c.parameters)
    found = side.module.trace(layer, side.array(c.x, "float32"), side.array(c.dy, "float32"))
    assert "grad.gate.weight" not in found and "grad.experts.down_projs" in found
    assert side.numpy(found["grad.logits"]).any()


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_trace_of_no_tokens_has_empty_stages_and_zero_gradients(side: Side) -> None:
    c = case("swiglu", "float32")
    layer = side.layer(c.config, c.parameters)
    found = side.module.trace(layer, side.array(c.x[:0], "float32"), side.array(c.dy[:0], "float32"))
    assert found.keys() == traced(side, "swiglu", "float32").keys()
    assert not any(side.numpy(value).any() for value in found.values())


@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize(
    "x, dy, match",
    [
        (np.zeros((2, 3, 16)), None, r"asked: x_TD of shape \[tokens, 16\]"),
        (np.zeros((3, 16)), np.zeros((2, 16)), r"asked: dy_TD of the output's shape \(3, 16\)"),
    ],
    ids=["x", "dy"],
)
def test_trace_of_a_wrong_shape_names_it(side: Side, x: np.ndarray, dy: np.ndarray | None, match: str) -> None:
    layer = side.layer(case("swiglu", "float32").config, case("swiglu", "float32").parameters)
    with pytest.raises(ValueError, match=match):
        side.module.trace(layer, side.array(x, "float32"), None if dy is None else side.array(dy, "float32"))


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_trace_of_an_upstream_gradient_in_another_dtype_names_both(side: Side) -> None:
    c = case("swiglu", "float32")
    layer = side.layer(c.config, c.parameters)
    with pytest.raises(TypeError, match=r"asked: dy_TD of the output's dtype float32\nfound: bfloat16"):
        side.module.trace(layer, side.array(c.x, "float32"), side.array(c.dy, "bfloat16"))
