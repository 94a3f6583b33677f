"""folder.py, families.py and checkpoint.py: reading published checkpoints with nothing but NumPy.

The files are written here by the safetensors specification, so that these tests need no package either.
"""

import json
import pathlib
import tempfile
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.core import layout
from moebius.core.checkpoint import export, fill, plan
from moebius.core.errors import CheckpointError, ConfigError
from moebius.core.families import FAMILIES
from moebius.core.folder import header, read_folder

E, D, INTER = 3, 4, 4  # 2 INTER != D, yet down_proj is square: only its name tells the orientation
QWEN = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": D,
    "moe_intermediate_size": INTER,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}
OSS = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "hidden_size": D,
    "intermediate_size": INTER,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "swiglu_limit": 7.0,
}
_KINDS = {"float32": "F32", "float64": "F64", "float16": "F16", "uint8": "U8"}


def draw(shape, seed=0, dtype="float32"):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def qwen_tensors(layer=1, prefix="model."):
    block = f"{prefix}layers.{layer}.mlp."
    tensors = {block + "gate.weight": draw((E, D), 1)}
    for e in range(E):
        tensors[f"{block}experts.{e}.gate_proj.weight"] = draw((INTER, D), 10 + e)
        tensors[f"{block}experts.{e}.up_proj.weight"] = draw((INTER, D), 20 + e)
        tensors[f"{block}experts.{e}.down_proj.weight"] = draw((D, INTER), 30 + e)
    return tensors


def fused_tensors(layer=1):
    block = f"model.layers.{layer}.mlp."
    return {
        block + "gate.weight": draw((E, D), 1),
        block + "experts.gate_up_proj": draw((E, 2 * INTER, D), 2),
        block + "experts.down_proj": draw((E, D, INTER), 3),
    }


def oss_tensors(layer=0):
    block = f"model.layers.{layer}.mlp."
    return {
        block + "router.weight": draw((E, D), 1),
        block + "router.bias": draw((E,), 2),
        block + "experts.gate_up_proj": draw((E, D, 2 * INTER), 3),
        block + "experts.gate_up_proj_bias": draw((E, 2 * INTER), 4),
        block + "experts.down_proj": draw((E, INTER, D), 5),
        block + "experts.down_proj_bias": draw((E, D), 6),
    }


