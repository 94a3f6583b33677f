"""Tensors across dlpack: torch.Tensor to jax.Array and back, copied unless a caller asks to share memory.

A copy is the default because an alias is valid only until the next write on the other side: torch writes in place,
frees storages under its tensors (FSDP), and JAX computes asynchronously. Every case that dlpack lets through wrongly
is refused here with a remedy: 64-bit values that JAX would narrow, tensors without data, wrappers of a transformation,
negated views, arrays on several devices.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

# Not sorted: a CUDA build of torch has to load its libraries before jax loads others of the same names.
import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

from moebius.core.errors import DTypeError, Unsupported

# Zero-copy in both directions with every bit pattern kept; measured for all patterns of the 8- and 16-bit types.
_NAMES = (
    *("float64", "float32", "bfloat16", "float16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("complex64", "complex128"),
)
_WIDE = {
    torch.float64: torch.float32,
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.complex128: torch.complex64,
}
# XLA on a CPU copies silently what is not aligned to this many bytes.
_ALIGNMENT = 64
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


# Under torch.compile the graph breaks here and the copy is made with real values; fullgraph=True gets this reason.
@torch.compiler.disable(reason="moebius.compare.to_jax needs real values")
def to_jax(tensor: Tensor, *, alias: bool = False, dtype_policy: Literal["error", "cast"] = "error") -> jax.Array:
    """A jax.Array with the values of a torch tensor, detached; bit for bit, unless 64 bits were cast.

    Args:
        tensor: strided and with data, any layout, on any device that both frameworks see.
        alias: share memory instead of copying. Valid until torch next writes to, resizes or frees the storage, and
            only for a contiguous, 64-byte aligned tensor. Never donate the result.
        dtype_policy: what to do with float64, int64, uint64 and complex128 while JAX's x64 mode is off: "error", or
            "cast" to 32 bits where every value fits.
    Raises:
        DTypeError: no torch.Tensor, a wrapper or a tensor without data, a dtype that JAX does not have or would narrow.
        Unsupported: an alias that cannot be had, or values that do not fit the cast.
    """
    _require_plain(tensor)
    tensor = tensor.detach()
    if alias and (tensor.is_conj() or tensor.is_neg()):
        raise Unsupported("an alias of a conjugated or negated view", "a bit that dlpack does not carry", _COPY)
    tensor = _narrowed(tensor, dtype_policy, alias)
    if alias:
        _require_aliasable(tensor)
    else:
        tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        _require_plain(tensor)  # inside a FakeTensorMode the copy of a real tensor is a fake one
    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else _nothing():
            array: jax.Array = jax.dlpack.from_dlpack(tensor)
    except (RuntimeError, BufferError, KeyError) as error:
        raise Unsupported(f"a jax.Array of {_text(tensor)}", str(error), "move it to a device that JAX has") from error
    if alias and tensor.numel() and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise Unsupported(f"an alias of {_text(tensor)}", "JAX made a copy", _COPY)
    return array


@torch.compiler.disable(reason="moebius.compare.to_torch needs real values")
def to_torch(array: Any, *, alias: bool = False) -> Tensor:
    """A torch tensor with the values of a jax.Array (or a NumPy array, ml_dtypes included), bit for bit.

    Args:
        array: on one device and not deleted.
        alias: share memory instead of copying. The tensor is writable although the array is not meant to change:
            only read it.
    Raises:
        DTypeError: no array, a tracer, or a dtype that torch does not have.
        Unsupported: deleted, spread over several devices, or an alias that cannot be had.
    """
    if isinstance(array, np.ndarray):
        return _from_numpy(array, alias)
    _require_concrete(array)
    array = jax.block_until_ready(array)
    tensor = torch.from_dlpack(array)
    # clone rather than dlpack's copy: contiguous whatever layout XLA chose, and done when it returns
    return tensor if alias else tensor.clone(memory_format=torch.contiguous_format)


_COPY = "leave out alias=True: a copy costs about a millisecond per MiB"


def _require_plain(tensor: Any) -> None:
    """Refuse what has no data of its own, however dlpack would treat it."""
    found = _why_not_plain(tensor)
    if found is not None:
        raise DTypeError("a torch.Tensor with its own data", *found)


def _why_not_plain(tensor: Any) -> tuple[str, str] | None:
    """(what was found, what to do) for anything that cannot cross."""
    kind = type(tensor).__name__
    if not isinstance(tensor, Tensor):
        return f"{kind}", "pass a torch.Tensor; jax.numpy.asarray takes everything else"
    if _is_traced():
        return "tracing: the values would become a constant", "cross outside of make_fx and export"
    if _is_wrapped(tensor):
        return "a tensor inside torch.func (vmap, grad, jvp)", "cross outside of the transformation"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"layout {tensor.layout}, nested={tensor.is_nested}", "convert it: tensor.to_dense(), tensor.unbind()"
    if hasattr(tensor, "to_local"):
        return f"a {kind}, one shard of a larger tensor", "pass tensor.to_local() or tensor.full_tensor()"
    if type(tensor) not in _PLAIN:
        return f"a {kind}, a wrapper around or instead of data", "pass the plain tensor that it stands for"
    if tensor.is_meta:
        return "a meta tensor, which has no data", "materialise it first: module.to_empty(device=...)"
    if tensor.is_quantized:
        return f"a quantised tensor, {tensor.dtype}", "convert it: tensor.dequantize()"
    if _name(tensor.dtype) not in _NAMES:
        return f"dtype {tensor.dtype}", "cast it, or view its bytes: tensor.view(torch.uint8)"
    storage = tensor.untyped_storage()
    if tensor.numel() and storage.nbytes() < _last_byte(tensor):
        return "a tensor whose storage was freed (resized to 0)", "cross while the weights are gathered"
    return None


def _is_traced() -> bool:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _last_byte(tensor: Tensor) -> int:
    """Bytes of storage that the tensor reaches into."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def _narrowed(tensor: Tensor, dtype_policy: str, alias: bool) -> Tensor:
    """The tensor in a dtype that JAX keeps; dlpack itself would narrow 2**40 + 3 to 3 without a word."""
    if dtype_policy not in ("error", "cast"):
        raise Unsupported(f"dtype_policy={dtype_policy!r}", "the policies 'error' and 'cast'", "name one of them")
    if tensor.dtype not in _WIDE or jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        return tensor
    name, narrow = _name(tensor.dtype), _WIDE[tensor.dtype]
    if dtype_policy == "error":
        do = f"use jax.enable_x64(True), cast to {_name(narrow)}, or pass dtype_policy='cast'"
        raise DTypeError(f"a jax.Array of {name}", "x64 is off: JAX would narrow it to 32 bits", do)
    if alias:
        raise Unsupported(f"an alias of {name} as {_name(narrow)}", "a cast is a copy", _COPY)
    if not tensor.numel():
        return tensor.to(narrow)
    cast = tensor.resolve_conj().resolve_neg().to(narrow)
    if not narrow.is_floating_point and not narrow.is_complex:
        fits = torch.equal(cast.to(tensor.dtype), tensor)
    else:
        fits = torch.equal(torch.isfinite(cast), torch.isfinite(tensor))
    if not fits:
        raise Unsupported(f"{name} cast to {_name(narrow)}", "values outside its range", "use jax.enable_x64(True)")
    return cast


