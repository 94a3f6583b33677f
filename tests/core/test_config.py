"""What a config accepts, what it refuses, and what it says."""

import dataclasses
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from moebius.core import BackendConfig, ConfigError, MoEConfig, MoEWarning

REQUIRED = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 32}

# The optional fields of the original's MoEConfig with its defaults.
ORIGINAL_DEFAULTS = {
    "router_bias": False,
    "expert_bias": False,
    "expert_activation": "swiglu",
    "apply_router_weight_after_down": False,
    "activation_alpha": 1.702,
    "activation_limit": 7.0,
    "swiglu_limit": 0.0,
    "softmax_before_topk": False,
    "router_weights_fp32": False,
    "router_weight_uses_score_correction_bias": False,
    "dtype": "bfloat16",
    "shared_expert_gate": False,
    "shared_expert_inter_dim": None,
    "shared_expert_activation": "swiglu",
    "force_e_score_correction_bias": False,
    "moe_latent_size": None,
    "enable_routing_replay": False,
}
# Those that it demands, beside the four sizes that are demanded here too.
ORIGINAL_DEMANDS = {
    "n_shared_experts",
    "n_expert_groups",
    "n_limited_groups",
    "train_gate",
    "gate_bias_update_factor",
    "aux_loss_coeff",
    "score_func",
    "route_scale",
    "inter_dim",
    "norm_topk_prob",
}


class OtherDtype:
    """Prints like another framework's dtype object."""

    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text


def config(**settings):
    return MoEConfig(**(REQUIRED | settings))


def refused(**settings):
    """The error that a config with `settings` ends in, with all three of its parts filled."""
    with pytest.raises(ConfigError) as caught:
        config(**settings)
    return complete(caught.value)


def complete(error):
    assert error.asked and error.found and error.do
    assert str(error) == f"asked: {error.asked}\nfound: {error.found}\ndo: {error.do}"
    return error


# ----------------------------------------------------------------------------------------------------------- MoEConfig


def test_config_without_options_has_the_defaults_of_the_original():
    made = config()
    assert {name: getattr(made, name) for name in ORIGINAL_DEFAULTS} == ORIGINAL_DEFAULTS
    fields = {field.name for field in dataclasses.fields(MoEConfig)}
    added = {"gate_dtype": None, "z_loss_coeff": 0.0, "seq_aux_loss_coeff": 0.0}
    assert fields == ORIGINAL_DEFAULTS.keys() | ORIGINAL_DEMANDS | REQUIRED.keys() | added.keys()
    assert {name: getattr(made, name) for name in added} == added


def test_config_losses_are_those_with_a_coefficient():
    assert config().losses == {}
    made = config(aux_loss_coeff=0.5, z_loss_coeff=1, seq_aux_loss_coeff=0.25)
    assert made.losses == {"aux_loss": 0.5, "z_loss": 1.0, "seq_aux_loss": 0.25}
    assert config(z_loss_coeff=0.1).losses == {"z_loss": 0.1}


@pytest.mark.parametrize("name", ["aux_loss_coeff", "z_loss_coeff", "seq_aux_loss_coeff"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), "1"])
def test_config_with_a_coefficient_that_is_no_share_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        config(**{name: value})


@pytest.mark.parametrize("name", REQUIRED)
def test_config_without_a_size_is_refused(name):
    with pytest.raises(TypeError, match=name):
        MoEConfig(**{key: value for key, value in REQUIRED.items() if key != name})


def test_config_is_frozen_hashable_and_compared_by_value():
    made = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.dim = 1
    assert made == config() != config(dim=8) and hash(made) == hash(config())
    assert pickle.loads(pickle.dumps(made)) == made
    assert dataclasses.replace(made, dim=8).dim == 8


def test_config_replaced_by_a_contradiction_is_refused():
    with pytest.raises(ConfigError):
        dataclasses.replace(config(), n_activated_experts=9)


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
def test_config_keeps_any_dtype_as_its_plain_name(name):
    for dtype in (name, f"torch.{name}", OtherDtype(f"torch.{name}")):
        made = config(dtype=dtype, gate_dtype=dtype)
        assert (made.dtype, made.gate_dtype) == (name, name)


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), "fp32", "float"])
def test_config_with_a_numpy_dtype_or_alias_keeps_its_name(dtype):
    assert config(dtype=dtype).dtype == "float32"


def test_config_with_dtypes_of_the_frameworks_keeps_their_names():
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    for dtype in (torch.bfloat16, jnp.bfloat16, jnp.dtype("bfloat16")):
        assert config(dtype=dtype).dtype == "bfloat16"


