"""Before the first call over several processes: do all of them have the same layers, settings and versions?

The layers of a mesh that spans more than one process of jax.distributed are compared through its key-value store, never
by a collective; see moebius.core.preflight. One that is built with values is compared there and then, as JAX moves
values to a mesh by a collective of its own; one that is built under jit, or by moebius.jax_frontend.linen, when it is
first called, under jit: when the call is traced, together with all others that are new. Afterwards nothing is sent. The
environment's MOEBIUS_PREFLIGHT says how many seconds a process waits for the others, 300 by default, or "off"; set it
alike on all.

A module is compared wherever it is called: over its mesh, or inside of a shard_map over it. The function `experts`
inside of a shard_map is not: a dispatcher there knows the name of an axis and how long it is, and JAX tells nobody on
which devices, and so in which processes, it lies. A module with that mesh is how to have its layer compared.

JAX's transformations copy modules. So without values a layer counts as any other that looks the same, and is a new one
where there is none: of what is built under jit the kinds of layers are compared, in their order, and not how many there
are of each. Linen builds a layer when it is called, so that of its layers each new kind is compared by itself: where
only one process has it, that one says that the others did not come. A process that traces a call alone, say to print a
table, waits for the others' calls.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moebius.core import preflight
from moebius.jax_frontend.liveness import Layer, Peers, peers


def register(module: Any, mesh: Mesh) -> None:
    """`module` is an experts module that is spread over `mesh`; twice counts once.

    Without values, as in a trace, it is compared when one is called, and counts as any other that looks the same.

    Raises: as `begin`.
    """
    here = peers(mesh)
    if here is None:
        return
    value = module.gate_and_up_projs.get_value()
    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        _registered(here, module)
        return
    if not any(reference() is module for _, reference in here.modules):
        _added(here, module)
    check(here)


def begin(module: Any, mesh: Mesh | None) -> None:
    """A call of `module` over the devices of `mesh` begins: compare the processes, if that is due, and count.

    Raises:
        ConfigError: the processes differ. RankLost: one of them did not come.
    """
    here = None if mesh is None else peers(mesh)
    if here is None:
        return
    layer = _registered(here, module)
    check(here)
    here.watch.at = layer.begin()
    here.watch.enter()
    here.watch.leave()


def check(here: Peers) -> None:
    """Compare the processes, where that was not done since the last layer was registered.

    Raises: as `begin`.
    """
    if here.compared == len(here.modules):
        return
    preflight.compare(here, facts, _versions())


def facts(module: Any) -> dict[str, Any]:
    """What an experts module must have in common with those of other processes, in short words."""
    config, asked = module.config, getattr(module, "dispatcher_backend", module.backend.dispatcher)
    compute = "" if module.dtype is None else f", computed in {np.dtype(module.dtype).name}"
    return {
        "D": config.expert_dim,
        "E": config.n_routed_experts,
        "K": config.n_activated_experts,
        "I": config.moe_inter_dim,
        "dtype": module.gate_and_up_projs.get_value().dtype.name + compute,
        "experts": module.backend_name,
        "dispatcher": {"torch": "allgather"}.get(asked, asked),
        "combine_dtype": module.backend.combine_dtype,
        "dispatcher_bound": module.backend.dispatcher_bound,
        "mesh": ", ".join(f"{name}={size}" for name, size in module.ep_mesh.shape.items()),
    }


def _registered(here: Peers, module: Any) -> Layer:
    for number, (_, reference) in enumerate(here.modules):
        if reference() is module:
            return here.layers[number]
    now = facts(module)
    alike = [number for number, registered in enumerate(here.modules) if preflight.as_it_is(*registered, facts) == now]
    if len(alike) > 1:
        return here.alike.setdefault(alike[0], Layer(f"{alike[0]}, or one like it"))
    return here.layers[alike[0]] if alike else _added(here, module)


def _added(here: Peers, module: Any) -> Layer:
    layer = Layer(str(len(here.modules)))
    here.modules.append((facts(module), weakref.ref(module)))
    here.layers.append(layer)
    return layer


def _versions() -> dict[str, str]:
    return preflight.versions_of(jax=jax.__version__)
