"""load_moe of both frontends: the same weights from the same folder, in every dtype. Every family: test_families.py."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import jax  # isort: skip

from moebius.compare.bridge import to_torch
from moebius.compare.hidden import quiet
from moebius.core.errors import BackendUnavailable, CheckpointError, ConfigError

FRONTENDS = ("torch", "jax")
FAMILIES = ("qwen3_moe", "gpt_oss")
frontends = pytest.mark.parametrize("frontend", FRONTENDS)
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        for family in FAMILIES:
            tiny.write(family, home / family)
    return {family: home / family for family in FAMILIES}


@pytest.fixture
def qwen(folders, tmp_path):
    """A copy of the Qwen3-MoE folder, to be damaged."""
    return shutil.copytree(folders["qwen3_moe"], tmp_path / "qwen3_moe")


def load(frontend, folder, *args, **kwargs):
    return importlib.import_module(f"moebius.{frontend}_frontend.checkpoint").load_moe(folder, *args, **kwargs)


def tensors(frontend, module):
    """The module's parameters as torch tensors."""
    values = importlib.import_module(f"moebius.{frontend}_frontend").parameters(module)
    return values if frontend == "torch" else {name: to_torch(value) for name, value in values.items()}


@families
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("layer", [0, 1])
def test_load_moe_of_both_frontends_is_equal_bit_for_bit(folders, family, dtype, layer):
    found = {frontend: tensors(frontend, load(frontend, folders[family], layer, dtype=dtype)) for frontend in FRONTENDS}
    assert found["torch"].keys() == found["jax"].keys()
    for name, value in found["torch"].items():
        assert value.dtype == found["jax"][name].dtype == getattr(torch, dtype or "float32")
        assert torch.equal(value, found["jax"][name]), name


@frontends
def test_load_moe_none_takes_the_first_moe_layer(folders, frontend):
    first, zeroth = (tensors(frontend, load(frontend, folders["qwen3_moe"], layer)) for layer in (None, 0))
    assert all(torch.equal(first[name], zeroth[name]) for name in first)


@frontends
def test_load_moe_reads_one_layer_alone(qwen, frontend):
    """The other layers' shards need not even be there."""
    kept = {n: t for n, t in load_file(qwen / "model.safetensors").items() if ".layers.1.mlp." in n}
    save_file(kept, qwen / "layer.safetensors")
    weight_map = dict.fromkeys(kept, "layer.safetensors") | {"model.layers.0.mlp.gate.weight": "gone.safetensors"}
    (qwen / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (qwen / "model.safetensors").unlink()
    assert load(frontend, qwen, 1).config.n_routed_experts == 8
    with pytest.raises(CheckpointError, match="missing"):
        load(frontend, qwen, 0)


@frontends
def test_load_moe_keeps_the_router_wider_than_the_experts(qwen, frontend):
    stored = load_file(qwen / "model.safetensors")
    stored = {n: t if n.endswith("mlp.gate.weight") else t.bfloat16() for n, t in stored.items()}
    save_file(stored, qwen / "model.safetensors")
    found = tensors(frontend, load(frontend, qwen))
    assert found["gate.weight"].dtype == torch.float32
    assert found["experts.down_projs"].dtype == torch.bfloat16


@frontends
def test_load_moe_of_a_damaged_file_is_a_checkpoint_error(qwen, frontend):
    file = qwen / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load(frontend, qwen)


@frontends
def test_load_moe_without_safetensors_says_what_to_install(folders, frontend, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(BackendUnavailable, match="pip install safetensors"):
        load(frontend, folders["qwen3_moe"])


@frontends
def test_load_moe_with_a_named_backend_uses_it(folders, frontend):
    class Backend:
        experts = "loop"

    assert load(frontend, folders["qwen3_moe"], backend=Backend()).experts.backend_name == "loop"


def test_load_moe_float64_in_jax_without_x64_is_refused(folders):
    with pytest.raises(ConfigError, match="float64"):
        load("jax", folders["qwen3_moe"], dtype="float64")
    with jax.enable_x64(True):
        module = load("jax", folders["qwen3_moe"], dtype="float64")
        assert module.experts.down_projs.dtype == "float64"


@frontends
def test_load_moe_with_an_unknown_recipe_lists_the_known(folders, frontend):
    with pytest.raises(CheckpointError, match=r"recipes of gpt_oss: .*'gate and up de-interleaved'"):
        load(frontend, folders["gpt_oss"], recipe="halves")


@frontends
def test_load_moe_of_gpt_oss_in_halves_has_the_activation_of_halves(folders, frontend):
    module = load(frontend, folders["gpt_oss"], recipe="gate and up de-interleaved")
    assert module.config.expert_activation == "swigluoai" and not module.config.activation.interleaved
    assert load(frontend, folders["gpt_oss"]).config.expert_activation == "quick_geglu"
