"""The whole layer in both frontends: gate, routed and shared experts, latent projections, padding; all gradients."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from sides import SIDES, Side, rounded

from moebius.core import ConfigError, MoEConfig, layout, reference
from moebius.core.precision import EXACT
from moebius.core.reference.route import top_k
from moebius.core.routing import LOSSES
from moebius.core.stages import untapped
from moebius.core.tolerance import bounds, relative_error, within

sides = pytest.mark.parametrize("side", SIDES, ids=str)
frontends = pytest.mark.parametrize("side", (SIDES[0], SIDES[2]), ids=str)  # where the experts do not matter
SIZES = {"n_routed_experts": 8, "n_activated_experts": 3, "dim": 16, "moe_inter_dim": 12}

LAYERS = {
    "plain": {},
    "topk_first_with_biases": {
        "router_bias": True,
        "expert_bias": True,
        "expert_activation": "quick_geglu",
        "activation_limit": 0.5,
    },
    "softmax_before_topk": {
        "softmax_before_topk": True,
        "norm_topk_prob": True,
        "aux_loss_coeff": 0.3,
        "z_loss_coeff": 0.2,
        "seq_aux_loss_coeff": 0.5,
    },
    "sigmoid_groups_bias_shared": {
        "score_func": "sigmoid_with_bias",
        "n_expert_groups": 4,
        "n_limited_groups": 2,
        "norm_topk_prob": True,
        "route_scale": 2.5,
        "gate_bias_update_factor": 1e-3,
        "n_shared_experts": 2,
        "shared_expert_gate": True,
    },
    "sqrtsoftplus_clamped_shared": {
        "score_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "swiglu_limit": 0.5,
        "n_shared_experts": 1,
        "shared_expert_inter_dim": 10,
    },
    "every_loss_groups_bias": {
        "score_func": "sigmoid_with_bias",
        "n_expert_groups": 4,
        "n_limited_groups": 2,
        "norm_topk_prob": True,
        "force_e_score_correction_bias": True,
        "router_bias": True,
        "aux_loss_coeff": 0.3,
        "z_loss_coeff": 0.2,
        "seq_aux_loss_coeff": 0.5,
    },
    "latent_relu2_biases_after_down": {
        "score_func": "sigmoid",
        "moe_latent_size": 10,
        "expert_activation": "relu2",
        "shared_expert_activation": "relu2",
        "n_shared_experts": 1,
        "expert_bias": True,
        "apply_router_weight_after_down": True,
        "router_weights_fp32": True,
    },
}


class Case:
    """One layer with its weights and inputs, and what the reference makes of them."""

    def __init__(self, name: str, dtype: str):
        rng = np.random.default_rng(list(LAYERS).index(name))
        self.dtype, self.config = dtype, MoEConfig(**SIZES, **LAYERS[name], dtype=dtype)
        self.parameters = {
            row.name: rounded(rng.normal(size=row.shape) * (0.3 if row.zeros else row.shape[-1] ** -0.5), dtype)
            for row in layout.moe(self.config)
        }
        self.bias = None
        if self.config.has_correction_bias:
            self.bias = rounded(rng.normal(size=SIZES["n_routed_experts"]) * 0.1, "float32")
        self.x, self.dy = (rounded(rng.normal(size=(4, 6, SIZES["dim"])), dtype) for _ in range(2))
        self.padding = rng.random((4, 6)) < 0.2

    @property
    def values(self) -> dict[str, np.ndarray]:
        correction = {} if self.bias is None else {"gate.e_score_correction_bias": self.bias}
        return {**self.parameters, **correction}

    def reference(self, ids: np.ndarray, best: np.ndarray, arithmetic=EXACT, scale=1.0) -> dict[str, np.ndarray]:
        x, dy = self.x.reshape(-1, SIZES["dim"]), self.dy.reshape(-1, SIZES["dim"])
        mask = ~self.padding.reshape(-1)
        settings = {"correction_bias_E": self.bias, "n_sequences": 4, "best_TK": best, "arithmetic": arithmetic}
        trace = reference.moe(x, mask, self.parameters, self.config, ids_TK=ids, **settings)
        settings["aux_loss_scale"] = scale
        dx, grads = reference.moe_vjp(trace, x, mask, self.parameters, self.config, dy, **settings)
        return {"y": trace.y_TD.reshape(self.x.shape), "dx": dx.reshape(self.x.shape), **grads}

    def routed_by(self, side: Side, layer) -> np.ndarray:
        return self.chosen_and_ranked_by(side, layer)[0]

    def chosen_and_ranked_by(self, side: Side, layer) -> tuple[np.ndarray, np.ndarray]:
        """The experts that the side's gate chooses, and the best K by its own logits."""
        run = _choice if side.framework == "torch" else _compiled_choice()
        with side.context(self.dtype):
            x, mask = side.array(self.x.reshape(-1, SIZES["dim"]), self.dtype), side.array(~self.padding.reshape(-1))
            ids, logits = map(side.numpy, run(layer.gate, x, mask))
        return ids, top_k(logits, SIZES["n_activated_experts"]).astype(np.int32)


