"""families.py and model.py: what a config.json of each family means, and which ones are refused."""

import pytest
from folders import (
    CHECKPOINTS,
    DEEPSEEK2,
    DEEPSEEK3,
    GROUPED,
    INTER,
    MIXTRAL,
    OLMOE,
    OSS,
    QWEN,
    QWEN2,
    D,
    E,
    error_of,
    oss_tensors,
    qwen_tensors,
    write,
)

from moebius.core.checkpoint import plan
from moebius.core.errors import ConfigError
from moebius.core.families import FAMILIES
from moebius.core.folder import CONFIG, read_folder
from moebius.core.model import config_of, family_of, moe_layers

BY_TYPE = {config["model_type"]: (config, tensors) for config, tensors in CHECKPOINTS.values()}


def described(folder, config):
    """(config, MoE layers) by a config.json alone."""
    made = read_folder(write(folder, config, {}))
    family = family_of(made)
    return config_of(family, made), moe_layers(family, made)


def refusal(folder, config):
    """The error of a config.json, with all of the family's tensors beside it."""
    return error_of(write(folder, config, BY_TYPE[config["model_type"]][1]))


# ------------------------------------------------------------------------------------------------------------ the table
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families_name_their_source_and_tell_their_first_recipe_from_names(family):
    assert FAMILIES[family.model_type] is family
    assert "arXiv:" in family.source and "transformers" in family.source
    assert not next(iter(family.recipes.values())).on_request


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families_choose_among_values_of_which_the_default_is_one(family):
    assert all(family.defaults[key] in meanings for key, meanings in family.choices.items())


