"""Bad input to the layers: both frontends refuse it in the same words: asked, found, do."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from sides import Side, cached_problem

from moebius.core import (
    BackendConfig,
    BackendUnavailable,
    CheckpointError,
    ConfigError,
    DTypeError,
    MoEConfig,
    RoutingError,
    ShapeError,
    Unsupported,
)

FRONTENDS = (Side("torch", "loop"), Side("jax", "loop"))
frontends = pytest.mark.parametrize("side", FRONTENDS, ids=lambda side: side.framework)
CONFIG = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 8, "dtype": "float32"}


def build(side: Side, kind: str, *args, **kwargs):
    """A module of the frontend; Flax wants its random numbers."""
    if side.framework == "jax":
        from flax import nnx

        kwargs.setdefault("rngs", nnx.Rngs(0))
    return getattr(side.module, kind)(*args, **kwargs)


def call(side: Side, **changes):
    """experts() on a problem of which some inputs are replaced."""
    p = cached_problem()
    inputs = {
        "x": side.array(p.x, "float32"),
        "token_mask": side.array(p.token_mask),
        "weights": side.array(p.weights, "float32"),
        "indices": side.array(p.ids, "int32"),
    }
    parameters = {name: side.array(value, "float32") for name, value in p.parameters.items()}
    inputs |= {name: value(side, inputs[name]) for name, value in changes.items() if name in inputs}
    parameters |= {name: value(side, parameters[name]) for name, value in changes.items() if name in parameters}
    return side.module.experts(parameters, *inputs.values(), config=p.config)


BAD_ARRAYS = {
    "rank of x": (ShapeError, "x of shape [tokens, 16]", {"x": lambda s, a: a[None]}),
    "width of x": (ShapeError, "x of shape [tokens, 16]", {"x": lambda s, a: a[:, :8]}),
    "integer x": (DTypeError, "x of a dtype among", {"x": lambda s, a: s.array(np.ones((12, 16)), "int32")}),
    "float indices": (DTypeError, "indices of dtype int32 or int64", {"indices": lambda s, a: a * 1.0}),
    "bool indices": (DTypeError, "indices of dtype int32 or int64", {"indices": lambda s, a: a > 0}),
    "flat indices": (ShapeError, "indices of shape [12, K]", {"indices": lambda s, a: a[:, 0]}),
    "short indices": (ShapeError, "indices of shape [12, K]", {"indices": lambda s, a: a[:5]}),
    "fewer weights": (ShapeError, "weights of the shape of indices", {"weights": lambda s, a: a[:, :1]}),
    "integer weights": (
        DTypeError,
        "weights of a dtype among",
        {"weights": lambda s, a: s.array(np.ones((12, 2)), "int32")},
    ),
    "float mask": (DTypeError, "token_mask of dtype bool", {"token_mask": lambda s, a: a * 1.0}),
    "short mask": (ShapeError, "token_mask of shape [12]", {"token_mask": lambda s, a: a[:5]}),
    "transposed weights": (
        ShapeError,
        "down_projs of shape [4, 8, 16]",
        {"down_projs": lambda s, a: s.array(np.zeros((4, 16, 8)), "float32")},
    ),
}


@frontends
@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_experts_of_bad_input_say_what_was_asked_found_and_to_do(side: Side, name: str) -> None:
    error, asked, changes = BAD_ARRAYS[name]
    with pytest.raises(error, match=rf"asked: {re.escape(asked)}.*\nfound: .+\ndo: .+"):
        call(side, **changes)


@frontends
def test_experts_of_missing_parameters_name_them(side: Side) -> None:
    p = cached_problem(expert_bias=True)
    with pytest.raises(ShapeError, match="gate_up_proj_bias, down_proj_bias"):
        side.module.experts(
            {name: side.array(p.parameters[name], "float32") for name in ("gate_and_up_projs", "down_projs")},
            side.array(p.x, "float32"),
            side.array(p.token_mask),
            side.array(p.weights, "float32"),
            side.array(p.ids, "int32"),
            config=p.config,
        )


BAD_CONFIGS = {
    "top-k above E": {"n_activated_experts": 5},
    "no experts": {"n_routed_experts": 0},
    "activation": {"expert_activation": "selu"},
    "score function": {"score_func": "entmax"},
    "dtype": {"dtype": "int8"},
    "update without training": {"gate_bias_update_factor": 0.1, "train_gate": False, "score_func": "sigmoid"},
}


@frontends
@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_modules_of_a_bad_config_refuse_it(side: Side, name: str) -> None:
    config = SimpleNamespace(**{**CONFIG, **BAD_CONFIGS[name]})
    for kind in ("MoE", "GroupedExperts", "Gate"):
        with pytest.raises(ConfigError, match=r"asked: .+\nfound: .+\ndo: .+"):
            build(side, kind, config)


@frontends
def test_modules_take_any_object_with_the_attributes(side: Side) -> None:
    layer = build(side, "MoE", SimpleNamespace(**CONFIG), SimpleNamespace(experts="torch"))
    assert layer.config == MoEConfig(**CONFIG) and layer.experts.backend_name == "loop"


@frontends
def test_modules_of_an_incomplete_object_name_what_lacks(side: Side) -> None:
    with pytest.raises(ConfigError, match="no attribute n_activated_experts, moe_inter_dim"):
        build(side, "MoE", SimpleNamespace(n_routed_experts=4, dim=16))


@frontends
def test_modules_with_a_backend_of_the_other_frontend_refuse_it(side: Side) -> None:
    other = "ragged_dot" if side.framework == "torch" else "grouped_mm"
    with pytest.raises(ConfigError, match=rf"backend '{other}'"):
        build(side, "GroupedExperts", MoEConfig(**CONFIG), BackendConfig(experts=other))


@frontends
def test_modules_with_a_dispatcher_that_is_not_there_refuse_it(side: Side) -> None:
    with pytest.raises((ConfigError, Unsupported, BackendUnavailable), match=r"'deepep'"):
        build(side, "GroupedExperts", MoEConfig(**CONFIG), BackendConfig(dispatcher="deepep"))


@frontends
@pytest.mark.parametrize(
    "x, padding, error",
    [((16,), None, ShapeError), ((3, 8), None, ShapeError), ((3, 16), (4,), ShapeError)],
    ids=["flat_x", "width", "padding"],
)
def test_moe_of_shapes_that_do_not_fit_says_what_does(side: Side, x, padding, error) -> None:
    layer = build(side, "MoE", MoEConfig(**CONFIG))
    mask = None if padding is None else side.array(np.zeros(padding, bool))
    with pytest.raises(error, match=r"asked: .+\nfound: .+\ndo: .+"):
        layer(side.array(np.zeros(x), "float32"), mask)


@frontends
def test_moe_of_a_padding_mask_that_is_not_bool_is_refused(side: Side) -> None:
    layer = build(side, "MoE", MoEConfig(**CONFIG))
    with pytest.raises(DTypeError, match="padding_mask of dtype bool"):
        layer(side.array(np.zeros((3, 16)), "float32"), side.array(np.zeros(3), "float32"))


@frontends
def test_load_parameters_with_wrong_names_writes_nothing(side: Side) -> None:
    layer = build(side, "MoE", MoEConfig(**CONFIG))
    before = {name: side.numpy(value).copy() for name, value in side.module.parameters(layer).items()}
    values = {name: side.array(value + 1, "float32") for name, value in before.items()}
    values["experts.extra"] = values.pop("experts.down_projs")
    with pytest.raises(CheckpointError, match=r"missing: experts\.down_projs; unexpected: experts\.extra"):
        side.module.load_parameters(layer, values)
    values["experts.down_projs"] = side.array(np.zeros((4, 16, 8)), "float32")
    del values["experts.extra"]
    with pytest.raises(ShapeError, match=r"experts\.down_projs of shape \[4, 8, 16\]"):
        side.module.load_parameters(layer, values)
    for name, value in side.module.parameters(layer).items():
        np.testing.assert_array_equal(side.numpy(value), before[name], err_msg=name)


@frontends
def test_load_state_with_wrong_names_or_shapes_writes_nothing(side: Side) -> None:
    config = MoEConfig(**CONFIG, score_func="sigmoid", force_e_score_correction_bias=True)
    layer, name = build(side, "MoE", config), "gate.e_score_correction_bias"
    assert name not in side.module.parameters(layer)
    with pytest.raises(CheckpointError, match=rf"missing: {name}; unexpected: none"):
        side.module.load_state(layer, {})
    with pytest.raises(ShapeError, match=rf"{name} of shape \[4\]"):
        side.module.load_state(layer, {name: side.array(np.ones(5), "float32")})
    assert not side.numpy(side.module.state(layer)[name]).any()
    side.module.load_state(layer, {name: side.array(np.ones(4), "float32")})
    assert side.numpy(side.module.state(layer)[name]).all()


@frontends
def test_load_state_of_a_layer_without_any_takes_nothing_else(side: Side) -> None:
    layer = build(side, "MoE", MoEConfig(**CONFIG))
    assert side.module.state(layer) == {}
    side.module.load_state(layer, {})
    with pytest.raises(CheckpointError, match=r"unexpected: gate\.e_score_correction_bias"):
        side.module.load_state(layer, {"gate.e_score_correction_bias": side.array(np.ones(4), "float32")})


@frontends
@pytest.mark.parametrize("how", ["config", "environment"])
def test_full_checks_find_values_that_no_router_gives(side: Side, how: str, monkeypatch) -> None:
    if how == "environment":
        monkeypatch.setenv("MOEBIUS_CHECKS", "full")
    backend = BackendConfig(checks="full" if how == "config" else None)
    layer = build(side, "GroupedExperts", MoEConfig(**CONFIG), backend)
    p = cached_problem()
    x, mask = side.array(p.x, "float32"), side.array(np.ones(12, bool))
    weights, ids = p.weights.copy(), p.ids.copy()
    weights[5, 1] = np.inf
    with pytest.raises(RoutingError, match=r"finite weights.*\n.*token 5"):
        layer(x, mask, side.array(weights, "float32"), side.array(ids, "int32"))
    ids[7, 0] = 4
    with pytest.raises(RoutingError, match=r"ids in \[-1, 4\)\nfound: .*token 7"):
        layer(x, mask, side.array(p.weights, "float32"), side.array(ids, "int32"))
    # A masked token may hold anything.
    mask_out = np.ones(12, bool)
    mask_out[[5, 7]] = False
    layer(x, side.array(mask_out), side.array(weights, "float32"), side.array(ids, "int32"))


@frontends
def test_layers_of_another_frameworks_array_name_the_bridge(side: Side) -> None:
    other = FRONTENDS[1 - FRONTENDS.index(side)]
    layer = build(side, "MoE", MoEConfig(**CONFIG))
    remedy = "moebius.compare.to_torch" if side.framework == "torch" else "moebius.compare.to_jax"
    with pytest.raises(DTypeError, match=rf"asked: x as .*\nfound: .*\ndo: .*{remedy}"):
        layer(other.array(np.zeros((3, 16)), "float32"))
    with pytest.raises(DTypeError, match="x as a"):
        layer([[0.0] * 16])
    with pytest.raises(DTypeError, match="token_mask as a"):
        layer.experts(side.array(np.zeros((3, 16)), "float32"), None, None, None)


@frontends
def test_modules_with_a_backend_of_another_device_or_a_later_version_say_so(side: Side) -> None:
    # Where the package is missing too, both are said.
    refusal = r"backend 'triton'.*\nfound: .*moebius' grouped products compute on CUDA, not on cpu"
    with pytest.raises((Unsupported, BackendUnavailable), match=refusal):
        build(side, "GroupedExperts", MoEConfig(**CONFIG), BackendConfig(experts="triton"))
    with pytest.raises(Unsupported, match="linear='te'"):
        build(side, "MoE", MoEConfig(**CONFIG), BackendConfig(linear="te"))
    with pytest.raises(ConfigError, match="linear='foo'"):
        BackendConfig(linear="foo")


@frontends
def test_steps_of_shapes_that_do_not_fit_say_what_does(side: Side) -> None:
    out, experts = side.array(np.zeros((5, 4)), "float32"), side.array(np.zeros(5), "int32")
    activation = MoEConfig(**CONFIG).activation
    for call in (
        lambda: side.module.activate(side.array(np.zeros((5, 3)), "float32"), None, activation),
        lambda: side.module.activate(out, side.array(np.zeros(4), "float32"), activation),
        lambda: side.module.add_bias(out, side.array(np.zeros((2, 1)), "float32"), experts),
        lambda: side.module.add_bias(out, side.array(np.zeros((2, 4)), "float32"), experts[:2]),
    ):
        with pytest.raises(ShapeError, match=r"asked: .+\nfound: .+\ndo: .+"):
            call()


@frontends
def test_experts_as_a_function_check_values_under_the_environment(side: Side, monkeypatch) -> None:
    monkeypatch.setenv("MOEBIUS_CHECKS", "full")
    with pytest.raises(RoutingError, match=r"ids in \[-1, 4\)"):
        call(side, indices=lambda s, a: a + 3)