def _choice(gate, x, mask):
    """(ids, logits) of a gate, which is left as it was but for what it records."""
    seen = []
    gate.tap = lambda name, value: seen.append(value) or value
    ids = gate(x, mask)[1]
    gate.tap = untapped
    return ids, seen[0]


@cache
def _compiled_choice():
    """Op by op, JAX would compile dozens of small programs for each layer."""
    from flax import nnx

    return nnx.jit(_choice)


@cache
def case(name: str, dtype: str) -> Case:
    return Case(name, dtype)


@cache
def expected(name: str, dtype: str, ids: bytes, best: bytes, scale: float = 1.0):
    c = case(name, dtype)
    forced = [np.frombuffer(value, np.int32).reshape(-1, SIZES["n_activated_experts"]) for value in (ids, best)]
    exact = c.reference(*forced, scale=scale)
    return exact, bounds(lambda arithmetic: c.reference(*forced, arithmetic, scale), exact, dtype)


def _combinations():
    """Every layer x dtype x backend; ragged_dot in float32 alone, since a layer compiles for seconds in JAX."""
    for name in LAYERS:
        for side in SIDES:
            for dtype in ("float64", "float32", "bfloat16"):
                if side.serves(dtype) and (side.backend != "ragged_dot" or dtype == "float32"):
                    yield pytest.param(side, name, dtype, id=f"{side}-{name}-{dtype}")


@pytest.mark.parametrize("side, name, dtype", list(_combinations()))
def test_moe_output_and_gradients_agree_with_reference(side: Side, name: str, dtype: str) -> None:
    c = case(name, dtype)
    with side.context(dtype):
        layer = side.layer(c.config, c.values) if dtype != "float64" else _float64_layer(side, c)
    found = side.moe(layer, c.x, c.padding, c.dy, dtype)
    ids, best = c.chosen_and_ranked_by(side, layer)
    own = reference.gate(
        c.x.reshape(-1, SIZES["dim"]),
        {k[5:]: v for k, v in c.parameters.items() if k.startswith("gate.")},
        c.config,
        correction_bias_E=c.bias,
    )[1].ids_TK
    if dtype != "bfloat16":  # rounded logits may tie
        np.testing.assert_array_equal(ids, own)
    exact, limits = expected(name, dtype, ids.astype(np.int32).tobytes(), best.tobytes())
    assert found.keys() == exact.keys()
    for key, value in found.items():
        error = relative_error(value, exact[key])
        assert within(value, exact[key], limits[key]), f"{key}: {error:.3g} of {limits[key].relative():.3g}"


def _float64_layer(side: Side, c: Case):
    layer = side.layer(c.config, c.values)
    side.module.load_parameters(layer, {name: side.array(value, "float64") for name, value in c.parameters.items()})
    return layer


@sides
def test_moe_takes_any_leading_axes(side: Side) -> None:
    c = case("plain", "float32")
    layer = side.layer(c.config, c.values)
    deep = side.numpy(layer(side.array(c.x, "float32"), side.array(c.padding)))
    flat = side.numpy(layer(side.array(c.x.reshape(-1, 16), "float32"), side.array(c.padding.reshape(-1))))
    assert deep.shape == c.x.shape
    np.testing.assert_array_equal(deep.reshape(-1, 16), flat)


