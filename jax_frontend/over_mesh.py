"""One call of the experts over all devices of a mesh: each computes its own experts and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moebius.core import checks, layout
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError, Unsupported
from moebius.core.stages import Tap, untapped
from moebius.jax_frontend.checks import check_arrays, check_devices, check_values
from moebius.jax_frontend.dispatch import Dispatcher
from moebius.jax_frontend.dispatch_ranks import OverRanks
from moebius.jax_frontend.experts import WeightedActivation, experts
from moebius.jax_frontend.sharding import ep_axis

# (parameters of the experts here, *arrays of the t tokens here) -> [t, ...].
OnDevice = Callable[..., Array]
_Module = TypeVar("_Module", bound=nnx.Module)


@dataclass(frozen=True)
class Run:
    """A call of `experts` with these settings. Unlike a partial, two of the same settings are equal, as jit asks."""

    config: MoEConfig
    backend: str | None
    dispatcher: Dispatcher
    activation: WeightedActivation | None
    double_backward: bool
    remat: str
    permute_backend: str | None
    check: bool

    def __call__(self, parameters: Mapping[str, Array], *tokens: Array, tap: Tap = untapped) -> Array:
        return experts(parameters, *tokens, tap=tap, **{one.name: getattr(self, one.name) for one in fields(self)})


@dataclass(frozen=True)
class Count:
    """The routes that a dispatcher drops, on one device."""

    dispatcher: OverRanks
    n_experts: int

    def __call__(self, parameters: Mapping[str, Array], indices: Array, token_mask: Array) -> Array:
        return self.dispatcher.dropped(indices, token_mask, self.n_experts)


def in_force(mesh: Mesh) -> bool:
    """Whether the caller is one of the mesh's devices already: inside of a shard_map over its axis of experts.

    Raises:
        ConfigError: it is, and that axis has another length.
    """
    axis = ep_axis(mesh)
    try:
        found = int(lax.axis_size(axis))
    except NameError:
        return False
    if found != mesh.shape[axis]:
        asked = f'experts over the {mesh.shape[axis]} devices of the mesh axis "{axis}"'
        do = "spread them over the mesh of that shard_map: shard_experts(module, mesh)"
        raise ConfigError(asked, f"a shard_map over {found} devices of that name", do)
    return True


def check_call(run: Run, parameters: Mapping[str, Array], *tokens: Array) -> None:
    """What `experts` looks at, which over a mesh sees one device's part of it.

    Args:
        run: the call. parameters, tokens: its arguments, of all devices.
    Raises:
        ShapeError, DTypeError, RoutingError: see `experts`.
    """
    x, mask, weights, indices = tokens
    arrays = {"x": x, "token_mask": mask, "weights": weights, "indices": indices}
    check_arrays(**arrays)
    checks.tokens(x, run.config.expert_dim)
    checks.token_mask(mask, x.shape[0])
    checks.routes(weights, indices, x.shape[0])
    checks.parameters(parameters, layout.experts(run.config))
    check_devices(**arrays, **parameters)
    if run.check or checks.environment() == "full":
        check_values(weights, indices, mask, run.config.n_routed_experts)


@partial(jax.jit, static_argnames=("run", "mesh", "check_vma"), inline=True)
def over_devices(
    run: OnDevice, mesh: Mesh, parameters: Mapping[str, Array], tokens: tuple[Array, ...], check_vma: bool = True
) -> Array:
    """What `run` returns of every device's experts and tokens: [T, ...], split over the devices as the tokens are.

    Tokens are split over all axes of the mesh, that of the experts last, so no two devices compute the same; what
    other axes have cut of the parameters is gathered for the call. Up to one less than the number of devices are added,
    without a route. Axes that a shard_map around the call has in hand stay out of it.

    Args:
        run: see OnDevice; called inside of a shard_map. Compared by value, as all that is no array.
        mesh: over one of whose axes the experts are spread.
        parameters: of all experts, by name. tokens: arrays [T, ...], of which zeros stand for a token without a route.
        check_vma: of jax.shard_map.
    Raises:
        Unsupported: inside of a shard_map over other axes of the mesh with check_vma=True.
        ConfigError: another mesh is in force.
    """
    axis = ep_axis(mesh)
    varying = frozenset().union(*(jax.typeof(value).manual_axis_type.varying for value in tokens))
    if varying:
        # Seen with JAX 0.10 and 0.11: what one keeps for its gradient, inside of the other, does not compile.
        asked = f'experts over the mesh axis "{axis}" inside of a shard_map over {", ".join(sorted(map(str, varying)))}'
        do = "pass check_vma=False to it, or let it span the axis of experts too"
        raise Unsupported(asked, "check_vma=True, with which JAX does not compile the gradient", do)
    here = _as_marked(mesh)
    split = (*(name for name in mesh.axis_names if name not in (axis, *here.manual_axes)), axis)
    explicit = tuple(name for name in split if name in here.explicit_axes)
    each = jax.shard_map(
        lambda p, own: run(p, *own),
        # Where there is a context already, with axes marked otherwise, no other mesh may be named.
        mesh=None if explicit or here != mesh.abstract_mesh else mesh,
        in_specs=(P(axis), P(split)),
        out_specs=P(split),
        axis_names=set(split),
        check_vma=check_vma,
    )
    n_tokens, n = tokens[0].shape[0], math.prod(mesh.shape[name] for name in split)
    added = max(1, -(-n_tokens // n)) * n - n_tokens

    def whole(parameters: Mapping[str, Array], tokens: tuple[Array, ...]) -> Array:
        y: Array = each(parameters, tuple(_lengthened(value, added) for value in tokens) if added else tokens)
        return y[:n_tokens] if added else y

    if explicit:
        lies = jax.typeof(tokens[0]).sharding.spec
        whole = jax.sharding.auto_axes(whole, axes=explicit, out_sharding=NamedSharding(here, P(*lies[:1])))
    return whole(parameters, tokens)


def _as_marked(mesh: Mesh) -> AbstractMesh:
    """The mesh, with its axes as they are marked here."""
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        return mesh.abstract_mesh
    if context.shape != mesh.shape:
        asked, found = f"experts over the mesh {dict(mesh.shape)}", f"the mesh {dict(context.shape)} in force"
        raise ConfigError(asked, found, "call jax.set_mesh with the module's mesh, or spread the experts over that one")
    return context


def over_none(
    run: Run, mesh: Mesh | None, parameters: Mapping[str, Array], tokens: tuple[Array, ...], tap: Tap
) -> Array:
    """What `run` returns where no mesh spreads the experts: [T, D]; of Explicit axes see `explicit_mesh`.

    Args:
        run: the call. mesh: the module's, which has one device then. parameters, tokens: its arguments, wherever the
            caller put them. tap: see `experts`.
    """
    x, mask, weights, indices = tokens
    arrays = {"x": x, "token_mask": mask, "weights": weights, "indices": indices}
    check_arrays(**arrays)
    explicit = explicit_mesh(parameters, tokens)
    if explicit is None:
        return run(parameters, *tokens, tap=tap)
    check_devices(**arrays, **parameters)
    whole = jax.sharding.auto_axes(
        lambda parameters, tokens: run(parameters, *tokens, tap=tap),
        axes=explicit.explicit_axes,
        out_sharding=NamedSharding(explicit, jax.typeof(x).sharding.spec),
    )
    y: Array = whole(parameters, _on(mesh, tokens))
    return y


def explicit_mesh(*arrays: Any) -> AbstractMesh | None:
    """The mesh, with Explicit axes, on which arrays lie by their types or which is in force; None where none is.

    The axes of jax.make_mesh are Explicit by default. Types say then how arrays lie, and JAX asks at each gather,
    update and product of arrays that lie differently how the result shall lie. What no mesh spreads runs with these
    axes Auto instead, where XLA decides, and returns its output as its tokens lie.

    Args:
        arrays: trees of them.
    """
    context = jax.sharding.get_abstract_mesh()
    if not context.empty:
        return context if context.explicit_axes else None
    lie = (jax.typeof(array).sharding.mesh for array in jax.tree.leaves(arrays))
    return next((mesh for mesh in lie if mesh.explicit_axes), None)


def over_layer(layer: _Module, mesh: Mesh | None, call: Callable[..., Array], x: Array, *others: Array | None) -> Array:
    """call(layer, x, *others), of x's shape; of Explicit axes see `explicit_mesh`.

    Args:
        layer: with Variables beside its parameters, which `call` may write. mesh: that of its experts, or None.
        call: takes any copy of the layer.
    """
    explicit = explicit_mesh(nnx.state(layer), x, others)
    if explicit is None:
        return call(layer, x, *others)
    graph, *states = nnx.split(layer, nnx.Param, ...)

    def whole(parameters: Any, rest: Any, tokens: Any) -> tuple[Array, Any]:
        copied = nnx.merge(graph, parameters, rest, copy=True)
        y = call(copied, *tokens)
        pairs = zip(nnx.to_flat_state(rest), nnx.to_flat_state(nnx.state(copied, nnx.Not(nnx.Param))), strict=True)
        written = [after for before, after in pairs if after[1].get_value() is not before[1].get_value()]
        return y, nnx.from_flat_state(written)

    lie = NamedSharding(explicit, jax.typeof(x).sharding.spec), NamedSharding(explicit, P())
    inside = jax.sharding.auto_axes(whole, axes=explicit.explicit_axes, out_sharding=lie)
    y, written = inside(*_on(mesh, (*states, (x, *others))))
    nnx.update(layer, written)
    return y


def _on(mesh: Mesh | None, arrays: Any) -> Any:
    """Arrays that by their types lie on no mesh, on each device of this one; without jit JAX asks for the devices."""
    if mesh is None:
        return arrays
    whole = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda array: jax.sharding.reshard(array, whole) if jax.typeof(array).sharding.mesh.empty else array, arrays
    )


def _lengthened(value: Array, added: int) -> Array:
    return jnp.pad(value, [(0, added), *[(0, 0)] * (value.ndim - 1)])