def _require_aliasable(tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        found = f"strides {tuple(tensor.stride())}"
    elif tensor.data_ptr() % _ALIGNMENT:
        found = f"memory aligned to less than {_ALIGNMENT} bytes"
    else:
        return
    raise Unsupported(f"an alias of {_text(tensor)}", found, _COPY)


def _require_concrete(array: Any) -> None:
    """Refuse what is no array on one device."""
    if isinstance(array, jax.core.Tracer):
        found = f"a tracer ({type(array).__name__})", "cross outside of jit, grad and vmap, or through pure_callback"
        raise DTypeError("a jax.Array with values", *found)
    if not isinstance(array, jax.Array):
        do = "pass the array: variable[...] of an nnx.Variable, torch.as_tensor for Python numbers"
        raise DTypeError("a jax.Array or a NumPy array", f"{type(array).__module__}.{type(array).__name__}", do)
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise DTypeError("a jax.Array of numbers", f"dtype {array.dtype}", "pass jax.random.key_data(key)")
    if array.is_deleted():
        raise Unsupported(
            "the values of a jax.Array", "it was deleted, or donated to a jit", "cross before, or do not donate it"
        )
    if len(array.sharding.device_set) > 1 or not array.is_fully_addressable:
        raise Unsupported(
            "a jax.Array on one device",
            f"one on {len(array.sharding.device_set)} devices",
            "cross shard by shard: [shard.data for shard in array.addressable_shards], or jax.device_put first",
        )
    if array.dtype.name not in _NAMES:
        raise DTypeError("a dtype that torch has", f"{array.dtype.name}", "cast it: array.astype(jax.numpy.int8)")


def _from_numpy(array: np.ndarray, alias: bool) -> Tensor:
    """NumPy by its bytes: torch takes no ml_dtypes, ignores the read-only flag, and aborts on negative strides."""
    name = array.dtype.name
    if name not in _NAMES or not array.dtype.isnative:
        raise DTypeError("a dtype that torch has", f"{array.dtype}", "cast it first, e.g. array.astype('float32')")
    if alias and not (array.flags.c_contiguous and array.flags.writeable):
        found = f"strides {array.strides}" if array.flags.writeable else "a read-only array, writable in torch"
        raise Unsupported("an alias of a NumPy array", found, _COPY)
    plain = array if alias else np.array(array, order="C", copy=True)
    return torch.from_numpy(plain.reshape(-1).view(np.uint8)).view(getattr(torch, name)).reshape(array.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(tensor: Tensor) -> str:
    return f"a {_name(tensor.dtype)} tensor of shape {tuple(tensor.shape)} on {tensor.device}"


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
