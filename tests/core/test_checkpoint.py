"""checkpoint.py: which tensor goes where, there and back, with nothing but NumPy."""

import numpy as np
import pytest
from folders import (
    CHECKPOINTS,
    DEEPSEEK2,
    DEEPSEEK3,
    INTER,
    OSS,
    QWEN,
    QWEN2,
    D,
    E,
    deepseek_tensors,
    draw,
    error_of,
    load,
    opened,
    oss_tensors,
    qwen2_tensors,
    qwen_tensors,
    write,
    write_sharded,
)

from moebius.core import layout, reference
from moebius.core.checkpoint import export, fill, plan
from moebius.core.families import FAMILIES
from moebius.core.folder import read_folder

HALVES = "gate and up de-interleaved"
every = pytest.mark.parametrize("name", CHECKPOINTS)


# ------------------------------------------------------------------------------------------------- what is read right
def test_the_checkpoints_are_of_every_family():
    assert {config["model_type"] for config, _ in CHECKPOINTS.values()} == FAMILIES.keys()


def test_fill_of_one_tensor_per_expert_puts_gate_before_up_and_makes_both_input_major(tmp_path):
    tensors = qwen_tensors()
    _, buffers = load(write(tmp_path, QWEN, tensors))
    for e in range(E):
        part = {n: tensors[f"model.layers.1.mlp.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")}
        np.testing.assert_array_equal(buffers["experts.gate_and_up_projs"][e, :, :INTER], part["gate"].T)
        np.testing.assert_array_equal(buffers["experts.gate_and_up_projs"][e, :, INTER:], part["up"].T)
        np.testing.assert_array_equal(buffers["experts.down_projs"][e], part["down"].T)
    np.testing.assert_array_equal(buffers["gate.weight"], tensors["model.layers.1.mlp.gate.weight"])


def test_fill_of_mixtral_takes_w1_for_gate_w3_for_up_and_w2_for_down(tmp_path):
    """The same numbers under the other families' names fill the same places."""
    _, expected = load(write(tmp_path / "a", QWEN, qwen_tensors()))
    _, found = load(write(tmp_path / "b", *CHECKPOINTS["mixtral"]))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_fill_of_fused_experts_equals_one_tensor_per_expert(tmp_path):
    _, expected = load(write(tmp_path / "a", *CHECKPOINTS["qwen3_moe"]))
    _, found = load(write(tmp_path / "b", *CHECKPOINTS["qwen3_moe fused"]))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("config", "tensors", "stored"),
    [
        (QWEN2, qwen2_tensors(), "model.layers.1.mlp.shared_expert."),
        (DEEPSEEK2, deepseek_tensors(correction=False), "model.layers.2.mlp.shared_experts."),
    ],
    ids=["qwen2_moe", "deepseek"],
)
def test_fill_of_shared_experts_keeps_them_output_major(tmp_path, config, tensors, stored):
    _, buffers = load(write(tmp_path, config, tensors))
    for part in ("gate_proj", "up_proj", "down_proj"):
        np.testing.assert_array_equal(
            buffers[f"shared_experts.{part}.weight"], tensors[f"{stored}{part}.weight"], err_msg=part
        )


def test_fill_of_qwen2_reads_the_gate_on_the_shared_expert(tmp_path):
    tensors = qwen2_tensors()
    _, buffers = load(write(tmp_path, QWEN2, tensors))
    stored = tensors["model.layers.1.mlp.shared_expert_gate.weight"]
    np.testing.assert_array_equal(buffers["shared_expert_gate.weight"], stored)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_fill_of_deepseek_v3_reads_the_correction_bias_in_float32_whatever_the_dtype(tmp_path, dtype):
    tensors = deepseek_tensors(correction=True)
    made = plan(read_folder(write(tmp_path, DEEPSEEK3, tensors)), dtype=dtype)
    (row,) = layout.state(made.config)
    buffers = {r.name: np.zeros(r.shape, "float32") for r in (*layout.moe(made.config), row)}
    fill(made, buffers, opened)
    assert row.dtype == "float32"
    np.testing.assert_array_equal(buffers[row.name], tensors["model.layers.2.mlp.gate.e_score_correction_bias"])