@sides
def test_moe_of_padding_alone_is_the_shared_experts_output(side: Side) -> None:
    c = case("sigmoid_groups_bias_shared", "float32")
    layer = side.layer(c.config, c.values)
    found = side.numpy(layer(side.array(c.x, "float32"), side.array(np.ones((4, 6), bool))))
    wanted = reference.shared_experts(c.x.reshape(-1, 16), c.parameters, c.config).reshape(c.x.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@frontends
def test_moe_of_padding_alone_has_the_bias_of_the_latent_projection_beside_the_shared_output(side: Side) -> None:
    c = case("latent_relu2_biases_after_down", "float32")
    layer = side.layer(c.config, c.values)
    found = side.numpy(layer(side.array(c.x, "float32"), side.array(np.ones((4, 6), bool))))
    wanted = reference.shared_experts(c.x.reshape(-1, 16), c.parameters, c.config).reshape(c.x.shape)
    np.testing.assert_allclose(found, wanted + c.parameters["fc2_latent_proj.bias"], rtol=1e-4, atol=1e-5)


@sides
def test_moe_without_tokens_gives_zero_gradients(side: Side) -> None:
    c = case("topk_first_with_biases", "float32")
    layer = side.layer(c.config, c.values)
    found = side.moe(layer, c.x[:0], None, c.dy[:0], "float32")
    assert found["y"].shape == (0, 6, 16)
    assert found.keys() == c.parameters.keys() | {"y", "dx"}
    assert all((value == 0).all() for value in found.values())


@sides
def test_moe_with_a_fake_gate_spreads_tokens_evenly(side: Side) -> None:
    c = case("plain", "float32")
    values = {name: value for name, value in c.values.items() if not name.startswith("gate.")}
    layer = side.layer(c.config, values, fake_balanced_gate=True)
    x = side.array(c.x.reshape(-1, 16), "float32")
    weights, ids, loss = layer.gate(x, side.array(np.ones(24, bool)))
    assert loss is None
    assert np.bincount(side.numpy(ids).reshape(-1), minlength=8).tolist() == [9] * 8
    np.testing.assert_allclose(side.numpy(weights), 1 / 3, rtol=1e-6)
    assert np.isfinite(side.numpy(layer(x))).all()


@sides
def test_update_bias_moves_towards_balance_and_clears_the_load(side: Side) -> None:
    c = case("sigmoid_groups_bias_shared", "float32")
    layer = side.layer(c.config, c.values)
    layer(side.array(c.x, "float32"), side.array(c.padding))
    load = reference.expert_load(c.routed_by(side, layer), ~c.padding.reshape(-1), 8)
    np.testing.assert_array_equal(side.numpy(_value(layer.gate.last_load)), load)
    layer.gate.update_bias()
    # Two training calls so far: the layer's and routed_by's.
    wanted = reference.updated_correction_bias(c.bias, 2 * load, 1e-3)
    found = side.numpy(_value(layer.gate.e_score_correction_bias))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not np.array_equal(found, c.bias)


@sides
def test_aux_loss_comes_out_unscaled(side: Side) -> None:
    c = case("softmax_before_topk", "float32")
    layer = side.layer(c.config, c.values)
    x, mask = c.x.reshape(-1, 16), ~c.padding.reshape(-1)
    _, _, loss = layer.gate(side.array(x, "float32"), side.array(mask))
    trace = reference.moe(x, mask, c.parameters, c.config)
    np.testing.assert_allclose(side.numpy(loss), trace.aux_loss, rtol=1e-5)
    np.testing.assert_allclose(side.numpy(_value(layer.gate.last_aux_loss)), trace.aux_loss, rtol=1e-5)
    layer.eval()
    assert layer.gate(side.array(x, "float32"), side.array(mask))[2] is None


@frontends
@pytest.mark.parametrize("name", ["softmax_before_topk", "every_loss_groups_bias"])
def test_losses_of_the_latest_call_are_unscaled_and_of_each_sequence(side: Side, name: str) -> None:
    c = case(name, "float32")
    layer = side.layer(c.config, c.values)
    side.module.set_aux_loss_scale(layer, 4.0)
    layer(side.array(c.x, "float32"), side.array(c.padding))
    mask = ~c.padding.reshape(-1)
    trace = reference.moe(
        c.x.reshape(-1, 16), mask, c.parameters, c.config, correction_bias_E=c.bias, n_sequences=len(c.x)
    )
    for loss in LOSSES:
        found = side.numpy(_value(getattr(layer.gate, f"last_{loss}")))
        np.testing.assert_allclose(found, getattr(trace, loss), rtol=1e-5, err_msg=loss)


@frontends
def test_set_aux_loss_scale_multiplies_every_loss_and_nothing_else(side: Side) -> None:
    c = case("every_loss_groups_bias", "float32")
    layer = side.layer(c.config, c.values)
    side.module.set_aux_loss_scale(layer, 8.0)
    ids, best = c.chosen_and_ranked_by(side, layer)
    found = side.moe(layer, c.x, c.padding, c.dy, "float32")
    exact, limits = expected("every_loss_groups_bias", "float32", ids.astype(np.int32).tobytes(), best.tobytes(), 8.0)
    for key, value in found.items():
        assert within(value, exact[key], limits[key]), key


@frontends
def test_set_aux_loss_scale_of_a_model_without_a_gate_is_refused(side: Side) -> None:
    c = case("plain", "float32")
    layer = side.layer(c.config, c.values)
    with pytest.raises(ConfigError, match=r"asked: the scale .+\nfound: no Gate\ndo: .+"):
        side.module.set_aux_loss_scale(layer.experts, 2.0)


def _value(held):
    """The array itself, or what an nnx.Variable holds."""
    return held[...]


@sides
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_moe_with_poison_in_a_padded_token_keeps_every_gradient(side: Side, poison: float) -> None:
    c = case("sigmoid_groups_bias_shared", "float32")
    layer = side.layer(c.config, c.values)
    padding = c.padding.copy()
    padding[1, 2] = True
    x = c.x.copy()
    x[1, 2] = 0.0
    clean = side.moe(layer, x, padding, c.dy, "float32")
    x[1, 2] = poison
    found = side.moe(layer, x, padding, c.dy, "float32")
    for name, value in clean.items():
        if name == "dx":  # no gradient where the value was replaced
            value, found[name] = (np.delete(v.reshape(-1, 16), 8, 0) for v in (value, found[name]))
        np.testing.assert_array_equal(found[name], value, err_msg=name)
