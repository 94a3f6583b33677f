"""compare/bridge.py: every dtype, layout and later event of either side, and every input that has to be refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moebius.compare.bridge import to_jax, to_torch
from moebius.core.errors import DTypeError, MoEError, Unsupported

WIDE = ("float64", "int64", "uint64", "complex128")
FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
DTYPES = (*FLOATS, "int32", "int16", "int8", "uint32", "uint16", "uint8", "bool", "complex64", *WIDE)
SHAPE = (6, 8)

# Each makes a tensor whose values are `base`'s, in some order, out of a contiguous [6, 8].
LAYOUTS = {
    "contiguous": lambda base: base,
    "transposed": lambda base: base.T,
    "column slice": lambda base: base[:, 1:5],
    "every second row": lambda base: base[::2],
    "unaligned": lambda base: base.reshape(-1)[1:],
    "expanded": lambda base: base[:1].expand(5, 8),
    "diagonal": lambda base: base.diagonal(),
    "permuted": lambda base: base.reshape(2, 3, 8).permute(2, 0, 1),
    "size one": lambda base: base[:, :1],
    "scalar": lambda base: base[2, 3],
    "empty": lambda base: base[:0],
}


def x64(dtype):
    return jax.enable_x64(dtype in WIDE)


def values(dtype, shape=SHAPE, seed=0):
    """A contiguous torch tensor of random bytes: NaN payloads, infinities and subnormals included."""
    kind = getattr(torch, dtype)
    n = int(np.prod(shape))
    generator = torch.Generator().manual_seed(seed)
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (n * kind.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(kind).reshape(shape)


def bits(array):
    """The bytes of a torch tensor or jax.Array in C order."""
    if isinstance(array, torch.Tensor):
        copy = array.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        return copy.reshape(-1).view(torch.uint8).numpy().tobytes()  # of a copy: numpy() would pin the storage's size
    return np.ascontiguousarray(np.asarray(array)).tobytes()


def disturb(base, event, array):
    """What may happen on the torch side, or to the array, after the crossing."""
    if event == "write":
        base.view(torch.uint8).fill_(0)
    elif event == "set_data":
        base.data = torch.zeros_like(base)
    elif event == "free":
        base.untyped_storage().resize_(0)
        torch.full((4096,), 7, dtype=torch.uint8)
    elif event == "donate":
        jax.block_until_ready(jax.jit(jnp.zeros_like, donate_argnums=0)(array))


# ------------------------------------------------------------------------------------------------------ torch to jax
@pytest.mark.parametrize("event", ["write", "set_data", "free"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_jax_keeps_its_bits_whatever_torch_does_afterwards(dtype, layout, event):
    with x64(dtype):
        base = values(dtype)
        tensor = LAYOUTS[layout](base)
        expected, shape = bits(tensor), tuple(tensor.shape)
        array = to_jax(tensor)
        disturb(base, event, array)
        assert (array.shape, array.dtype.name, bits(array)) == (shape, dtype, expected)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_jax_donated_leaves_the_tensor_alone(dtype, layout):
    with x64(dtype):
        tensor = LAYOUTS[layout](values(dtype))
        expected = bits(tensor)
        disturb(tensor, "donate", to_jax(tensor))
        assert bits(tensor) == expected


def test_to_jax_alias_shares_memory():
    tensor = torch.zeros(4)
    array = to_jax(tensor, alias=True)
    tensor.fill_(3.0)
    assert array.tolist() == [3.0] * 4


@pytest.mark.parametrize("layout", ["transposed", "column slice", "every second row", "unaligned", "expanded"])
def test_to_jax_alias_of_what_would_be_copied_is_refused(layout):
    with pytest.raises(Unsupported, match="alias"):
        to_jax(LAYOUTS[layout](values("float32")), alias=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_to_jax_and_back_keeps_all_bit_patterns(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(getattr(torch, dtype))
    assert torch.equal(to_torch(to_jax(every)).view(torch.uint16), every.view(torch.uint16))


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES), st.data())
def test_to_jax_and_back_any_shape_and_permutation(shape, dtype, data):
    order = data.draw(st.permutations(range(len(shape))))
    with x64(dtype):
        tensor = values(dtype, tuple(shape)).permute(order)
        back = to_torch(to_jax(tensor))
        assert back.shape == tensor.shape and back.dtype == tensor.dtype and back.is_contiguous()
        assert bits(back) == bits(tensor)


def test_to_jax_resolves_the_bits_of_negated_and_conjugated_views():
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    assert to_jax(z.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert to_jax(z.conj().imag).tolist() == [-2.0, 4.0]
    assert to_jax(torch._neg_view(torch.tensor([1.0, -2.0]))).tolist() == [-1.0, 2.0]
    with pytest.raises(Unsupported, match="negated"):
        to_jax(z.conj().imag, alias=True)


def test_to_jax_of_parameters_and_graph_members_is_detached():
    weight = torch.nn.Parameter(torch.ones(3))
    assert to_jax(weight).tolist() == [1.0] * 3
    assert to_jax(weight * 2).tolist() == [2.0] * 3


@pytest.mark.parametrize("dtype", WIDE)
def test_to_jax_without_x64_refuses_64_bits(dtype):
    with pytest.raises(DTypeError, match="x64"):
        to_jax(torch.ones(2, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", WIDE)
def test_to_jax_cast_keeps_values_that_fit(dtype):
    array = to_jax(torch.tensor([1, 2], dtype=getattr(torch, dtype)), dtype_policy="cast")
    assert array.tolist() == [1, 2] and array.dtype.itemsize == getattr(torch, dtype).itemsize // 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([2**40 + 3]),
        torch.tensor([-(2**31) - 1]),
        torch.tensor([2**63], dtype=torch.uint64),
        torch.tensor([1e300], dtype=torch.float64),
        torch.tensor([1e300j], dtype=torch.complex128),
    ],
)
def test_to_jax_cast_refuses_values_outside_the_range(tensor):
    with pytest.raises(Unsupported, match="range"):
        to_jax(tensor, dtype_policy="cast")


def test_to_jax_cast_lets_nan_and_infinity_pass():
    array = to_jax(torch.tensor([float("nan"), float("inf")], dtype=torch.float64), dtype_policy="cast")
    assert np.isnan(array[0]) and np.isinf(array[1])


def test_to_jax_unknown_policy():
    with pytest.raises(Unsupported, match="dtype_policy"):
        to_jax(torch.ones(1), dtype_policy="narrow")


def crossing(tensor):
    to_jax(tensor)
    return tensor.sum()


REFUSED = {
    "a list": lambda: to_jax([1.0]),
    "numpy": lambda: to_jax(np.ones(3)),
    "FakeTensor": lambda: to_jax(FakeTensorMode().from_tensor(torch.ones(3))),
    "sparse": lambda: to_jax(torch.eye(3).to_sparse()),
    "nested": lambda: to_jax(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "meta": lambda: to_jax(torch.ones(3, device="meta")),
    "freed": lambda: to_jax(freed()),
    "vmap": lambda: torch.vmap(crossing)(torch.ones(2, 3)),
    "grad": lambda: torch.func.grad(crossing)(torch.ones(3)),
    "make_fx": lambda: make_fx(crossing)(torch.ones(3)),
    "subclass": lambda: to_jax(torch.ones(3).as_subclass(type("Wrapped", (torch.Tensor,), {}))),
    "float4": lambda: to_jax(torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
}


def freed():
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", REFUSED)
def test_to_jax_refuses_what_has_no_values(name):
    with pytest.raises(DTypeError) as caught:
        REFUSED[name]()
    assert caught.value.do


def test_to_jax_inside_a_fake_mode_refuses_the_fake_copy():
    tensor = torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DTypeError, match="FakeTensor"):
        to_jax(tensor)


def test_to_jax_of_a_dtensor_names_to_local(tmp_path):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        tensor = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(DTypeError, match="to_local"):
            to_jax(tensor)
        assert to_jax(tensor.to_local()).tolist() == [1.0] * 4
    finally:
        torch.distributed.destroy_process_group()


def test_to_jax_under_compile_breaks_the_graph_and_keeps_the_values():
    def step(tensor):
        return to_jax(tensor + 1)

    seen = torch.compile(step, backend="eager")(torch.arange(3.0))
    assert seen.tolist() == [1.0, 2.0, 3.0]
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ jax to torch
def jax_values(dtype, layout="contiguous"):
    return to_jax(LAYOUTS[layout](values(dtype)))


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("event", ["write", "delete", "donate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_torch_keeps_its_bits_whatever_either_side_does(dtype, event):
    with x64(dtype):
        array = jax.jit(jnp.swapaxes, static_argnums=(1, 2))(jax_values(dtype), 0, 1)
        expected = bits(array)
        tensor = to_torch(array)
        assert str(tensor.dtype) == f"torch.{dtype}" and tensor.is_contiguous() and bits(tensor) == expected
        if event == "write":
            tensor.view(torch.uint8).fill_(0)
            assert bits(array) == expected
        else:
            array.delete() if event == "delete" else disturb(None, "donate", array)
            assert bits(tensor) == expected


def test_to_torch_alias_shares_memory_and_outlives_the_array():
    array = jnp.arange(4.0)
    tensor = to_torch(array, alias=True)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    del array
    gc.collect()
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_to_torch_refuses_tracers(transform):
    def function(x):
        to_torch(x)
        return x

    with pytest.raises(DTypeError, match="tracer"):
        transform(function)(jnp.ones(()) if transform is jax.grad else jnp.ones(3))


def test_to_torch_refuses_a_deleted_array():
    array = jnp.ones(3)
    array.delete()
    with pytest.raises(Unsupported, match="deleted"):
        to_torch(array)


@pytest.mark.parametrize(
    "value", [[1.0], 3.0, None, nnx.Param(jnp.ones(2)), jax.random.key(0), jnp.zeros(2, jnp.int4), torch.ones(1)]
)
def test_to_torch_refuses_what_is_no_array_of_numbers(value):
    with pytest.raises(DTypeError) as caught:
        to_torch(value)
    assert caught.value.do


SHARDED = """
import jax, jax.numpy as jnp
from moebius.compare.bridge import to_torch
from moebius.core.errors import Unsupported
mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
for spec in (jax.sharding.PartitionSpec("a"), jax.sharding.PartitionSpec()):
    array = jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(mesh, spec))
    try:
        to_torch(array)
    except Unsupported as error:
        print(error.found, "|", error.do)
    print([to_torch(shard.data).tolist() for shard in array.addressable_shards])
