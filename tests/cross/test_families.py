"""Every family against transformers: a tiny model that it wrote, loaded, and what its own MoE block computes."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import nnx

from moebius.compare.bridge import to_torch
from moebius.compare.hidden import quiet
from moebius.core import checkpoint, reference
from moebius.core.families import FAMILIES
from moebius.core.folder import read_folder
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, relative_error, within
from moebius.torch_frontend import load_moe, parameters, state

TOKENS, DIM = 40, 32
HALVES = "gate and up de-interleaved"
# Model and recipe: every family as it is, and GPT-OSS in halves.
LOADED = [*((name, None) for name in tiny.MODELS), ("gpt_oss", HALVES)]
loaded = pytest.mark.parametrize(("name", "recipe"), LOADED)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(name): (folder, transformers' model), made once."""

    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp("models") / name.replace(" ", "_")
        with quiet():
            return folder, tiny.write(name, folder)

    return of


def draw() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((TOKENS, DIM)).astype(np.float32)


@torch.no_grad()
def by_transformers(model: Any, layer: int, x_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y_TD, weights_TK, ids_TK) of the model's own block, the experts of a token in order of their ids."""
    block, x = model.model.layers[layer].mlp, torch.from_numpy(x_TD)
    y = block(x[None])
    y = y[0] if isinstance(y, tuple) else y
    router = block.router if hasattr(block, "router") else block.gate
    return (y.reshape(x_TD.shape).numpy(), *in_order(*(value.numpy() for value in router(x)[1:])))