# ------------------------------------------------------------------------------------------------- what is read right
@pytest.mark.parametrize(
    ("config", "rule", "activation", "shared"),
    [
        (MIXTRAL, "softmax", "swiglu", 0),
        (QWEN2, "softmax_before_topk", "swiglu", 5),
        (QWEN, "softmax_before_topk", "swiglu", 0),
        (OLMOE, "softmax_before_topk", "swiglu", 0),
        (OSS, "softmax", "quick_geglu", 0),
        (DEEPSEEK2, "softmax_with_groups", "swiglu", 2 * INTER),
        ({**DEEPSEEK2, "topk_method": "greedy"}, "softmax_before_topk", "swiglu", 2 * INTER),
        (DEEPSEEK3, "sigmoid_with_bias", "swiglu", 2 * INTER),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_config_of_every_family_names_its_sizes_rule_and_activation(tmp_path, config, rule, activation, shared):
    made, _ = described(tmp_path, config)
    experts = GROUPED if "deepseek" in config["model_type"] else E
    assert (made.n_routed_experts, made.n_activated_experts, made.dim, made.moe_inter_dim) == (experts, 2, D, INTER)
    assert (made.routing_rule.name, made.activation.name, made.shared_inter_dim) == (rule, activation, shared)
    assert made.expert_bias == made.router_bias == (config is OSS)
    assert made.has_correction_bias == (config is DEEPSEEK3)


@pytest.mark.parametrize("config", [QWEN, QWEN2, OLMOE, DEEPSEEK3], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("norm", [True, False])
def test_config_of_the_families_that_may_normalise_says_whether(tmp_path, config, norm):
    assert described(tmp_path, {**config, "norm_topk_prob": norm})[0].norm_topk_prob is norm


def test_config_of_qwen2_opens_its_shared_expert_by_a_gate(tmp_path):
    assert described(tmp_path, QWEN2)[0].shared_expert_gate
    assert not described(tmp_path, DEEPSEEK3)[0].shared_expert_gate


def test_config_of_deepseek_has_its_groups_and_its_scale(tmp_path):
    for config, scale in ((DEEPSEEK2, 16.0), (DEEPSEEK3, 2.5)):
        made, _ = described(tmp_path, config)
        assert (made.n_expert_groups, made.n_limited_groups, made.route_scale) == (3, 2, scale)


def test_config_of_deepseek_v2_greedy_has_no_groups(tmp_path):
    """Whatever n_group says: a config that named groups here would warn that they are ignored."""
    assert described(tmp_path, {**DEEPSEEK2, "topk_method": "greedy"})[0].n_expert_groups == 1


def test_config_of_gpt_oss_has_its_clamp_and_alpha(tmp_path):
    row = described(tmp_path, {**OSS, "swiglu_limit": 5.0, "swiglu_alpha": 1.5})[0].activation
    assert (row.limit, row.alpha) == (5.0, 1.5)


@pytest.mark.parametrize(
    ("config", "published", "written"),
    [(QWEN, "num_experts", "num_local_experts"), (DEEPSEEK3, "n_routed_experts", "num_local_experts")],
    ids=["qwen3_moe", "deepseek_v3"],
)
def test_config_takes_either_name_of_a_size(tmp_path, config, published, written):
    renamed = {key: value for key, value in config.items() if key != published} | {written: 6}
    assert described(tmp_path, renamed)[0].n_routed_experts == 6


@pytest.mark.parametrize(
    ("config", "changes", "layers"),
    [
        (MIXTRAL, {}, (0, 1, 2, 3)),
        (QWEN, {}, (1, 2, 3)),
        (QWEN, {"decoder_sparse_step": 2, "mlp_only_layers": None}, (1, 3)),
        (QWEN2, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3,)),
        (OSS, {}, (0, 1)),
        (DEEPSEEK2, {}, (2, 3)),
        (DEEPSEEK2, {"first_k_dense_replace": None}, (0, 1, 2, 3)),
        (DEEPSEEK3, {"first_k_dense_replace": 1}, (1, 2, 3)),
        (DEEPSEEK3, {"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2,)),
    ],
)
def test_moe_layers_are_those_that_config_json_does_not_make_dense(tmp_path, config, changes, layers):
    assert described(tmp_path, {**config, **changes})[1] == layers


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plan_of_every_family_takes_the_first_moe_layer(tmp_path, model_type):
    config, tensors = BY_TYPE[model_type]
    made = plan(read_folder(write(tmp_path, config, tensors)))
    assert (
        made.layer
        == made.layers[0]
        == {"qwen2_moe": 1, "qwen3_moe": 1, "deepseek_v2": 2, "deepseek_v3": 2}.get(model_type, 0)
    )


# ------------------------------------------------------------------------------------------------------ what is refused
WRONG = [
    *((config, "hidden_act", "gelu", "silu") for config, _ in BY_TYPE.values()),
    (DEEPSEEK2, "topk_method", "noaux_tc", "group_limited_greedy"),
    (DEEPSEEK2, "scoring_func", "sigmoid", "softmax"),
    (DEEPSEEK2, "norm_topk_prob", True, "False"),
    (DEEPSEEK2, "mlp_bias", True, "False"),
    (DEEPSEEK3, "topk_method", "greedy", "noaux_tc"),
    (DEEPSEEK3, "scoring_func", "softmax", "sigmoid"),
]


@pytest.mark.parametrize(
    ("config", "key", "value", "known"), WRONG, ids=[f"{c['model_type']}-{key}" for c, key, *_ in WRONG]
)
def test_plan_of_another_mathematics_than_the_familys_names_both(tmp_path, config, key, value, known):
    error = refusal(tmp_path, {**config, key: value})
    assert key in error.asked and known in error.asked and config["model_type"] in error.asked
    assert f"{key}={value!r}" in error.found and CONFIG in error.found


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (DEEPSEEK3, "norm_topk_prob"),
        (DEEPSEEK3, "routed_scaling_factor"),
        (DEEPSEEK2, "topk_method"),
        (OSS, "swiglu_limit"),
    ],
    ids=["norm_topk_prob", "routed_scaling_factor", "topk_method", "swiglu_limit"],
)
def test_plan_of_a_null_is_not_the_default_where_the_default_says_something(tmp_path, config, key):
    error = refusal(tmp_path, {**config, key: None})
    assert key in error.asked and error.found == "null"
    without = {name: value for name, value in config.items() if name != key}
    assert described(tmp_path, without)


def test_plan_of_deepseek_v2_by_groups_needs_to_know_how_many(tmp_path):
    config = {key: value for key, value in DEEPSEEK2.items() if key != "n_group"}
    error = refusal(tmp_path, config)
    assert "n_group" in error.asked and error.found == "no such key"


@pytest.mark.parametrize("config", [QWEN, QWEN2, OLMOE, DEEPSEEK3], ids=lambda config: config["model_type"])
def test_plan_of_one_normalised_expert_per_token_is_refused(tmp_path, config):
    """Its weight is 1 in these models, and the router's score in a layer of one expert per token."""
    one = {**config, "num_experts_per_tok": 1}
    assert "one expert per token" in refusal(tmp_path, {**one, "norm_topk_prob": True}).asked
    assert described(tmp_path, {**one, "norm_topk_prob": False})[0].n_activated_experts == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 4}, "n_expert_groups=4"),
        ({"topk_group": 4}, "n_limited_groups=4"),
        ({"num_experts_per_tok": 7}, "n_activated_experts=7"),
        ({"topk_group": 1, "num_experts_per_tok": 3}, "n_activated_experts=3"),
    ],
)
@pytest.mark.parametrize("config", [DEEPSEEK2, DEEPSEEK3], ids=["v2", "v3"])
def test_plan_of_groups_that_do_not_fit_is_a_config_error(tmp_path, config, changes, words):
    with pytest.raises(ConfigError, match=words):
        described(tmp_path, {**config, **changes})


