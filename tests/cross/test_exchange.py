"""One layer's parameters in both frontends: over dlpack and by safetensors, with every bit and under the same names.

Each dtype and layout of a tensor alone: test_bridge.py.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors import flax as flax_files
from safetensors import safe_open
from safetensors import torch as torch_files

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import nnx

from moebius import jax_frontend, torch_frontend
from moebius.compare.bridge import to_jax, to_torch
from moebius.core import BackendConfig, DTypeError, MoEConfig, ShapeError, layout
from moebius.jax_frontend import linen

DTYPES = ("float32", "bfloat16", "float16", "float64")
NAMES = ("MoE", "GroupedExperts", "GroupedExpertsDeepEP", "GroupedExpertsTE")
LOOP = BackendConfig(experts="loop")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
names = pytest.mark.parametrize("name", NAMES)


def config_of(dtype):
    return MoEConfig(
        n_routed_experts=4,
        n_activated_experts=2,
        dim=8,
        moe_inter_dim=6,
        n_shared_experts=1,
        shared_expert_gate=True,
        moe_latent_size=5,
        score_func="sigmoid",
        force_e_score_correction_bias=True,
        router_bias=True,
        expert_bias=True,
        dtype=dtype,
    )


def wide(dtype):
    return jax.enable_x64(True) if dtype == "float64" else nullcontext()


def torch_module(name, dtype, seed=0):
    """Its parameters are random bytes: NaN payloads, infinities, subnormals and both zeros included."""
    module = getattr(torch_frontend, name)(config_of(dtype), LOOP)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.view(torch.uint8).random_(0, 256, generator=generator)
    return module


def flax_module(name, dtype):
    zeros = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
    return getattr(jax_frontend, name)(config_of(dtype), LOOP, **zeros)


def bits(values):
    """(dtype, shape, bytes) of every array, torch's or JAX's, by name."""
    found = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = str(value.dtype).removeprefix("torch."), tuple(value.shape), raw
        else:
            found[name] = value.dtype.name, value.shape, np.ascontiguousarray(value).tobytes()
    return found


# --------------------------------------------------------------------------------------------------------- over dlpack
@dtypes
@names
def test_parameters_over_dlpack_and_back_keep_every_bit(name, dtype):
    source = torch_module(name, dtype)
    with wide(dtype):
        there = flax_module(name, dtype)
        values = torch_frontend.parameters(source)
        jax_frontend.load_parameters(there, {key: to_jax(value) for key, value in values.items()})
        crossed = jax_frontend.parameters(there)
        assert bits(crossed) == bits(values)
        back = getattr(torch_frontend, name)(config_of(dtype), LOOP)
        torch_frontend.load_parameters(back, {key: to_torch(value) for key, value in crossed.items()})
    assert bits(torch_frontend.parameters(back)) == bits(values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_of_any_strides_keep_every_bit(dtype):
    """Weights as others store them: output-major, transposed into place without a copy."""
    source = torch_module("GroupedExperts", dtype)
    wanted = bits(torch_frontend.parameters(source))
    strided = {
        key: value.detach().mT.contiguous().mT
        if key.endswith("projs")
        else value.detach().repeat_interleave(2, 1)[:, ::2]
        for key, value in torch_frontend.parameters(source).items()
    }
    assert not any(value.is_contiguous() for value in strided.values())
    there = flax_module("GroupedExperts", dtype)
    jax_frontend.load_parameters(there, {key: to_jax(value) for key, value in strided.items()})
    assert bits(jax_frontend.parameters(there)) == wanted


def test_tensors_that_were_not_converted_are_refused_and_change_nothing():
    """Of the first alone JAX could make an array."""
    source, there = torch_module("GroupedExperts", "bfloat16"), flax_module("GroupedExperts", "bfloat16")
    values = {key: to_jax(value) for key, value in torch_frontend.parameters(source).items()}
    values["down_projs"] = torch_frontend.parameters(source)["down_projs"]
    before = bits(jax_frontend.parameters(there))
    with pytest.raises(DTypeError, match=r"down_projs as a jax.*\nfound: torch\.Tensor\n.*moebius\.compare\.to_jax"):
        jax_frontend.load_parameters(there, values)
    assert bits(jax_frontend.parameters(there)) == before
    with pytest.raises(DTypeError, match=r"down_projs as a jax.*\nfound: torch\.Tensor"):
        linen.load_parameters({"params": dict(jax_frontend.parameters(there))}, values)


def test_parameters_that_crossed_are_copies():
    source = torch_module("GroupedExperts", "float32")
    there = flax_module("GroupedExperts", "float32")
    values = torch_frontend.parameters(source)
    jax_frontend.load_parameters(there, {key: to_jax(value) for key, value in values.items()})
    before = bits(jax_frontend.parameters(there))
    with torch.no_grad():
        for value in source.parameters():
            value.zero_()
    assert bits(jax_frontend.parameters(there)) == before


def test_the_correction_bias_crosses_too():
    source, there = torch_module("MoE", "bfloat16"), flax_module("MoE", "bfloat16")
    torch_frontend.load_state(source, {key: torch.linspace(-1, 1, 4) for key in torch_frontend.state(source)})
    values = torch_frontend.state(source)
    jax_frontend.load_state(there, {key: to_jax(value) for key, value in values.items()})
    assert bits(jax_frontend.state(there)) == bits(values)
    back = torch_frontend.MoE(config_of("bfloat16"), LOOP)
    torch_frontend.load_state(back, {key: to_torch(value) for key, value in jax_frontend.state(there).items()})
    assert bits(torch_frontend.state(back)) == bits(values)


def test_a_linen_layer_takes_the_parameters_and_gives_them_back():
    source = torch_module("MoE", "bfloat16")
    values = torch_frontend.parameters(source)
    shapes = jax.eval_shape(linen.MoE(config_of("bfloat16"), LOOP).init, jax.random.key(0), jnp.zeros((1, 8)))
    variables = linen.load_parameters(shapes, {key: to_jax(value) for key, value in values.items()})
    assert bits(linen.parameters(variables)) == bits(values)


# ------------------------------------------------------------------------------------------------------ by safetensors
@dtypes
@names
def test_a_file_that_torch_wrote_is_read_by_flax_bit_for_bit(tmp_path, name, dtype):
    values = torch_frontend.parameters(torch_module(name, dtype))
    torch_files.save_file({key: value.detach() for key, value in values.items()}, tmp_path / "layer.safetensors")
    with wide(dtype):
        there = flax_module(name, dtype)
        jax_frontend.load_parameters(there, flax_files.load_file(tmp_path / "layer.safetensors"))
        assert bits(jax_frontend.parameters(there)) == bits(values)


@dtypes
@names
def test_a_file_that_flax_wrote_is_read_by_torch_bit_for_bit(tmp_path, name, dtype):
    with wide(dtype):
        source = flax_module(name, dtype)
        crossed = {key: to_jax(value) for key, value in torch_frontend.parameters(torch_module(name, dtype)).items()}
        jax_frontend.load_parameters(source, crossed)
        values = jax_frontend.parameters(source)
        flax_files.save_file(values, tmp_path / "layer.safetensors")
    there = getattr(torch_frontend, name)(config_of(dtype), LOOP)
    torch_frontend.load_parameters(there, torch_files.load_file(tmp_path / "layer.safetensors"))
    assert bits(torch_frontend.parameters(there)) == bits(values)


@pytest.mark.parametrize("frontend", ["torch", "flax"])
def test_a_written_file_has_the_canonical_names_and_shapes(tmp_path, frontend):
    if frontend == "torch":
        values = torch_frontend.parameters(torch_module("MoE", "bfloat16"))
        torch_files.save_file({key: value.detach() for key, value in values.items()}, tmp_path / "layer.safetensors")
    else:
        flax_files.save_file(jax_frontend.parameters(flax_module("MoE", "bfloat16")), tmp_path / "layer.safetensors")
    with safe_open(tmp_path / "layer.safetensors", framework="numpy") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert found == {row.name: row.shape for row in layout.moe(config_of("bfloat16"))}


def test_a_torch_state_dict_is_the_parameters_and_the_state(tmp_path):
    """What torch's users save: a Flax layer loads it whole, the correction bias too."""
    source = torch_module("MoE", "bfloat16")
    torch_frontend.load_state(source, {key: torch.linspace(-1, 1, 4) for key in torch_frontend.state(source)})
    torch_files.save_file(source.state_dict(), tmp_path / "layer.safetensors")
    there, held = flax_module("MoE", "bfloat16"), flax_files.load_file(tmp_path / "layer.safetensors")
    own = jax_frontend.state(there).keys()
    jax_frontend.load_state(there, {key: held.pop(key) for key in own})
    jax_frontend.load_parameters(there, held)
    assert bits(jax_frontend.parameters(there)) == bits(torch_frontend.parameters(source))
    assert bits(jax_frontend.state(there)) == bits(torch_frontend.state(source))


def test_a_file_of_another_size_is_refused_and_changes_nothing(tmp_path):
    values = jax_frontend.parameters(flax_module("GroupedExperts", "float32"))
    flax_files.save_file(values | {"down_projs": jnp.ones((4, 6, 8))}, tmp_path / "layer.safetensors")
    there = torch_module("GroupedExperts", "float32")
    before = bits(torch_frontend.parameters(there))
    with pytest.raises(ShapeError, match="down_projs"):
        torch_frontend.load_parameters(there, torch_files.load_file(tmp_path / "layer.safetensors"))
    assert bits(torch_frontend.parameters(there)) == before
