"""The layers as Linen modules: the NNX modules through Flax's bridge, made anew from the variables in every call.

    layer = linen.MoE(config)
    variables = layer.init(key, x)
    y, changed = layer.apply(variables, x, mutable=["routing_statistics"])

`variables["params"]` is nested by the names of moebius.core.layout, `variables["params"]["experts"]["down_projs"]`:
`parameters` and `load_parameters` exchange them with an NNX module. What that holds beside them are the collections
"correction_bias", "routing_statistics" and "loss_scale"; `apply` takes zeros, and a scale of one, where it is given
none. What a call records is dropped unless its collection is mutable.

Imported by its own name alone: `from moebius.jax_frontend import linen`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util
from flax.core import meta
from jax import Array

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.errors import CheckpointError, ConfigError, Unsupported
from moebius.jax_frontend import fake_gate, gate, grouped_experts, moe
from moebius.jax_frontend.checks import check_arrays
from moebius.jax_frontend.weights import placed_like

# The names that the Variables' classes have as collections.
PARAMS, CORRECTION_BIAS, STATISTICS, SCALE = "params", "correction_bias", "routing_statistics", "loss_scale"
_RETURNED = "pass the variables that `init` returned"


class _Layer(linen.Module):
    """What the layers share: which NNX module they are, and how their fields reach it."""

    # The NNX class; of the fields, those that are set after construction, and how.
    _kind: ClassVar[Any]
    _after: ClassVar[tuple[tuple[str, Callable[[Any, Any], None]], ...]] = ()

    config: Any

    def setup(self) -> None:
        names = {field.name for field in dataclasses.fields(self)} - {"parent", "name"}
        settings = {name: getattr(self, name) for name in names - dict(self._after).keys()}
        later = [(act, getattr(self, name)) for name, act in self._after]
        held = None if self.is_initializing() else _flat(self.variables.get(PARAMS, {})).keys()
        make = partial(_make, type(self)._kind, settings, later, held)
        self.bridge = nnx.bridge.ToLinen(make, skip_rng="kernel_init" not in names)
        linen.share_scope(self, self.bridge)


def _make(kind: Any, settings: Any, later: Any, held: Any, **rngs: Any) -> Any:
    """The NNX module; after `init` without values, which the bridge puts in.

    Args:
        held: names of the parameters that there are, None in `init`.
    """
    if held is not None and "kernel_init" in settings:
        settings = settings | {"kernel_init": _unfilled}
    metadata = settings.get("kernel_metadata")
    if metadata:
        # Linen's manner: a box with the names of the axes, which says where the value may lie and moves nothing.
        boxed = {"linen_meta_type": meta.Partitioned} if "out_sharding" in metadata else {}
        settings = settings | {"kernel_metadata": {"eager_sharding": False, **boxed, **metadata}}
    module = kind(**settings, **rngs)
    for act, value in later:
        act(module, value)
    wanted = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    if held is not None:
        _require(f"the {len(wanted)} parameters of a linen.{kind.__name__}", wanted, held, _RETURNED)
    return module


def _require(asked: str, wanted: Set[str], held: Set[str], do: str) -> None:
    missing, unexpected = sorted(wanted - held), sorted(held - wanted)
    if missing or unexpected:
        found = f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        raise CheckpointError(asked, found, do)


def _unfilled(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _assign(name: str) -> Callable[[Any, Any], None]:
    return lambda module, value: None if value is None else setattr(module, name, value)


def _spread(module: Any, value: Any) -> None:
    if value is not None:
        module.init_token_dispatcher(value)


def _evaluate(module: Any, value: bool) -> None:
    module.eval() if value else module.train()


class GroupedExperts(_Layer):
    """moebius.jax_frontend.GroupedExperts as a Linen module.

    Args: as there; what is an attribute there is one here that is passed to the constructor.
    """

    backend: Any = None
    dtype: Any = None
    param_dtype: Any = None
    kernel_init: Any = None
    kernel_metadata: Any = None
    mesh: Any = None
    expert_activation_grouped: Any = None

    _kind = grouped_experts.GroupedExperts
    _after = (("expert_activation_grouped", _assign("expert_activation_grouped")),)

    def __call__(self, x: Array, token_mask: Array, weights: Array, indices: Array) -> Array:
        """[T, D] in the compute dtype; see moebius.jax_frontend.experts."""
        y: Array = self.bridge(x, token_mask, weights, indices)
        return y


class GroupedExpertsDeepEP(_Layer):
    """moebius.jax_frontend.GroupedExpertsDeepEP as a Linen module.

    Args: as there; `ep_mesh` is given to its init_token_dispatcher.
    """

    backend: Any = None
    dispatcher_backend: str | None = None
    dispatcher_num_sms: int = 20
    dispatcher_share_token_dispatcher: bool = True
    dispatcher_async_dispatch: bool = False
    dtype: Any = None
    param_dtype: Any = None
    kernel_init: Any = None
    kernel_metadata: Any = None
    expert_activation: Any = None
    ep_mesh: Any = None

    _kind: ClassVar[Any] = grouped_experts.GroupedExpertsDeepEP
    _after = (("expert_activation", _assign("expert_activation")), ("ep_mesh", _spread))

    def __call__(self, x: Array, token_mask: Array, weights: Array, indices: Array) -> Array:
        """[T, D] in the compute dtype; see moebius.jax_frontend.experts."""
        y: Array = self.bridge(x, token_mask, weights, indices)
        return y


class GroupedExpertsTE(GroupedExpertsDeepEP):
    """moebius.jax_frontend.GroupedExpertsTE as a Linen module; see GroupedExpertsDeepEP."""

    _kind = grouped_experts.GroupedExpertsTE


class FakeBalancedGate(_Layer):
    """moebius.jax_frontend.FakeBalancedGate as a Linen module, without variables."""

    skip_first_n_experts: int = 0
    noise: float = 0.0

    _kind = fake_gate.FakeBalancedGate

    def __call__(
        self, x: Array, token_mask: Array, cp_axis: Any = None, n_sequences: int = 1
    ) -> tuple[Array, Array, None]:
        """(weights [T, K], indices [T, K], None)."""
        routed: tuple[Array, Array, None] = self.bridge(x, token_mask, cp_axis, n_sequences)
        return routed


class _Routing(_Layer):
    """What the layers with a router share: training or not, and the step of the correction bias."""

    def _called(self, deterministic: bool | None, *args: Any) -> Any:
        if MoEConfig.of(self.config).enable_routing_replay:
            found = "a gate that lives no longer than a call, so nobody has its handle"
            raise Unsupported("enable_routing_replay=True in a Linen layer", found, "replay the routes of NNX modules")
        if deterministic is None:
            return self.bridge(*args)
        return self.bridge(*args, nnx_method=partial(_called, deterministic))

    def update_bias(self, axis_name: Any = None) -> None:
        """Move the correction bias towards balance, see moebius.jax_frontend.Gate.update_bias.

        Call it as `layer.apply(variables, method="update_bias", mutable=["correction_bias", "routing_statistics"])`,
        which returns (None, the two collections).

        Raises:
            ConfigError: the config updates no bias, or the collections may not change.
        """
        fixed = [name for name in (CORRECTION_BIAS, STATISTICS) if not self.is_mutable_collection(name)]
        if fixed:
            do = f"pass mutable={[CORRECTION_BIAS, STATISTICS]} to apply"
            raise ConfigError("update_bias", f"{' and '.join(fixed)} may not change", do)
        self.bridge(axis_name, nnx_method=_update_bias)


class Gate(_Routing):
    """moebius.jax_frontend.Gate as a Linen module.

    Args: as there. deterministic: True outside of training: no losses, nothing recorded.
    """

    gate_precision: Any = None
    dtype: Any = None
    param_dtype: Any = None
    kernel_init: Any = None
    kernel_metadata: Any = None
    route_backend: str | None = None
    deterministic: bool = False
    track_load: bool = False

    _kind = gate.Gate
    _after = (("deterministic", _evaluate), ("track_load", _assign("track_load")))

    def __call__(
        self,
        x: Array,
        token_mask: Array,
        cp_axis: Any = None,
        n_sequences: int = 1,
        deterministic: bool | None = None,
    ) -> tuple[Array, Array, Array | None]:
        """Route tokens, see moebius.jax_frontend.Gate. deterministic: None for the field of that name."""
        routed: tuple[Array, Array, Array | None] = self._called(deterministic, x, token_mask, cp_axis, n_sequences)
        return routed


class MoE(_Routing):
    """moebius.jax_frontend.MoE as a Linen module.

    Args: as there. deterministic: True outside of training: no losses, nothing recorded.
    """

    backend: Any = None
    dtype: Any = None
    param_dtype: Any = None
    kernel_init: Any = None
    kernel_metadata: Any = None
    mesh: Any = None
    deterministic: bool = False

    _kind = moe.MoE
    _after = (("deterministic", _evaluate),)

    def __call__(
        self, x: Array, padding_mask: Array | None = None, cp_axis: Any = None, deterministic: bool | None = None
    ) -> Array:
        """The layer's output, see moebius.jax_frontend.MoE. deterministic: None for the field of that name."""
        y: Array = self._called(deterministic, x, padding_mask, cp_axis)
        return y