"""


def test_to_torch_refuses_a_sharded_array():
    """Several devices have to be asked for before JAX starts: a process of its own."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=os.environ | flags | path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0].startswith("one on 2 devices") and "addressable_shards" in out[0]
    assert out[1] == "[[0.0, 1.0], [2.0, 3.0]]"
    assert "addressable_shards" in out[2]


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("cut", [np.s_[:], np.s_[::-1], np.s_[::2, ::-1], np.s_[2, 3], np.s_[:0]], ids=str)
def test_to_torch_copies_numpy_of_any_strides(dtype, cut):
    """torch.from_dlpack of a negative stride ends the process in torch 2.13 (pytorch issue 188023)."""
    kind = getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype
    array = np.frombuffer(bits(values(np.dtype(kind).name)), kind).reshape(SHAPE)[cut]
    assert not array.flags.writeable
    tensor = to_torch(np.asarray(array))
    assert tuple(tensor.shape) == array.shape and bits(tensor) == np.asarray(array).tobytes()


def test_to_torch_alias_of_numpy_that_torch_would_misread_is_refused():
    array = np.arange(4.0)
    tensor = to_torch(array, alias=True)
    tensor.fill_(1.0)
    assert array.tolist() == [1.0] * 4
    frozen = np.arange(4.0)
    frozen.setflags(write=False)
    for refused in (frozen, array[::-1], array[::2]):
        with pytest.raises(MoEError, match="alias"):
            to_torch(refused, alias=True)


@pytest.mark.parametrize("array", [np.ones(2, ">f4"), np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]")])
def test_to_torch_refuses_numpy_dtypes_that_torch_does_not_have(array):
    with pytest.raises(DTypeError, match="dtype"):
        to_torch(array)