@pytest.mark.parametrize("name", ["n_routed_experts", "n_activated_experts", "dim", "moe_inter_dim", "moe_latent_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "4", True])
def test_config_with_a_size_that_is_none_is_refused(name, value):
    assert refused(**{name: value}).asked == f"{name}={value!r}"


@pytest.mark.parametrize("name", ["n_shared_experts", "n_expert_groups", "n_limited_groups", "shared_expert_inter_dim"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True])
def test_config_with_a_count_that_is_none_is_refused(name, value):
    assert refused(**{name: value}).asked == f"{name}={value!r}"


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "0.1", None])
@pytest.mark.parametrize("name", ["gate_bias_update_factor", "aux_loss_coeff"])
def test_config_with_a_factor_below_zero_or_not_finite_is_refused(name, value):
    assert name in refused(**{name: value}).asked


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), "1", None])
@pytest.mark.parametrize("name", ["route_scale", "activation_alpha", "activation_limit", "swiglu_limit"])
def test_config_with_a_number_that_is_none_is_refused(name, value):
    assert name in refused(**{name: value}).asked


def test_config_takes_sizes_and_numbers_of_numpy():
    made = config(dim=np.int64(16), route_scale=np.float32(2.5))
    assert (made.dim, made.route_scale) == (16, 2.5)


@pytest.mark.parametrize(
    ("settings", "asked", "found"),
    [
        ({"n_activated_experts": 9}, "n_activated_experts=9", "n_routed_experts=8"),
        ({"expert_activation": "gelu"}, "'gelu'", "quick_geglu"),
        ({"expert_activation": "swiglu_clamped"}, "'swiglu_clamped'", "swiglu"),
        ({"shared_expert_activation": "geglu"}, "'geglu'", "relu2"),
        ({"score_func": "top1"}, "'top1'", "sqrtsoftplus"),
        ({"score_func": "softmax_before_topk"}, "'softmax_before_topk'", "softmax"),
        ({"dtype": "int8"}, "'int8'", "bfloat16"),
        ({"dtype": None}, "None", "bfloat16"),
        ({"gate_dtype": "float8_e4m3fn"}, "float8_e4m3fn", "float32"),
        ({"gate_bias_update_factor": 0.1, "train_gate": False, "score_func": "sigmoid"}, "train_gate=False", "bias"),
        ({"n_expert_groups": 3, "score_func": "sigmoid"}, "n_expert_groups=3", "n_routed_experts=8"),
        (
            {"n_expert_groups": 4, "n_limited_groups": 0, "score_func": "sigmoid"},
            "n_limited_groups=0",
            "n_expert_groups=4",
        ),
        (
            {"n_expert_groups": 4, "n_limited_groups": 5, "score_func": "sigmoid"},
            "n_limited_groups=5",
            "n_expert_groups=4",
        ),
        (
            {"n_expert_groups": 4, "n_limited_groups": 1, "n_activated_experts": 3, "score_func": "sigmoid_with_bias"},
            "n_activated_experts=3 from 1 groups",
            "2 experts per group",
        ),
    ],
    ids=str,
)
def test_config_that_contradicts_itself_says_asked_found_do(settings, asked, found):
    error = refused(**settings)
    assert asked in error.asked and found in error.found


@pytest.mark.parametrize(
    ("settings", "ignored"),
    [
        ({"n_expert_groups": 2}, ["n_expert_groups=2"]),
        ({"n_expert_groups": 3, "score_func": "sqrtsoftplus"}, ["n_expert_groups=3"]),
        ({"gate_bias_update_factor": 0.1}, ["gate_bias_update_factor=0.1"]),
        ({"force_e_score_correction_bias": True, "softmax_before_topk": True}, ["force_e_score_correction_bias=True"]),
        (
            {"n_expert_groups": 2, "gate_bias_update_factor": 0.1, "force_e_score_correction_bias": True},
            ["n_expert_groups=2", "gate_bias_update_factor=0.1", "force_e_score_correction_bias=True"],
        ),
    ],
    ids=str,
)
def test_config_with_ignored_settings_warns_once_and_names_them(settings, ignored):
    with pytest.warns(MoEWarning) as caught:
        config(**settings)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(name in str(caught[0].message) for name in ignored)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_expert_groups": 1},
        {"n_expert_groups": 0, "n_limited_groups": 0},
        {"n_expert_groups": 4, "n_limited_groups": 2, "score_func": "sigmoid"},
        {"gate_bias_update_factor": 0.1, "score_func": "sqrtsoftplus"},
        {"activation_limit": 0.0},
        {"swiglu_limit": -1.0},
    ],
    ids=str,
)
def test_config_with_settings_that_count_is_silent(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "properties"),
    [
        ({}, {"expert_dim": 16, "shared_inter_dim": 0, "has_correction_bias": False}),
        ({"moe_latent_size": 4}, {"expert_dim": 4}),
        ({"n_shared_experts": 2}, {"shared_inter_dim": 64}),
        ({"n_shared_experts": 2, "shared_expert_inter_dim": 0}, {"shared_inter_dim": 64}),
        ({"n_shared_experts": 2, "shared_expert_inter_dim": 5}, {"shared_inter_dim": 10}),
        ({"score_func": "sigmoid", "gate_bias_update_factor": 0.1}, {"has_correction_bias": True}),
        ({"score_func": "sigmoid", "force_e_score_correction_bias": True}, {"has_correction_bias": True}),
    ],
    ids=str,
)
def test_config_derives_its_properties(settings, properties):
    made = config(**settings)
    assert {name: getattr(made, name) for name in properties} == properties


