"""Which device holds which experts: the stacked parameters on a mesh, cut along the axis of the experts."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moebius.core import layout
from moebius.core.errors import ConfigError
from moebius.jax_frontend import preflight

# The axis of a mesh along which experts are spread; the name is NeMo Automodel's.
EP = "ep"

_Module = TypeVar("_Module", bound=nnx.Module)


def held(n_experts: int, ranks: int) -> int:
    """e, the experts that each of `ranks` ranks holds.

    Raises:
        ConfigError: the ranks do not divide the experts.
    """
    e, rest = divmod(n_experts, ranks)
    if rest:
        do = "use a number of ranks that divides the experts"
        raise ConfigError(f"{n_experts} experts over {ranks} ranks", f"{rest} left over", do)
    return e


def ep_axis(mesh: Any) -> str:
    """The axis of the devices that share experts: the mesh's only one, or "ep".

    Raises:
        ConfigError: `mesh` is none, or has several axes and none of that name.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ConfigError("a jax.sharding.Mesh", f"a {type(mesh).__name__}", "make one with jax.make_mesh")
    names = tuple(map(str, mesh.axis_names))
    if len(names) == 1:
        return names[0]
    if EP not in names:
        found = f"{len(names)} axes named {', '.join(names)}" if names else "no axis"
        do = f'pass a mesh of the one axis, or name it "{EP}" in jax.make_mesh(axis_shapes, axis_names)'
        raise ConfigError(f'a mesh of one axis, or with an axis "{EP}"', found, do)
    return EP


def shard_experts(module: _Module, ep_mesh: Any) -> _Module:
    """Spread the experts of `module` over the devices of a mesh, in place, and let it compute there.

    Device r of n along the mesh's axis holds the experts [r * e, (r + 1) * e); values stay, and what other axes of the
    mesh have cut stays cut. Parameters without values, as nnx.eval_shape leaves them, are told where to lie. Once more
    over another mesh moves them there.

    Args:
        module: an experts module; of a stack of layers, with their axis before that of the experts.
        ep_mesh: jax.sharding.Mesh of one axis, or with an axis "ep".
    Returns:
        `module`.
    Raises:
        ConfigError: `module` is none, the mesh has no such axis or no devices, or n does not divide the experts; or the
            processes of the mesh differ. RankLost: one of them did not come; see preflight.py. After an error `module`
            is as it was.
    """
    axis = ep_axis(ep_mesh)
    own = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    if not {"gate_and_up_projs", "down_projs"} <= own.keys():
        found = f"parameters of its own: {', '.join(own) or 'none'}"
        raise ConfigError(f"the experts of a {type(module).__name__}", found, "pass the experts module, as moe.experts")
    if not isinstance(ep_mesh, Mesh):
        found = "an AbstractMesh, which has none"
        raise ConfigError(f"experts over the devices of {ep_mesh.shape[axis]} ranks", found, "pass a jax.sharding.Mesh")
    experts: Any = module
    held(experts.config.n_routed_experts, ep_mesh.shape[axis])
    before, experts.ep_mesh = experts.ep_mesh, ep_mesh
    rows = layout.experts(experts.config)
    try:
        preflight.register(experts, ep_mesh)  # before values move, which all processes of the mesh do together
        placed = [_placed(own[row.name].get_value(), len(row.shape), ep_mesh, axis) for row in rows]
    except BaseException:
        experts.ep_mesh = before
        raise
    for row, value in zip(rows, placed, strict=True):
        own[row.name].set_value(value)
    return module


def _placed(value: Any, n_axes: int, mesh: Mesh, axis: str) -> Any:
    """A value whose last `n_axes` axes are an expert's and that of the experts before them, over the mesh."""
    before = value.ndim - n_axes
    explicit = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[axis] == AxisType.Explicit
    if isinstance(value, jax.core.Tracer) and not explicit:
        parts = [P.UNCONSTRAINED] * before + [axis] + [P.UNCONSTRAINED] * (n_axes - 1)
        return lax.with_sharding_constraint(value, NamedSharding(mesh, P(*parts)))
    sharding = NamedSharding(mesh, P(*_parts(value, before, mesh, axis)))
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    return (jax.sharding.reshard if isinstance(value, jax.core.Tracer) else jax.device_put)(value, sharding)


def _parts(value: Any, at: int, mesh: Mesh, axis: str) -> list[Any]:
    """How the mesh cuts each axis of the value: `axis` the one at `at`, others as they do, where that still fits."""
    parts: list[tuple[str, ...]] = [()] * value.ndim
    lies = jax.typeof(value).sharding if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)
    if isinstance(lies, NamedSharding) and lies.mesh.shape == mesh.shape:
        known = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in lies.spec]
        parts[: len(known)] = [tuple(name for name in part if name != axis) for part in known]
    both = (axis, *parts[at])
    parts[at] = both if value.shape[at] % math.prod(mesh.shape[name] for name in both) == 0 else (axis,)
    return [part[0] if len(part) == 1 else part or None for part in parts]
