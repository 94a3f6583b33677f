"""load_moe of both frontends: the same weights from the same folder, and what transformers computes with them."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

from moebius.compare.bridge import to_torch
from moebius.compare.demo import write_gpt_oss, write_qwen3_moe
from moebius.compare.hidden import hidden, quiet
from moebius.core import checkpoint
from moebius.core.errors import BackendUnavailable, CheckpointError, ConfigError
from moebius.core.folder import read_folder

FRONTENDS = ("torch", "jax")
FAMILIES = ("qwen3_moe", "gpt_oss")
frontends = pytest.mark.parametrize("frontend", FRONTENDS)
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        return {
            "qwen3_moe": write_qwen3_moe(home / "qwen3_moe"),
            "gpt_oss": write_gpt_oss(home / "gpt_oss", "some words " * 40)[0],
        }


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
@families
def test_export_of_a_loaded_moe_gives_back_the_stored_tensors(folders, family, frontend):
    plan = checkpoint.plan(read_folder(folders[family]), 1)
    loaded = tensors(frontend, load(frontend, folders[family], 1))
    back = checkpoint.export(plan, loaded, torch.Tensor.contiguous)
    stored = load_file(folders[family] / "model.safetensors")
    assert back.keys() == {name for name in stored if name.startswith("model.layers.1.mlp.")}
    for name, value in back.items():
        assert value.is_contiguous() and torch.equal(value, stored[name]), name


@frontends
@families
def test_load_moe_computes_what_transformers_computes(folders, family, frontend):
    """An oracle outside of this project: the model's own block, in float32 too."""
    block = hidden(folders[family], 1, "another text, of more than a few words. " * 4, 100)
    module, x = load(frontend, folders[family], 1), block.x_TD
    if frontend == "torch":
        y = module(torch.from_numpy(x)).detach().numpy()
    else:
        y = np.asarray(module(jnp.asarray(x)))
    # two float32 sums of at most 128 terms in a row, three times: far above their rounding, far below any misreading
    assert np.linalg.norm(y - block.y_TD) <= 3 * 128 * 2.0**-24 * np.linalg.norm(block.y_TD)


@frontends
def test_load_moe_none_takes_the_first_moe_layer(folders, frontend):
    first, zeroth = (tensors(frontend, load(frontend, folders["qwen3_moe"], layer)) for layer in (None, 0))
    assert all(torch.equal(first[name], zeroth[name]) for name in first)


@frontends
def test_load_moe_reads_one_layer_alone(folders, frontend, tmp_path):
    """The other layers' shards need not even be there."""
    with quiet():
        folder = write_qwen3_moe(tmp_path)
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".layers.1.mlp." in n}
    save_file(kept, folder / "layer.safetensors")
    weight_map = dict.fromkeys(kept, "layer.safetensors") | {"model.layers.0.mlp.gate.weight": "gone.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert load(frontend, folder, 1).config.n_routed_experts == 16
    with pytest.raises(CheckpointError, match="missing"):
        load(frontend, folder, 0)


@frontends
def test_load_moe_keeps_the_router_wider_than_the_experts(folders, frontend, tmp_path):
    with quiet():
        folder = write_qwen3_moe(tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored = {n: t if n.endswith("mlp.gate.weight") else t.bfloat16() for n, t in stored.items()}
    save_file(stored, folder / "model.safetensors")
    found = tensors(frontend, load(frontend, folder))
    assert found["gate.weight"].dtype == torch.float32
    assert found["experts.down_projs"].dtype == torch.bfloat16


@frontends
def test_load_moe_of_a_damaged_file_is_a_checkpoint_error(folders, frontend, tmp_path):
    with quiet():
        folder = write_qwen3_moe(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load(frontend, folder)


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