# ------------------------------------------------------------------------------------------------------------------ of


def test_of_a_config_returns_it():
    made = config()
    assert MoEConfig.of(made) is made


def test_of_an_object_with_the_attributes_reads_them():
    source = SimpleNamespace(**REQUIRED, expert_activation="geglu", dtype=OtherDtype("torch.float16"), other=3)
    assert MoEConfig.of(source) == config(expert_activation="geglu", dtype="float16")


def test_of_an_object_without_the_newest_attributes_takes_the_defaults():
    every = dataclasses.asdict(config())
    source = SimpleNamespace(**{k: v for k, v in every.items() if k not in ("gate_dtype", "router_weights_fp32")})
    assert MoEConfig.of(source) == config()


def test_of_an_object_with_properties_reads_them():
    class Source:
        n_routed_experts, n_activated_experts, moe_inter_dim = 8, 2, 32

        @property
        def dim(self):
            return 16

    assert MoEConfig.of(Source()) == config()


def test_of_an_object_without_a_size_says_which():
    with pytest.raises(ConfigError) as caught:
        MoEConfig.of(SimpleNamespace(n_routed_experts=8, dim=16))
    assert "n_activated_experts, moe_inter_dim" in complete(caught.value).found


@pytest.mark.parametrize("source", [None, 3, "config", {"dim": 16}])
def test_of_something_else_says_what_is_missing(source):
    with pytest.raises(ConfigError, match="no attribute n_routed_experts"):
        MoEConfig.of(source)


def test_of_an_object_with_a_contradiction_is_refused():
    with pytest.raises(ConfigError):
        MoEConfig.of(SimpleNamespace(**(REQUIRED | {"n_activated_experts": 9})))


# -------------------------------------------------------------------------------------------------------- BackendConfig


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("MOEBIUS_CHECKS", raising=False)


def test_backend_config_without_options_leaves_every_choice_open():
    made = BackendConfig()
    assert (made.experts, made.dispatcher, made.linear, made.gate_precision, made.te_fp8) == (None,) * 5
    assert (made.dispatcher_num_sms, made.fake_gate_noise, made.checks) == (20, 0.0, "off")
    assert made.dispatcher_share_token_dispatcher and not made.dispatcher_async_dispatch
    assert not made.fake_balanced_gate and not made.enable_fsdp_optimizations


@pytest.mark.parametrize(("name", "meant"), [("torch", "loop"), ("torch_mm", "grouped_mm"), ("te", "te")])
def test_backend_config_with_a_name_of_the_original_means_ours(name, meant):
    assert BackendConfig(experts=name).experts == meant


@pytest.mark.parametrize(
    ("settings", "asked", "found"),
    [
        ({"experts": "cuda"}, "experts='cuda'", "torch_mm"),
        ({"dispatcher": "mpi"}, "dispatcher='mpi'", "deepep"),
        ({"checks": "some"}, "checks='some'", "full"),
        ({"fake_gate_noise": 1.5}, "fake_gate_noise=1.5", "outside"),
        ({"fake_gate_noise": float("nan")}, "fake_gate_noise=nan", "outside"),
        ({"gate_precision": "int8"}, "int8", "float32"),
        ({"te_fp8": "block", "experts": "loop"}, "te_fp8", "'loop'"),
        ({"permute": "loop"}, "permute='loop'", "te"),
        ({"remat": "full", "double_backward": True}, "remat='full' with double_backward=True", "every step"),
        ({"remat": "none", "permute": "te"}, "remat='none' with permute='te'", "every step"),
        ({"double_backward": True, "permute": "te", "route": "te"}, "permute='te', route='te'", "once"),
    ],
    ids=str,
)
def test_backend_config_that_contradicts_itself_says_asked_found_do(settings, asked, found):
    with pytest.raises(ConfigError) as caught:
        BackendConfig(**settings)
    error = complete(caught.value)
    assert asked in error.asked and found in error.found


def test_backend_config_with_fp8_and_te_is_accepted():
    assert BackendConfig(te_fp8={"recipe": "block"}, linear="te").te_fp8 == {"recipe": "block"}


@pytest.mark.parametrize("name", ["off", "full"])
def test_backend_config_reads_checks_from_the_environment(name, monkeypatch):
    monkeypatch.setenv("MOEBIUS_CHECKS", name)
    assert BackendConfig().checks == name
    assert BackendConfig(checks="off").checks == "off"


def test_backend_config_with_an_unknown_word_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("MOEBIUS_CHECKS", "yes")
    with pytest.raises(ConfigError, match="MOEBIUS_CHECKS='yes'"):
        BackendConfig()


def test_backend_config_of_none_has_the_defaults_and_of_an_object_its_attributes():
    assert BackendConfig.of(None) == BackendConfig()
    source = SimpleNamespace(experts="torch_mm", gate_precision=OtherDtype("torch.float32"), attn="flex")
    made = BackendConfig.of(source)
    assert (made.experts, made.gate_precision) == ("grouped_mm", "float32")
    assert BackendConfig.of(made) is made


def test_backend_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BackendConfig().experts = "loop"
