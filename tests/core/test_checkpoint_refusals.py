"""checkpoint.py: the tensors that a plan refuses, all that is wrong with them in one error."""

import json

import numpy as np
import pytest
from folders import (
    CHECKPOINTS,
    DEEPSEEK2,
    DEEPSEEK3,
    INTER,
    MIXTRAL,
    OSS,
    QWEN,
    D,
    E,
    apart,
    deepseek_tensors,
    draw,
    error_of,
    fused,
    load,
    opened,
    oss_tensors,
    qwen_tensors,
    write,
    write_sharded,
)

from moebius.core import layout
from moebius.core.checkpoint import fill, plan
from moebius.core.errors import CheckpointError
from moebius.core.folder import read_folder


def test_plan_index_that_names_a_missing_shard(tmp_path):
    folder = write_sharded(tmp_path / "x", QWEN, qwen_tensors())
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in error_of(folder).found


def test_plan_index_that_names_the_wrong_shard_lists_the_tensors(tmp_path):
    folder = write_sharded(tmp_path / "x", QWEN, qwen_tensors())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.gate.weight"
    index["weight_map"][name] = "model-00003-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing: gate.weight" in error_of(folder).found


def test_plan_reports_all_missing_wrong_and_left_over_tensors_together(tmp_path):
    tensors, block = qwen_tensors(), "model.layers.1.mlp."
    del tensors[block + "experts.1.up_proj.weight"], tensors[block + "gate.weight"]
    tensors[block + "experts.0.down_proj.weight"] = draw((D, INTER + 1))
    tensors[block + "experts.3.up_proj.weight"] = draw((INTER, D))
    found = error_of(write(tmp_path, QWEN, tensors)).found
    assert "missing: gate.weight, experts.1.up_proj.weight" in found
    assert f"experts.0.down_proj.weight [{D}, {INTER + 1}] where [{D}, {INTER}] is due" in found
    assert "left over: experts.3.up_proj.weight" in found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_plan_names_each_tensor_that_is_missing_left_over_or_misshaped(name, tmp_path):
    """Of every family, whichever tensor it is."""
    config, tensors = CHECKPOINTS[name]
    for number, key in enumerate(tensors):
        folder, short = tmp_path / str(number), key.split(".mlp.")[-1].split("block_sparse_moe.")[-1]
        changed = dict(tensors)
        changed[f"{key}.more"] = changed.pop(key)
        found = error_of(write(folder, config, changed)).found
        assert f"missing: {short}" in found and f"left over: {short}.more" in found
        longer = tensors | {key: np.concatenate([tensors[key], tensors[key]], axis=-1)}
        assert f"wrong: {short} [" in error_of(write(folder, config, longer)).found


def test_plan_without_the_correction_bias_reports_it_missing(tmp_path):
    error = error_of(write(tmp_path, DEEPSEEK3, deepseek_tensors(correction=False)))
    assert error.found == "missing: gate.e_score_correction_bias"


def test_plan_of_deepseek_v2_with_a_correction_bias_reports_it_left_over(tmp_path):
    error = error_of(write(tmp_path, DEEPSEEK2, deepseek_tensors(correction=True)))
    assert error.found == "left over: gate.e_score_correction_bias"


def test_plan_of_a_model_without_shared_experts_has_no_place_for_theirs(tmp_path):
    tensors = deepseek_tensors(correction=True)
    config = {**DEEPSEEK3, "n_shared_experts": 0}
    assert "left over: shared_experts.down_proj.weight" in error_of(write(tmp_path, config, tensors)).found
    bare = {name: array for name, array in tensors.items() if "shared" not in name}
    made, buffers = load(write(tmp_path, config, bare))
    assert not made.config.n_shared_experts and not any("shared" in name for name in buffers)


def test_plan_with_one_expert_too_few_fails(tmp_path):
    tensors = {name: array for name, array in qwen_tensors().items() if ".experts.2." not in name}
    assert "experts.2.gate_proj.weight" in error_of(write(tmp_path, QWEN, tensors)).found


def test_plan_transposed_gpt_oss_tensor_is_a_wrong_shape(tmp_path):
    tensors = oss_tensors()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    assert f"[{E}, {2 * INTER}, {D}] where [{E}, {D}, {2 * INTER}]" in error_of(write(tmp_path, OSS, tensors)).found


def test_plan_integer_weights_are_refused(tmp_path):
    tensors = oss_tensors()
    tensors["model.layers.0.mlp.router.bias"] = np.zeros(E, "uint8")
    assert "router.bias of dtype uint8" in error_of(write(tmp_path, OSS, tensors)).found


def test_plan_both_recipes_at_once_are_refused(tmp_path):
    block = "model.layers.1.mlp."
    assert "fused" in error_of(write(tmp_path, QWEN, apart(block) | fused(block))).found


@pytest.mark.parametrize("ending", ["gate_up_proj_blocks", "gate_up_proj_scales", "0.up_proj.weight_scale_inv"])
def test_plan_quantised_tensors_are_refused_by_name(tmp_path, ending):
    tensors = oss_tensors() | {f"model.layers.0.mlp.experts.{ending}": draw((2,))}
    error = error_of(write(tmp_path, OSS, tensors))
    assert ending in error.found and "dequantise" in error.do


def test_plan_of_mixtral_without_any_tensor_reports_the_published_names(tmp_path):
    error = error_of(write(tmp_path, MIXTRAL, {}))
    assert "block_sparse_moe" in error.asked and "missing: gate.weight, experts.0.w1.weight" in error.found


def test_fill_names_the_file_that_cannot_be_read(tmp_path):
    made = plan(read_folder(write(tmp_path, QWEN, qwen_tensors())))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fill(made, {row.name: np.empty(row.shape) for row in layout.moe(made.config)}, opened)