def test_plan_unknown_family_names_it_and_the_known_ones(tmp_path):
    error = error_of(write(tmp_path, {"model_type": "dbrx", "architectures": ["DbrxForCausalLM"]}, {}))
    assert "dbrx" in error.found and "DbrxForCausalLM" in error.found
    assert all(name in error.do for name in FAMILIES)


@pytest.mark.parametrize("model_type", [None, 3, ["qwen3_moe"]])
def test_plan_without_a_model_type_is_an_unknown_family(tmp_path, model_type):
    assert repr(model_type) in error_of(write(tmp_path, {"model_type": model_type}, {})).found


def test_plan_quantization_config_is_refused_by_method(tmp_path):
    folder = write(tmp_path, {**OSS, "quantization_config": {"quant_method": "mxfp4"}}, oss_tensors())
    assert "mxfp4" in error_of(folder).found


def test_plan_dense_layer_lists_the_moe_layers(tmp_path):
    error = error_of(write(tmp_path, QWEN, qwen_tensors()), 0)
    assert "a dense layer; MoE layers: 1-3" in error.found


@pytest.mark.parametrize("layer", [4, -1, 99])
def test_plan_layer_out_of_range_lists_the_moe_layers(tmp_path, layer):
    assert "layers 0 to 3; MoE layers: 1-3" in error_of(write(tmp_path, QWEN, qwen_tensors()), layer).found


@pytest.mark.parametrize(
    "config", [{**QWEN, "decoder_sparse_step": 9}, {**DEEPSEEK3, "first_k_dense_replace": 4}], ids=["qwen", "deepseek"]
)
def test_plan_all_layers_dense(tmp_path, config):
    assert "all of them dense" in error_of(write(tmp_path, config, {})).found


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_experts", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [None, "4", 4.0, True])
def test_plan_config_value_missing_or_of_another_type(tmp_path, key, value):
    assert key in error_of(write(tmp_path, {**QWEN, key: value}, qwen_tensors())).asked


def test_plan_two_keys_that_differ(tmp_path):
    error = error_of(write(tmp_path, {**QWEN, "num_local_experts": E + 1}, qwen_tensors()))
    assert "differ" in error.found


def test_plan_config_that_contradicts_itself_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="n_activated_experts=5"):
        plan(read_folder(write(tmp_path, {**QWEN, "num_experts_per_tok": 5}, qwen_tensors())))
