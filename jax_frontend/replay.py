"""Recording which experts a model's gates chose, and making them choose the same again.

What reinforcement learning needs: the experts that generated a text are those that are trained on it, though the
router's numbers have moved. The weights are taken from the live scores; the choice alone is repeated.

A gate has a handle where `config.enable_routing_replay` is set. Handles belong to their gates, not to the process: two
models, or a model and its frozen copy, do not get into each other's way, and their order is that of the modules.

What is recorded and what is to be repeated are Variables, so NNX's transformations carry them in and out: the contexts
stand around a call of nnx.jit. The mode is part of the module's structure, a change of it compiles anew. jax.jit drops
what is recorded, like everything that a call writes; inside of it, enter the contexts with the module that was merged
there and return what `collect` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moebius.core import checks
from moebius.core.errors import ConfigError, DTypeError, RoutingError, ShapeError

if TYPE_CHECKING:
    from jaxtyping import Int

RECORD, REPLAY = "record", "replay"
# Of no experts; those of no tokens would still have K columns.
_NONE = (0, 0)


@nnx.register_variable_name("replay_ids", overwrite=True)
class ReplayIds(nnx.Variable):
    """Experts that were chosen or are to be: not a parameter, and not worth a place in a checkpoint."""


class RouterReplay(nnx.Module):
    """One gate's handle.

    Args:
        n_experts: E.

    Attributes:
        mode: RECORD, REPLAY, or None for neither.
        recorded: ReplayIds [T, K] int32, the experts of the latest call while recording; no rows before one.
        target: ReplayIds [T, K] int32, the experts to choose while replaying; no rows for none.
    """

    def __init__(self, n_experts: int):
        self.n_experts = n_experts
        self.mode: str | None = None
        self.recorded = ReplayIds(jnp.zeros(_NONE, jnp.int32))
        self.target = ReplayIds(jnp.zeros(_NONE, jnp.int32))

    def chosen(self, n_tokens: int, k: int) -> Array | None:
        """The experts that the gate has to choose for these tokens; None to choose by itself.

        Raises:
            RoutingError: replaying without a target. ShapeError: it is of another number of tokens or experts.
        """
        if self.mode != REPLAY:
            return None
        target_TK = self.target[...]
        if target_TK.shape == _NONE:
            raise RoutingError("the experts to replay", "no target", "enter `replay` with one entry per gate")
        if tuple(target_TK.shape) != (n_tokens, k):
            asked = f"experts to replay of shape [{n_tokens}, {k}]"
            raise ShapeError(asked, f"shape {tuple(target_TK.shape)}", "pass what was recorded for these tokens")
        return target_TK

    def keep(self, ids_TK: Int[Array, "T K"]) -> None:
        """Take down what the gate chose, while recording."""
        if self.mode == RECORD:
            self.recorded.set_value(ids_TK)


def handles(module: nnx.Module) -> list[RouterReplay]:
    """The handles of all gates in `module`, in the order of its modules.

    Raises:
        ConfigError: there is none.
    """
    found = [handle for _, handle in nnx.iter_modules(module) if isinstance(handle, RouterReplay)]
    if not found:
        asked, do = f"the gates of a {type(module).__name__} that record", "set config.enable_routing_replay"
        raise ConfigError(asked, "no gate with a replay handle", do)
    return found


@contextmanager
def record(module: nnx.Module) -> Iterator[None]:
    """In this context every gate of `module` keeps the experts that it chooses; `collect` returns them.

    A gate that is called twice keeps the latest.

    Raises:
        ConfigError: no gate has a handle.
    """
    found = handles(module)
    for handle in found:
        handle.recorded.set_value(_none(handle.recorded))
    with _mode(found, RECORD):
        yield


def collect(module: nnx.Module) -> list[Array]:
    """What the latest `record` kept: [T, K] int32 for each gate, in the order of `handles`; [layers, T, K] of a stack.

    Raises:
        RoutingError: a gate was not called while recording.
    """
    recorded = [handle.recorded[...] for handle in handles(module)]
    missing = [index for index, ids in enumerate(recorded) if ids.shape[-2:] == _NONE]
    if missing:
        do = "run the model in `with record(module):` first"
        raise RoutingError(f"the recorded experts of {len(recorded)} gates", f"none of the gates {missing}", do)
    return recorded


@contextmanager
def replay(module: nnx.Module, indices: Sequence[Array]) -> Iterator[None]:
    """In this context every gate of `module` chooses the experts that it is given, weighted by its live scores.

    Args:
        indices: one [T, K] int32 or int64 for each gate, in the order of `handles`; ids in [0, E), also of padding.
    Raises:
        ConfigError: no gate has a handle, or there are more or fewer entries than gates.
        DTypeError: an entry is no array of integers. RoutingError: with MOEBIUS_CHECKS=full, an id out of range.
    """
    found = handles(module)
    if len(indices) != len(found):
        raise ConfigError(f"experts to replay for {len(found)} gates", f"{len(indices)} entries", "pass one per gate")
    for handle, ids in zip(found, indices, strict=True):
        _check(handle, ids)
    try:
        for handle, ids in zip(found, indices, strict=True):
            handle.target.set_value(jnp.asarray(ids, jnp.int32))
        with _mode(found, REPLAY):
            yield
    finally:
        for handle in found:
            handle.target.set_value(_none(handle.target))


def _check(handle: RouterReplay, ids: Any) -> None:
    if not isinstance(ids, Array | np.ndarray) or ids.dtype not in (jnp.int32, jnp.int64):
        what = str(ids.dtype) if hasattr(ids, "dtype") else type(ids).__name__
        raise DTypeError("experts to replay, int32 or int64", what, "pass what `collect` returned")
    if checks.environment() != "full" or isinstance(ids, jax.core.Tracer):
        return
    if bool(((ids < 0) | (ids >= handle.n_experts)).any()):
        asked = f"experts to replay in [0, {handle.n_experts})"
        raise RoutingError(asked, f"{ids.min()} to {ids.max()}", "give padding any expert: it is masked")


def _none(held: ReplayIds) -> Array:
    """No experts, in as many layers as are stacked."""
    return jnp.zeros((*held.shape[:-2], *_NONE), jnp.int32)


@contextmanager
def _mode(found: list[RouterReplay], mode: str) -> Iterator[None]:
    before = [handle.mode for handle in found]
    try:
        for handle in found:
            handle.mode = mode
        yield
    finally:
        for handle, own in zip(found, before, strict=True):
            handle.mode = own