def in_order(weights_TK: np.ndarray, ids_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order_TK = ids_TK.argsort(-1)
    return np.take_along_axis(weights_TK, order_TK, -1), np.take_along_axis(ids_TK, order_TK, -1)


def float64(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in tensors.items()}


def layer_tensors(frontend: str, module: Any) -> dict[str, torch.Tensor]:
    """Parameters and state as torch tensors."""
    library = importlib.import_module(f"moebius.{frontend}_frontend")
    values = {**library.parameters(module), **library.state(module)}
    return values if frontend == "torch" else {name: to_torch(value) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------------ numbers
@loaded
def test_load_moe_of_every_family_computes_what_transformers_computes(written, name, recipe):
    """Output, weights and experts, of both within the bounds of the reference, whose weights are the loaded ones."""
    folder, model = written(name)
    plan, layer, x_TD = checkpoint.plan(read_folder(folder), recipe=recipe), load_moe(folder, recipe=recipe), draw()
    y_TD, weights_TK, ids_TK = by_transformers(model, plan.layer, x_TD)
    tensors, bias_E = float64(parameters(layer)), float64(state(layer)).get("gate.e_score_correction_bias")
    x, mask_T = x_TD.astype(np.float64), np.ones(TOKENS, bool)

    def run(arithmetic, ids_TK=ids_TK):
        found = reference.moe(
            x, mask_T, tensors, layer.config, correction_bias_E=bias_E, ids_TK=ids_TK, arithmetic=arithmetic
        )
        return {"output": found.y_TD, "weights": found.routing.weights_TK}

    own = reference.moe(x, mask_T, tensors, layer.config, correction_bias_E=bias_E).routing.ids_TK
    np.testing.assert_array_equal(np.sort(own), ids_TK)
    exact = run(EXACT)
    limits = bounds(run, exact, "float32")
    with torch.no_grad():
        found_TK, found_ids_TK, _ = layer.gate(torch.from_numpy(x_TD), torch.ones(TOKENS, dtype=torch.bool))
        found_TD = layer(torch.from_numpy(x_TD)).numpy()
    sorted_TK, sorted_ids_TK = in_order(found_TK.numpy(), found_ids_TK.numpy())
    np.testing.assert_array_equal(sorted_ids_TK, ids_TK)
    for side, values in (("transformers", (y_TD, weights_TK)), ("moebius", (found_TD, sorted_TK))):
        for key, value in zip(exact, values, strict=True):
            error, allowed = relative_error(value, exact[key]), limits[key].relative()
            assert within(value, exact[key], limits[key]), f"{key} of {side}: {error:.2g} of {allowed:.2g}"


@pytest.mark.parametrize("name", ["deepseek_v2 groups", "deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_load_moe_in_flax_computes_what_transformers_computes(written, name):
    """Of the layers with groups, state, a gate on the shared expert and biases: what the others are made of."""
    folder, model = written(name)
    module, x_TD = importlib.import_module("moebius.jax_frontend").load_moe(folder), draw()
    y_TD, _, ids_TK = by_transformers(model, checkpoint.plan(read_folder(folder)).layer, x_TD)
    graph, values = nnx.split(module)

    @jax.jit
    def run(values, x_TD):
        layer = nnx.merge(graph, values)
        return layer(x_TD), layer.gate(x_TD, jnp.ones(TOKENS, bool))[1]

    found_TD, found_TK = run(values, jnp.asarray(x_TD))
    np.testing.assert_array_equal(np.sort(np.asarray(found_TK)), ids_TK)
    # Sums of at most 48 terms, three in a row: far above their rounding, far below any misreading.
    assert relative_error(np.asarray(found_TD), y_TD) <= 3 * 48 * 2.0**-24


def test_the_models_would_show_a_router_without_its_groups_or_its_bias(written):
    """The choice hangs on both, so that the tests above could not pass without them."""
    for name, changes in (
        ("deepseek_v2 groups", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v2 groups", {"topk_group": 3}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"e_score_correction_bias": None}),
    ):
        folder, model = written(name)
        layer, x = load_moe(folder), torch.from_numpy(draw())
        gate = model.model.layers[1].mlp.gate
        ids_TK = layer.gate(x, torch.ones(TOKENS, dtype=torch.bool))[1].sort(-1).values
        other = type(gate)(model.config)
        other.load_state_dict(gate.state_dict())
        for key, value in changes.items():
            setattr(other, {"n_group": "num_group"}.get(key, key), torch.zeros(8) if value is None else value)
        with torch.no_grad():
            assert (other(x)[2].sort(-1).values != ids_TK).any(), (name, changes)


# ------------------------------------------------------------------------------------------------------ there and back
@loaded
def test_load_moe_of_both_frontends_is_equal_bit_for_bit(written, name, recipe):
    folder, _ = written(name)
    found = {
        side: layer_tensors(side, importlib.import_module(f"moebius.{side}_frontend").load_moe(folder, recipe=recipe))
        for side in ("torch", "jax")
    }
    assert found["torch"].keys() == found["jax"].keys()
    for key, value in found["torch"].items():
        assert value.dtype == found["jax"][key].dtype == torch.float32
        assert torch.equal(value, found["jax"][key]), key


@pytest.mark.parametrize("frontend", ["torch", "jax"])
@loaded
def test_export_of_a_loaded_moe_gives_back_the_stored_tensors(written, name, recipe, frontend):
    folder, _ = written(name)
    plan = checkpoint.plan(read_folder(folder), recipe=recipe)
    module = importlib.import_module(f"moebius.{frontend}_frontend").load_moe(folder, recipe=recipe)
    back = checkpoint.export(plan, layer_tensors(frontend, module), torch.Tensor.contiguous)
    stored = load_file(folder / "model.safetensors")
    prefixes = (f"model.layers.{plan.layer}.mlp.", f"model.layers.{plan.layer}.block_sparse_moe.")
    assert back.keys() == {key for key in stored if key.startswith(prefixes)}
    for key, value in back.items():
        assert value.is_contiguous() and torch.equal(value, stored[key]), key


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name != "gpt_oss"])
def test_load_moe_of_the_names_in_transformers_memory_equals_the_published_ones(written, tmp_path, name):
    """A state dict saved as it is has the experts fused, and Mixtral's block under another name."""
    folder, model = written(name)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {key: value for key, value in model.state_dict().items() if ".mlp." in key}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "fused" in checkpoint.plan(read_folder(tmp_path)).recipe
    found, expected = (layer_tensors("torch", load_moe(place)) for place in (tmp_path, folder))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_load_moe_of_a_16_bit_deepseek_v3_keeps_the_correction_bias_in_float32(written, tmp_path):
    with quiet():
        model = tiny.model("deepseek_v3").bfloat16()
        bias_E = model.model.layers[1].mlp.gate.e_score_correction_bias
        bias_E.data = torch.linspace(-0.1, 0.1, 8, dtype=torch.float32)
        model.save_pretrained(tmp_path)
    for frontend in ("torch", "jax"):
        module = importlib.import_module(f"moebius.{frontend}_frontend").load_moe(tmp_path)
        assert (module.config.dtype, module.config.gate_dtype) == ("bfloat16", None)
        found = layer_tensors(frontend, module)
        assert found["experts.down_projs"].dtype == found["gate.weight"].dtype == torch.bfloat16
        assert torch.equal(found["gate.e_score_correction_bias"], bias_E)


# ------------------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize("name", [name for name in tiny.MODELS if " " not in name])
def test_families_leave_out_keys_as_transformers_does(name):
    """A default of ours is transformers' own, for every key that its config class knows."""
    import transformers

    own = getattr(transformers, f"{tiny.MODELS[name][0]}Config")()
    defaults = FAMILIES[own.model_type].defaults
    known = {key: getattr(own, key) for key in defaults if hasattr(own, key)}
    assert known == {key: defaults[key] for key in known}
    unknown = {"moe_layer_freq", "scoring_func", "topk_method", "swiglu_alpha", "swiglu_limit"}  # or to some versions
    assert defaults.keys() - known <= unknown


@pytest.mark.parametrize("norm", [False, True])
def test_transformers_ignores_norm_topk_prob_of_deepseek_v2(norm):
    """Why a checkpoint that sets it is refused: once this fails, transformers computes it, and so can this layer."""
    with quiet():
        gate = tiny.model("deepseek_v2", norm_topk_prob=norm).model.layers[1].mlp.gate
    with torch.no_grad():
        logits_TE, weights_TK, ids_TK = gate(torch.from_numpy(draw()))
    torch.testing.assert_close(weights_TK, 1.5 * logits_TE.softmax(-1).gather(1, ids_TK))
