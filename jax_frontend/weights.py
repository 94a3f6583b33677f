"""The canonical parameters and state of a module: drawing, reading and writing them by the names of core.layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from moebius.core import checks
from moebius.core.errors import CheckpointError, ConfigError, ShapeError
from moebius.core.layout import Parameter
from moebius.jax_frontend.checks import check_arrays
from moebius.jax_frontend.dtypes import accumulate_dtype, as_dtype


@nnx.register_variable_name("correction_bias", overwrite=True)
class CorrectionBias(nnx.Variable):
    """The router's correction bias: part of a checkpoint, moved by `Gate.update_bias` and never by a gradient."""


def draw(
    parameter: Parameter, rngs: nnx.Rngs, std: float = 0.02, *, dtype: Any = None, kernel_init: Any = None
) -> Array:
    """A new value: N(0, std), or `kernel_init(key, shape, dtype)`; zeros for a bias, which takes no key.

    Args:
        parameter: names shape and dtype. rngs: its `params` stream gives one key.
        dtype: to store in; None for the layout's.
    Raises:
        ConfigError: `rngs` has no such stream. ShapeError: `kernel_init` returned another shape.
    """
    stored = as_dtype(dtype or parameter.dtype)
    if parameter.zeros:
        return jnp.zeros(parameter.shape, stored)
    stream = getattr(rngs, "params", None)
    if stream is None:
        found = "no such stream" if isinstance(rngs, nnx.Rngs) else f"type {type(rngs).__name__}"
        raise ConfigError("rngs as flax.nnx.Rngs with a stream params or default", found, "pass flax.nnx.Rngs(seed)")
    key = stream()
    if kernel_init is not None:
        value: Array = kernel_init(key, parameter.shape, stored)
        if tuple(value.shape) != parameter.shape:
            asked = f"{parameter.name} of shape {list(parameter.shape)} from kernel_init"
            raise ShapeError(asked, f"shape {list(value.shape)}", "return the shape that it is called with")
        return value
    # Drawn promoted: a normal draw made of bfloat16 steps has no tails.
    return (std * jax.random.normal(key, parameter.shape, accumulate_dtype(stored))).astype(stored)


def new_parameter(
    parameter: Parameter,
    rngs: nnx.Rngs,
    *,
    dtype: Any = None,
    kernel_init: Any = None,
    kernel_metadata: Mapping[str, Any] | None = None,
) -> nnx.Param[Array]:
    """A variable that holds what `draw` draws.

    Args:
        parameter, rngs, dtype, kernel_init: see `draw`.
        kernel_metadata: of a matrix's variable, none of a bias's. An `out_sharding` that names no mesh places the value
            on the mesh of the context, as Flax does; where there is none it is kept for others to read and moves
            nothing, also later.
    """
    value = draw(parameter, rngs, dtype=dtype, kernel_init=kernel_init)
    if parameter.zeros or not kernel_metadata:
        return nnx.Param(value)
    axes_alone = isinstance(kernel_metadata.get("out_sharding"), tuple | PartitionSpec)
    if axes_alone and not kernel_metadata.get("mesh") and jax.sharding.get_abstract_mesh().empty:
        return nnx.Param(value, **{"eager_sharding": False, **kernel_metadata})
    return nnx.Param(value, **kernel_metadata)


def parameters(module: nnx.Module) -> dict[str, Array]:
    """The module's parameters by dotted name."""
    return {name: variable[...] for name, variable in _variables(module, nnx.Param).items()}


def load_parameters(module: nnx.Module, values: Mapping[str, Any]) -> None:
    """Put `values` into the module, cast to its parameters' dtype; all of them or, on an error, none.

    Args:
        values: by dotted name, JAX or NumPy arrays in the layout's shapes.

    Raises:
        CheckpointError: names are missing or unexpected; lists all of them.
        ShapeError: an array does not have the layout's shape. DTypeError: a value is neither JAX's nor NumPy's.
    """
    _load(_variables(module, nnx.Param), values, f"parameters of {type(module).__name__}")


def state(module: nnx.Module) -> dict[str, Array]:
    """What the module holds beside its parameters and a checkpoint holds too, by the dotted names of core.layout.state.

    That is the correction bias, float32; empty where the config holds none.
    """
    return {name: variable[...] for name, variable in _variables(module, CorrectionBias).items()}


def load_state(module: nnx.Module, values: Mapping[str, Any]) -> None:
    """Put `values` into the module's state, as `load_parameters` does into its parameters.

    Args:
        values: by dotted name, JAX or NumPy arrays in the layout's shapes; empty where the module has no state.

    Raises:
        CheckpointError: names are missing or unexpected; lists all of them.
        ShapeError: an array does not have the layout's shape. DTypeError: a value is neither JAX's nor NumPy's.
    """
    _load(_variables(module, CorrectionBias), values, f"state tensors of {type(module).__name__}")


def _load(own: Mapping[str, nnx.Variable[Array]], values: Mapping[str, Any], what: str) -> None:
    missing, unexpected = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
    if missing or unexpected:
        found = f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        raise CheckpointError(f"the {len(own)} {what}", found, "pass exactly these")
    check_arrays(**values)
    for name, value in values.items():
        checks.parameter(name, value, tuple(own[name].shape))
    # All are cast before the first is written.
    cast = {name: placed_like(own[name][...], value) for name, value in values.items()}
    for name, value in cast.items():
        own[name].set_value(value)


def placed_like(before: Any, value: Any) -> Array:
    """`value` in the dtype of `before`, and on its devices where it was put on some."""
    after = jnp.asarray(value, before.dtype)
    # A parameter that was placed on devices stays there.
    return jax.device_put(after, before.sharding) if getattr(before, "committed", False) else after


def _variables(module: nnx.Module, kind: type[nnx.Variable[Any]]) -> dict[str, nnx.Variable[Array]]:
    pairs = nnx.iter_graph(module)
    return {".".join(map(str, path)): node for path, node in pairs if isinstance(node, kind)}