def safetensors_bytes(tensors):
    entries, data = {}, b""
    for name, array in tensors.items():
        entries[name] = {
            "dtype": _KINDS[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + data


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def write_sharded(folder, config, tensors, n_shards=3):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for shard in range(n_shards):
        part, file = names[shard::n_shards], f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class Reader:
    """safetensors.safe_open in six lines."""

    def __init__(self, file):
        self.raw, self.entries = file.read_bytes(), header(file)
        self.start = 8 + int.from_bytes(self.raw[:8], "little")
        self.places = json.loads(self.raw[8 : self.start])

    def get_tensor(self, name):
        begin, end = self.places[name]["data_offsets"]
        flat = np.frombuffer(self.raw[self.start + begin : self.start + end], self.entries[name].dtype)
        return flat.reshape(self.entries[name].shape)


@contextmanager
def opened(file):
    yield Reader(file)


def load(folder, layer=None, dtype=None):
    made = plan(read_folder(folder), layer, dtype=dtype)
    buffers = {row.name: np.full(row.shape, np.nan, row.dtype) for row in layout.moe(made.config)}
    fill(made, buffers, opened)
    return made, buffers


def error_of(folder, layer=None):
    with pytest.raises(CheckpointError) as caught:
        plan(read_folder(folder), layer)
    assert all((caught.value.asked, caught.value.found, caught.value.do))
    return caught.value


CASES = [(QWEN, qwen_tensors(), 1), (QWEN, fused_tensors(), 1), (OSS, oss_tensors(), 0)]
CASE_NAMES = ["qwen3_moe", "qwen3_moe fused", "gpt_oss"]


# ------------------------------------------------------------------------------------------------- what is read right
def test_fill_qwen_puts_gate_before_up_and_makes_both_input_major(tmp_path):
    tensors = qwen_tensors()
    _, buffers = load(write(tmp_path, QWEN, tensors))
    for e in range(E):
        part = {n: tensors[f"model.layers.1.mlp.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")}
        np.testing.assert_array_equal(buffers["experts.gate_and_up_projs"][e, :, :INTER], part["gate"].T)
        np.testing.assert_array_equal(buffers["experts.gate_and_up_projs"][e, :, INTER:], part["up"].T)
        np.testing.assert_array_equal(buffers["experts.down_projs"][e], part["down"].T)
    np.testing.assert_array_equal(buffers["gate.weight"], tensors["model.layers.1.mlp.gate.weight"])


def test_fill_qwen_fused_equals_one_tensor_per_expert(tmp_path):
    tensors = qwen_tensors()
    block = "model.layers.1.mlp."
    stacked = {n: np.stack([tensors[f"{block}experts.{e}.{n}_proj.weight"] for e in range(E)]) for n in ("gate", "up")}
    fused = {
        block + "gate.weight": tensors[block + "gate.weight"],
        block + "experts.gate_up_proj": np.concatenate([stacked["gate"], stacked["up"]], axis=1),
        block + "experts.down_proj": np.stack([tensors[f"{block}experts.{e}.down_proj.weight"] for e in range(E)]),
    }
    _, expected = load(write(tmp_path / "a", QWEN, tensors))
    _, found = load(write(tmp_path / "b", QWEN, fused))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_fill_gpt_oss_keeps_every_tensor_as_stored(tmp_path):
    tensors = oss_tensors()
    made, buffers = load(write(tmp_path, OSS, tensors))
    block, names = "model.layers.0.mlp.", {"experts.gate_up_proj": "experts.gate_and_up_projs"}
    for name, array in tensors.items():
        short = name.removeprefix(block).replace("router.", "gate.")
        target = {**names, "experts.down_proj": "experts.down_projs"}.get(short, short)
        np.testing.assert_array_equal(buffers[target], array)
    assert made.config.activation.interleaved


@pytest.mark.parametrize(("config", "tensors", "layer"), CASES, ids=CASE_NAMES)
def test_export_gives_back_the_bytes_that_were_loaded(config, tensors, layer, tmp_path):
    made, buffers = load(write(tmp_path, config, tensors))
    assert made.layer == layer
    back = export(made, buffers)
    assert back.keys() == tensors.keys()
    for name, array in back.items():
        assert array.flags.c_contiguous
        assert array.shape == tensors[name].shape
        assert array.tobytes() == tensors[name].tobytes()


@pytest.mark.parametrize(("config", "tensors", "layer"), CASES, ids=CASE_NAMES)
def test_fill_writes_every_element_of_every_parameter(config, tensors, layer, tmp_path):
    """A recipe that left a region out would leave the NaN that `load` starts from."""
    made, buffers = load(write(tmp_path, config, tensors))
    assert buffers.keys() == {row.name for row in layout.moe(made.config)}
    assert all(np.isfinite(array).all() for array in buffers.values())


@pytest.mark.parametrize(("config", "tensors", "layer"), CASES, ids=CASE_NAMES)
def test_fill_from_shards_equals_one_file(config, tensors, layer, tmp_path):
    _, expected = load(write(tmp_path / "one", config, tensors))
    _, found = load(write_sharded(tmp_path / "many", config, tensors))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_plan_reads_config_of_qwen(tmp_path):
    config = plan(read_folder(write(tmp_path, QWEN, qwen_tensors()))).config
    assert (config.n_routed_experts, config.n_activated_experts, config.dim, config.moe_inter_dim) == (E, 2, D, INTER)
    assert config.routing_rule.name == "softmax_before_topk"
    assert config.norm_topk_prob and config.activation.name == "swiglu" and not config.expert_bias
    assert config.dtype == "float32" and config.gate_dtype is None


def test_plan_reads_config_of_gpt_oss(tmp_path):
    config = plan(read_folder(write(tmp_path, {**OSS, "swiglu_limit": 5.0, "swiglu_alpha": 1.5}, oss_tensors()))).config
    assert config.routing_rule.name == "softmax"
    assert (config.activation.name, config.activation.limit, config.activation.alpha) == ("quick_geglu", 5.0, 1.5)
    assert config.expert_bias and config.router_bias


def test_plan_takes_the_name_that_transformers_5_writes(tmp_path):
    config = {key: value for key, value in QWEN.items() if key != "num_experts"} | {"num_local_experts": E}
    assert plan(read_folder(write(tmp_path, config, qwen_tensors()))).config.n_routed_experts == E


def test_plan_layer_none_takes_the_first_moe_layer(tmp_path):
    tensors = qwen_tensors(1) | qwen_tensors(2) | qwen_tensors(3)
    made = plan(read_folder(write(tmp_path, QWEN, tensors)))
    assert (made.layer, made.layers) == (1, (1, 2, 3))


def test_plan_with_layer_reads_that_layer_alone(tmp_path):
    made = plan(read_folder(write(tmp_path, QWEN, qwen_tensors(1) | qwen_tensors(3))), 3)
    assert all(".layers.3." in place.stored.name for place in made.placements)


def test_plan_without_the_model_prefix_finds_the_block(tmp_path):
    assert plan(read_folder(write(tmp_path, QWEN, qwen_tensors(prefix="")))).layer == 1


def test_plan_dtype_is_the_widest_stored_and_the_router_keeps_its_own(tmp_path):
    tensors = {name: array.astype("float16") for name, array in qwen_tensors().items()}
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].astype("float32")
    folder = read_folder(write(tmp_path, QWEN, tensors))
    assert (plan(folder).config.dtype, plan(folder).config.gate_dtype) == ("float16", "float32")
    assert (plan(folder, dtype="bfloat16").config.dtype, plan(folder, dtype="bf16").config.gate_dtype) == (
        "bfloat16",
        None,
    )


def test_fill_square_shapes_are_oriented_by_name_alone(tmp_path):
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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families_name_their_source(family):
    assert family.source and family.recipes and family.router


# ------------------------------------------------------------------------------------------------------ what is refused
def test_read_folder_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_folder(tmp_path / "nothing")


def test_read_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found: a file"):
        read_folder(tmp_path / "file")


def test_read_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_folder(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', "\xff", "[" * 100_000])
def test_read_folder_with_a_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_folder(tmp_path)


def test_read_folder_with_pickles_alone_refuses_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"pickles.*pytorch_model\.bin"):
        read_folder(tmp_path)


def test_read_folder_without_weights_names_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git-lfs pointer"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x02}q\x00" + bytes(100), "pickle"),
        (b"<!DOCTYPE html>", "web page"),
        (b"garbage, and more of it than a header has", "like no safetensors"),
        (b"", "like no safetensors"),
        ((100).to_bytes(8, "little") + b"{}", "a header of 100 announced"),
        ((2).to_bytes(8, "little") + b"[]", "a header of 2 announced"),
        ((2).to_bytes(8, "little") + b"{{", "Expecting"),
    ],
    ids=["lfs", "zip", "pickle", "html", "garbage", "empty", "cut header", "list", "no json"],
)
def test_header_of_another_kind_of_file(tmp_path, content, found):
    folder = write(tmp_path, QWEN, qwen_tensors())
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder)
    assert found in caught.value.found and "model.safetensors" in caught.value.asked


