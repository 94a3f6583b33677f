"""Before the first dispatch over a group: do all its ranks have the same layers, settings and versions?

Layers register when their experts are spread over a mesh. At the first dispatch, and again where layers were registered
since, the ranks compare what they have through the group's store, never by a collective; see moebius.core.preflight.
The environment's MOEBIUS_PREFLIGHT says how many seconds a rank waits for the others, 300 by default, or "off"; set it
alike on all ranks. Afterwards it costs a comparison of two numbers in each forward pass.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from moebius.core import preflight
from moebius.torch_frontend.liveness import Layer, Peers, peers

_NAMES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def name_layers(model: nn.Module) -> nn.Module:
    """Let errors call each layer by its qualified name in `model`, in place of its number; returns `model`.

    A module does not know its name. Call it before the first forward pass.
    """
    for name, module in model.named_modules():
        _NAMES[module] = name
    return model


def register(module: nn.Module, mesh: Any) -> None:
    """`module` is an experts module that was spread over the ranks of a one-dimensional mesh; twice counts once."""
    if mesh.size() > 1:
        _registered(peers(mesh.get_group()), module)


def begin(module: nn.Module, group: Any) -> Layer:
    """A forward pass of `module` over the ranks of `group` begins: compare them, if that is due, and count.

    Raises:
        ConfigError: the ranks differ. RankLost: one of them did not come.
    """
    # As not_compiled in dispatch_ranks.py: ranks talk to one another.
    own = torch.compiler.disable(_begin) if torch.compiler.is_compiling() else _begin
    layer: Layer = own(module, group)
    return layer


def _begin(module: nn.Module, group: Any) -> Layer:
    here = peers(group)
    layer = _registered(here, module)
    check(here)
    layer.name = _NAMES.get(module, layer.name)
    watch = here.watch
    watch.at, watch.asynchronous = layer.begin(), next(module.parameters()).is_cuda
    watch.enter()  # also for a dispatcher whose library's collectives nobody sees
    watch.leave()
    return layer


def check(here: Peers) -> None:
    """Compare the ranks of a group, where that was not done since the last layer was registered.

    Raises: as `begin`.
    """
    if here.compared == len(here.modules):
        return
    # Whoever computes gradients takes part in backward passes, which not every dispatcher could compare later.
    settings = {"gradients": "enabled" if torch.is_grad_enabled() else "disabled"}
    preflight.compare(here, facts, _versions(), settings)


def exchange(what: str, value: Any, group: Any, detail: str = "") -> list[Any]:
    """Every rank's `value`, which JSON can hold, by rank: through the store, without a collective. All ranks call.

    Args:
        what: this rank does, in words; alike on all of them. detail: more words of it, which may differ.
    Raises:
        ConfigError: a rank does something else in its turn.
        RankLost: a rank did not come within MOEBIUS_PREFLIGHT seconds; where that is "off", within 300.
    """
    here = peers(group)
    store = here.store()
    if store is None:
        return [value] * len(here.members.ranks)
    limit = preflight.timeout() or preflight.SECONDS
    return preflight.meet(store, here.members, what, value, limit, preflight.next_key(here), detail)


def facts(module: Any) -> dict[str, Any]:
    """What an experts module must have in common with those of other ranks, in short words."""
    config, asked = module.config, getattr(module, "dispatcher_backend", module.backend.dispatcher)
    compute = "" if module.dtype is None else f", computed in {_short(module.dtype)}"
    return {
        "name": _NAMES.get(module),
        "D": config.expert_dim,
        "E": config.n_routed_experts,
        "K": config.n_activated_experts,
        "I": config.moe_inter_dim,
        "dtype": _short(module.gate_and_up_projs.dtype) + compute,
        "experts": module.backend_name,
        "dispatcher": {"torch": "allgather"}.get(asked, asked),
        "combine_dtype": module.backend.combine_dtype,
        "max_tokens": module.backend.dispatcher_max_tokens,
    }


def _registered(here: Peers, module: nn.Module) -> Layer:
    layer = here.layers.get(module)
    if layer is None:
        layer = here.layers[module] = Layer(_NAMES.get(module, str(len(here.modules))))
        here.modules.append((facts(module), weakref.ref(module)))
    return layer


def _versions() -> dict[str, str]:
    return preflight.versions_of(torch=torch.__version__)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