def test_fill_of_gpt_oss_keeps_every_tensor_as_stored(tmp_path):
    tensors = oss_tensors()
    made, buffers = load(write(tmp_path, OSS, tensors))
    block, names = "model.layers.0.mlp.", {"experts.gate_up_proj": "experts.gate_and_up_projs"}
    for name, array in tensors.items():
        short = name.removeprefix(block).replace("router.", "gate.")
        target = {**names, "experts.down_proj": "experts.down_projs"}.get(short, short)
        np.testing.assert_array_equal(buffers[target], array)
    assert made.config.activation.interleaved


def test_fill_of_square_tensors_orients_them_by_name_alone(tmp_path):
    """D = I = E: every transposition fits every shape."""
    config = {**QWEN, "num_experts": 4}
    block, square = "model.layers.1.mlp.", lambda seed: draw((4, 4), seed)
    tensors = {block + "gate.weight": square(1)}
    for e in range(4):
        tensors |= {f"{block}experts.{e}.{n}_proj.weight": square(10 * e + i) for i, n in enumerate(("gate", "up"))}
        tensors[f"{block}experts.{e}.down_proj.weight"] = square(10 * e + 5)
    _, buffers = load(write(tmp_path, config, tensors))
    np.testing.assert_array_equal(buffers["experts.down_projs"][2], square(25).T)
    np.testing.assert_array_equal(buffers["gate.weight"], square(1))


@every
def test_fill_writes_every_element_of_every_parameter_and_of_the_state(name, tmp_path):
    """A recipe that left a region out would leave the NaN that `load` starts from."""
    _, buffers = load(write(tmp_path, *CHECKPOINTS[name]))
    assert all(np.isfinite(array).all() for array in buffers.values())


@every
def test_fill_reads_the_tensors_of_its_layer_alone(name, tmp_path):
    config, tensors = CHECKPOINTS[name]
    others = {"model.embed_tokens.weight": draw((5, D)), "model.layers.3.self_attn.q_proj.weight": draw((D, D))}
    made = plan(read_folder(write(tmp_path, config, others | tensors)))
    rows, asked = layout.moe(made.config) + layout.state(made.config), []
    fill(made, {row.name: np.empty(row.shape) for row in rows}, lambda file: opened(file, asked))
    assert sorted(asked) == sorted(tensors)


@every
def test_fill_from_shards_equals_one_file(name, tmp_path):
    _, expected = load(write(tmp_path / "one", *CHECKPOINTS[name]))
    _, found = load(write_sharded(tmp_path / "many", *CHECKPOINTS[name]))
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize(("name", "recipe"), [*((name, None) for name in CHECKPOINTS), ("gpt_oss", HALVES)])
def test_export_gives_back_the_bytes_that_were_loaded(name, recipe, tmp_path):
    config, tensors = CHECKPOINTS[name]
    made, buffers = load(write(tmp_path, config, tensors), recipe=recipe)
    back = export(made, buffers)
    assert back.keys() == tensors.keys()
    for key, array in back.items():
        assert array.flags.c_contiguous
        assert array.shape == tensors[key].shape
        assert array.tobytes() == tensors[key].tobytes()


def test_plan_layer_none_takes_the_first_moe_layer(tmp_path):
    tensors = qwen_tensors(1) | qwen_tensors(2) | qwen_tensors(3)
    made = plan(read_folder(write(tmp_path, QWEN, tensors)))
    assert (made.layer, made.layers) == (1, (1, 2, 3))


def test_plan_with_layer_takes_that_layer_alone(tmp_path):
    made = plan(read_folder(write(tmp_path, QWEN, qwen_tensors(1) | qwen_tensors(3))), 3)
    assert all(".layers.3." in place.stored.name for place in made.placements)