def _called(deterministic: bool, module: Any, *args: Any) -> Any:
    _evaluate(module, deterministic)
    return module(*args)


def _update_bias(module: Any, axis_name: Any) -> None:
    getattr(module, "gate", module).update_bias(axis_name)


def parameters(variables: Mapping[str, Any]) -> dict[str, Array]:
    """The parameters in a layer's variables by the dotted names of moebius.jax_frontend.parameters.

    Raises:
        CheckpointError: these are no variables, but perhaps one collection of them.
    """
    return _flat(_collection(variables, PARAMS))


def load_parameters(variables: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`variables` with other parameters, cast to those' dtype; `variables` itself stays as it is.

    Args:
        variables: a layer's, as `init` returns them. Abstract ones of jax.eval_shape will do: in what is returned the
            correction bias is zero then, and the collections that `apply` makes by itself are left out.
        values: by dotted name, JAX or NumPy arrays, as moebius.jax_frontend.parameters returns them.
    Raises:
        CheckpointError: names are missing or unexpected; lists all of them. ShapeError: an array of another shape.
        DTypeError: a value is neither JAX's nor NumPy's.
    """
    loaded = _loaded(variables, values, PARAMS)
    if _abstract(loaded.get(CORRECTION_BIAS)):
        loaded[CORRECTION_BIAS] = jax.tree.map(jnp.zeros_like, loaded[CORRECTION_BIAS])
    return loaded


def state(variables: Mapping[str, Any]) -> dict[str, Array]:
    """The correction bias by the dotted name of moebius.jax_frontend.state; empty where there is none.

    Raises:
        CheckpointError: see `parameters`.
    """
    return _flat(_collection(variables, CORRECTION_BIAS))


def load_state(variables: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`variables` with another correction bias, as `load_parameters` does with parameters; those may stay abstract."""
    return _loaded(variables, values, CORRECTION_BIAS)


def _flat(collection: Any) -> dict[str, Any]:
    flat: dict[str, Any] = traverse_util.flatten_dict(meta.unbox(collection), sep=".")
    return flat


def _loaded(variables: Mapping[str, Any], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    collection = _collection(variables, name)
    own = _flat(collection)
    do = "pass exactly these" if own else _RETURNED
    _require(f"the {len(own)} arrays of the collection {name!r}", own.keys(), values.keys(), do)
    check_arrays(**values)
    for key, value in values.items():
        checks.parameter(key, value, tuple(own[key].shape))
    cast = {key: placed_like(own[key], value) for key, value in values.items()}
    kept = {key: value for key, value in variables.items() if key in (PARAMS, CORRECTION_BIAS) or not _abstract(value)}
    nested = traverse_util.unflatten_dict(cast, sep=".")
    return kept | ({name: meta.replace_boxed(collection, nested)} if collection else {})


def _collection(variables: Mapping[str, Any], name: str) -> Any:
    if variables and not variables.keys() & {PARAMS, CORRECTION_BIAS, STATISTICS, SCALE}:
        found = f"the keys {', '.join(map(str, variables))}"
        raise CheckpointError(f"variables with the collection {name!r}", found, _RETURNED)
    return variables.get(name, {})


def _abstract(collection: Any) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(collection))
