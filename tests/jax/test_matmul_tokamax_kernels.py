"""The backend "tokamax" on the package itself, without a GPU: kernels are lowered for CUDA, and some interpreted."""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import reference
from moebius.jax_frontend import grouped_matmul, matmul, matmul_tokamax

pytestmark = [
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("tokamax", "jax_triton")),
        reason="tokamax or jax-triton is not installed",
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),  # triton 3.9, of its own default
]
# E, D, I of Qwen3 30B, GPT-OSS 20B, Mixtral 8x7B and a slice of DeepSeek V3; rows that no block divides.
MODELS = {
    "qwen3": (128, 2048, 768),
    "gptoss": (32, 2880, 2880),
    "mixtral": (8, 4096, 14336),
    "dsv3": (32, 7168, 2048),
}
ROWS = 1001


class Hopper:
    """What tokamax asks a device."""

    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H200", "9.0", 132


@pytest.fixture
def hopper(monkeypatch):
    """The default device is a Hopper GPU, for moebius and for tokamax."""
    monkeypatch.setattr("jax.extend.backend.get_default_device", Hopper)
    monkeypatch.setattr(matmul, "device_of", lambda rows: ("cuda", (9, 0)))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def compiled(hopper, monkeypatch):
    """Every Triton kernel that is compiled: its name -> (bytes of shared memory, PTX)."""
    kernels: dict[str, tuple[int, str]] = {}

    class Call:
        def __init__(self, *parts):
            pass

        def to_proto(self, name, metadata):
            return name.encode()

    def kernel(name, warps, ctas, shared, binary, *rest):
        kernels[name] = shared, binary

    # jaxlib has these where its CUDA plugin is installed; compiling needs none of them.
    library = __import__("jax_triton.triton_lib").triton_lib.triton_kernel_call_lib
    stubs = {"TritonKernel": kernel, "TritonKernelCall": Call, "get_compute_capability": lambda device: 90}
    stubs |= dict.fromkeys(("create_array_parameter", "create_scalar_parameter"), lambda *parts: None)
    for name, stub in stubs.items():
        monkeypatch.setattr(library, name, stub, raising=False)
    return kernels


def lowered(function, *shapes, dtype="bfloat16", e):
    """The StableHLO of function(two arrays of `shapes`, group sizes) for CUDA."""
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    traced = jax.jit(function).trace(*args, jax.ShapeDtypeStruct((e,), "int32"))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def both_orientations(d, f, e):
    product = matmul_tokamax.product
    yield product, ((ROWS, d), (e, d, f))
    yield partial(product, transposed=True), ((ROWS, f), (e, d, f))


@pytest.mark.parametrize("choice", matmul_tokamax.CHOICES, ids=lambda choice: f"{choice.operation}-{choice.family}")
def test_configuration_of_every_choice_is_one_of_tokamax(choice):
    config = getattr(matmul_tokamax.load(), f"Pallas{choice.family}RaggedDotConfig")(**dict(choice.config))
    assert {name: getattr(config, name) for name, _ in choice.config} == dict(choice.config)


@pytest.mark.parametrize("model", MODELS)
def test_products_in_bfloat16_are_lowered_for_cuda_as_mosaic_kernels(hopper, model):
    e, d, i = MODELS[model]
    for width_in, width_out in ((d, 2 * i), (i, d)):
        for function, shapes in both_orientations(width_in, width_out, e):
            text = lowered(function, *shapes, e=e)
            assert re.findall(r"custom_call @(\w+)", text) == ["mosaic_gpu_v2"]


@pytest.mark.parametrize("model", MODELS)
def test_weight_gradient_in_bfloat16_is_lowered_for_cuda_as_a_triton_kernel(compiled, model):
    e, d, i = MODELS[model]
    text = lowered(matmul_tokamax.weight_gradient, (ROWS, d), (ROWS, 2 * i), e=e)
    assert re.findall(r"custom_call @(\w+)", text) == ["triton_kernel_call_ffi"]
    ((shared, ptx),) = compiled.values()
    assert shared <= 227 * 1024 and "wgmma" in ptx


@pytest.mark.parametrize("model", MODELS)
def test_products_and_weight_gradient_in_float32_are_lowered_without_tf32(compiled, model):
    e, d, i = MODELS[model]
    for function, shapes in both_orientations(d, 2 * i, e):
        assert "@triton_kernel_call_ffi" in lowered(function, *shapes, dtype="float32", e=e)
    assert "@triton_kernel_call_ffi" in lowered(
        matmul_tokamax.weight_gradient, (ROWS, d), (ROWS, 2 * i), dtype="float32", e=e
    )
    assert len(compiled) == 2
    for shared, ptx in compiled.values():
        assert shared <= 99 * 1024 and "tf32" not in ptx and "fma.rn.f32" in ptx


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_widths_that_no_block_divides_are_lowered_with_shared_memory_that_every_device_has(compiled, dtype):
    """No choice for all devices may need more than those of compute capability 8.6 and 12.0 have."""
    function = partial(grouped_matmul, backend="tokamax")
    assert "@triton_kernel_call_ffi" in lowered(function, (5, 25), (3, 25, 19), dtype=dtype, e=3)
    assert all(shared <= 99 * 1024 for shared, _ in compiled.values()) and compiled


@pytest.mark.parametrize("d", [64, 25], ids=["Mosaic", "Triton"])
def test_gradients_inside_shard_map_are_lowered_with_their_varying_axes_checked(compiled, d):
    def run(rows, weight, sizes):
        return jax.grad(lambda *args: grouped_matmul(*args, sizes, backend="tokamax").sum(), (0, 1))(rows, weight)

    mesh, spec = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    inner = jax.shard_map(run, mesh=mesh, in_specs=(spec("x"), spec(), spec("x")), out_specs=(spec("x"), spec()))
    text = lowered(inner, (ROWS, d), (3, d, 64), e=3)
    assert len(re.findall("custom_call @(?:mosaic_gpu_v2|triton_kernel_call_ffi)", text)) == 2


# On a GPU a kernel takes microseconds, interpreted seconds.
@pytest.mark.parametrize(
    "sizes, n_rows, f, transposed",
    [
        ((3, 0, 130), 137, 192, False),
        ((3, 0, 130), 137, 192, True),
        ((0, 1), 1, 192, False),
        ((0, 0), 5, 192, False),
        ((9,), 9, 192, True),
        # Half a block of columns.
        ((3, 0, 9), 15, 64, False),
        ((3, 0, 9), 15, 64, True),
    ],
    ids=str,
)
def test_mosaic_product_agrees_with_reference_when_interpreted(
    hopper, agree, cast, draws, sizes, n_rows, f, transposed
):
    from jax.experimental.pallas import mosaic_gpu

    draw, d = draws(0), 64
    rows, weight = draw((n_rows, d), "bfloat16"), draw((len(sizes), d, f), "bfloat16")
    stored = np.swapaxes(weight, 1, 2) if transposed else weight
    arrays = cast("bfloat16", rows, stored)
    with mosaic_gpu.force_gpu_interpret_mode():
        out = matmul_tokamax.product(*arrays, jnp.array(sizes, jnp.int32), transposed)
    assert not np.asarray(out, np.float32)[sum(sizes) :].any()
    agree({"out": out}, lambda a: {"out": reference.grouped_matmul(rows, weight, np.array(sizes), a)}, "bfloat16")