@pytest.mark.parametrize("name", ["mixtral", "mixtral fused", "qwen3_moe", "deepseek_v3"])
def test_plan_without_the_model_prefix_finds_the_block(name, tmp_path):
    config, tensors = CHECKPOINTS[name]
    bare = {key.removeprefix("model."): array for key, array in tensors.items()}
    assert len(plan(read_folder(write(tmp_path, config, bare))).placements) == len(tensors)


def test_plan_dtype_is_the_widest_stored_and_the_router_keeps_its_own(tmp_path):
    tensors = {name: array.astype("float16") for name, array in qwen_tensors().items()}
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].astype("float32")
    folder = read_folder(write(tmp_path, QWEN, tensors))
    assert (plan(folder).config.dtype, plan(folder).config.gate_dtype) == ("float16", "float32")
    assert (plan(folder, dtype="bfloat16").config.dtype, plan(folder, dtype="bf16").config.gate_dtype) == (
        "bfloat16",
        None,
    )


def test_plan_dtype_of_the_router_is_not_that_of_its_correction_bias(tmp_path):
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    stored = deepseek_tensors(correction=True)
    tensors = {name: array if name == bias else array.astype("float16") for name, array in stored.items()}
    config = plan(read_folder(write(tmp_path, DEEPSEEK3, tensors))).config
    assert (config.dtype, config.gate_dtype) == ("float16", None)


# ------------------------------------------------------------------------------------------------------ named recipes
def test_plan_deinterleaved_changes_the_columns_and_the_activation_together(tmp_path):
    folder = write(tmp_path, {**OSS, "swiglu_limit": 5.0, "swiglu_alpha": 1.5}, oss_tensors())
    (plain, kept), (made, halves) = load(folder), load(folder, recipe=HALVES)
    assert (plain.config.activation.name, made.config.activation.name) == ("quick_geglu", "swigluoai")
    assert (made.config.activation.alpha, made.config.activation.limit) == (1.5, 5.0)
    for name in ("experts.gate_and_up_projs", "experts.gate_up_proj_bias"):
        np.testing.assert_array_equal(halves[name][..., :INTER], kept[name][..., 0::2])
        np.testing.assert_array_equal(halves[name][..., INTER:], kept[name][..., 1::2])
    for name in kept.keys() - {"experts.gate_and_up_projs", "experts.gate_up_proj_bias"}:
        np.testing.assert_array_equal(halves[name], kept[name])


def test_plan_deinterleaved_computes_the_same_layer(tmp_path):
    folder = write(tmp_path, {**OSS, "swiglu_limit": 0.5}, oss_tensors())
    x_TD, mask_T = draw((9, D)).astype(float), np.ones(9, bool)
    outputs = []
    for recipe in (None, HALVES):
        made, buffers = load(folder, recipe=recipe)
        parameters = {name: value.astype(float) for name, value in buffers.items()}
        outputs.append(reference.moe(x_TD, mask_T, parameters, made.config).y_TD)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-13, atol=1e-14)


def test_plan_without_a_recipe_names_the_one_that_the_tensors_tell(tmp_path):
    for name, recipe in (("qwen3_moe fused", "experts fused, gate rows then up rows"), ("gpt_oss", "interleaved")):
        assert recipe in plan(read_folder(write(tmp_path, *CHECKPOINTS[name]))).recipe


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "deepseek_v3"])
def test_plan_with_an_unknown_recipe_lists_those_of_the_family(name, tmp_path):
    config, tensors = CHECKPOINTS[name]
    error = error_of(write(tmp_path, config, tensors), recipe="transposed")
    assert "'transposed'" in error.asked
    assert all(recipe in error.found for recipe in FAMILIES[config["model_type"]].recipes)


def test_plan_with_a_recipe_that_the_tensors_are_not_stored_by_is_refused(tmp_path):
    recipe = "experts fused, gate rows then up rows"
    error = error_of(write(tmp_path, QWEN, qwen_tensors()), recipe=recipe)
    assert recipe in error.asked
    assert "missing: experts.gate_up_proj, experts.down_proj; left over: experts.0." in error.found