@pytest.mark.parametrize("first_byte", [0x80, 0x50, 0x3C, 0x76])
def test_header_whose_length_starts_like_another_kind_of_file(tmp_path, first_byte):
    """A header of 0x..80 bytes is no pickle: safetensors files begin with any byte."""
    raw = safetensors_bytes({"a": draw((2,))})
    head = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    head += b" " * ((first_byte - len(head)) % 256)
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw[-8:])
    assert header(tmp_path / "x.safetensors")["a"].shape == (2,)


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_header_of_a_truncated_file(tmp_path, cut):
    folder = write(tmp_path, QWEN, qwen_tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match="truncated"):
        read_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": 7, "shape": [1], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_header_with_an_entry_that_contradicts_itself(tmp_path, entry):
    head = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    with pytest.raises(CheckpointError, match="damaged"):
        header(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_header_of_any_damage_is_a_checkpoint_error_or_harmless(data):
    """Flip a byte or cut the file: a CheckpointError, or tensors that lie inside the file."""
    raw = bytearray(safetensors_bytes({"a": draw((2, 3)), "b": draw((4,))}))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "model.safetensors"
        file.write_bytes(bytes(raw))
        try:
            stored = header(file)
        except CheckpointError:
            return
        sizes = {"float32": 4, "float64": 8, "float16": 2}
        assert sum(int(np.prod(s.shape)) * sizes.get(s.dtype, 1) for s in stored.values()) <= len(raw)


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


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_read_folder_with_a_damaged_index(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        read_folder(tmp_path)


def test_read_folder_index_that_leaves_the_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="same folder"):
        read_folder(tmp_path)


def test_plan_reports_all_missing_wrong_and_left_over_tensors_together(tmp_path):
    tensors, block = qwen_tensors(), "model.layers.1.mlp."
    del tensors[block + "experts.1.up_proj.weight"], tensors[block + "gate.weight"]
    tensors[block + "experts.0.down_proj.weight"] = draw((D, INTER + 1))
    tensors[block + "experts.3.up_proj.weight"] = draw((INTER, D))
    found = error_of(write(tmp_path, QWEN, tensors)).found
    assert "missing: gate.weight, experts.1.up_proj.weight" in found
    assert f"experts.0.down_proj.weight [{D}, {INTER + 1}] where [{D}, {INTER}] is due" in found
    assert "left over: experts.3.up_proj.weight" in found


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
    assert "fused" in error_of(write(tmp_path, QWEN, qwen_tensors() | fused_tensors())).found


@pytest.mark.parametrize("ending", ["gate_up_proj_blocks", "gate_up_proj_scales", "0.up_proj.weight_scale_inv"])
def test_plan_quantised_tensors_are_refused_by_name(tmp_path, ending):
    tensors = oss_tensors() | {f"model.layers.0.mlp.experts.{ending}": draw((2,))}
    error = error_of(write(tmp_path, OSS, tensors))
    assert ending in error.found and "dequantise" in error.do


def test_plan_quantization_config_is_refused_by_method(tmp_path):
    folder = write(tmp_path, {**OSS, "quantization_config": {"quant_method": "mxfp4"}}, oss_tensors())
    assert "mxfp4" in error_of(folder).found


def test_plan_unknown_family_names_it_and_the_known_ones(tmp_path):
    error = error_of(write(tmp_path, {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, {}))
    assert "mixtral" in error.found and "MixtralForCausalLM" in error.found
    assert all(name in error.do for name in FAMILIES)


@pytest.mark.parametrize("model_type", [None, 3, ["qwen3_moe"]])
def test_plan_without_a_model_type_is_an_unknown_family(tmp_path, model_type):
    assert repr(model_type) in error_of(write(tmp_path, {"model_type": model_type}, {})).found


def test_plan_dense_layer_lists_the_moe_layers(tmp_path):
    error = error_of(write(tmp_path, QWEN, qwen_tensors()), 0)
    assert "a dense layer; MoE layers: 1-3" in error.found


@pytest.mark.parametrize("layer", [4, -1, 99])
def test_plan_layer_out_of_range_lists_the_moe_layers(tmp_path, layer):
    assert "layers 0 to 3; MoE layers: 1-3" in error_of(write(tmp_path, QWEN, qwen_tensors()), layer).found


def test_plan_sparse_step_makes_the_other_layers_dense(tmp_path):
    folder = write(tmp_path, {**QWEN, "decoder_sparse_step": 2, "mlp_only_layers": None}, qwen_tensors())
    assert plan(read_folder(folder)).layers == (1, 3)


def test_plan_all_layers_dense(tmp_path):
    folder = write(tmp_path, {**QWEN, "decoder_sparse_step": 9}, {})
    assert "all of them dense" in error_of(folder).found


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_experts", "moe_intermediate_size"])
@pytest.mark.parametrize("value", [None, "4", 4.0, True])
def test_plan_config_value_missing_or_of_another_type(tmp_path, key, value):
    assert key in error_of(write(tmp_path, {**QWEN, key: value}, qwen_tensors())).asked


def test_plan_two_keys_that_differ(tmp_path):
    error = error_of(write(tmp_path, {**QWEN, "num_local_experts": E + 1}, qwen_tensors()))
    assert "differ" in error.found


def test_plan_other_activation_than_the_family_has(tmp_path):
    assert "hidden_act='gelu'" in error_of(write(tmp_path, {**QWEN, "hidden_act": "gelu"}, qwen_tensors())).found


def test_plan_config_that_contradicts_itself_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="n_activated_experts=5"):
        plan(read_folder(write(tmp_path, {**QWEN, "num_experts_per_tok": 5}, qwen_tensors())))


def test_fill_names_the_file_that_cannot_be_read(tmp_path):
    made = plan(read_folder(write(tmp_path, QWEN, qwen_tensors())))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fill(made, {row.name: np.empty(row.shape) for row in layout.moe(made.config)}, opened)
