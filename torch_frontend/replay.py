"""Recording which experts a model's gates chose, and making them choose the same again.

What reinforcement learning needs: the experts that generated a text are those that are trained on it, though the
router's numbers have moved. The weights are taken from the live scores; the choice alone is repeated.

A gate has a handle where `config.enable_routing_replay` is set. Handles belong to their gates, not to the process: two
models, or a model and its frozen copy, do not get into each other's way, and their order is that of the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moebius.core import checks
from moebius.core.errors import ConfigError, DTypeError, RoutingError, ShapeError
from moebius.torch_frontend.recompute import recomputing

if TYPE_CHECKING:
    from jaxtyping import Int

RECORD, REPLAY = "record", "replay"


class RouterReplay:
    """One gate's handle.

    Args:
        n_experts: E.

    Attributes:
        mode: RECORD, REPLAY, or None for neither.
        recorded: [T, K] int32, the experts of the latest call while recording; None before one.
        target: [T, K] integer, the experts to choose while replaying; None for none.
    """

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts
        self.mode: str | None = None
        self.recorded: Tensor | None = None
        self.target: Tensor | None = None
        # The latest first pass was replayed, so a recomputation without a target would choose other experts.
        self._replayed = False

    def chosen(self, n_tokens: int, k: int) -> Tensor | None:
        """The experts that the gate has to choose for these tokens; None to choose by itself.

        Raises:
            RoutingError: replaying without a target, or a recomputation of a replayed pass after its context ended.
            ShapeError: the target is of another number of tokens or experts.
        """
        if self.mode != REPLAY:
            if self._replayed and recomputing():
                found = "its context has ended"
                raise RoutingError("a replayed pass, recomputed in backward", found, "run backward inside of `replay`")
            self._replayed = False
            return None
        if self.target is None:
            raise RoutingError("the experts to replay", "no target", "enter `replay` with one entry per gate")
        if tuple(self.target.shape) != (n_tokens, k):
            asked = f"experts to replay of shape [{n_tokens}, {k}]"
            raise ShapeError(asked, f"shape {tuple(self.target.shape)}", "pass what was recorded for these tokens")
        self._replayed = True
        return self.target

    def keep(self, ids_TK: Int[Tensor, "T K"]) -> None:
        """Take down what the gate chose, while recording."""
        if self.mode == RECORD and not recomputing():
            self.recorded = ids_TK


def handles(module: nn.Module) -> list[RouterReplay]:
    """The handles of all gates in `module`, in the order of its modules.

    Raises:
        ConfigError: there is none.
    """
    held = (getattr(gate, "replay", None) for gate in module.modules())
    found = [handle for handle in held if isinstance(handle, RouterReplay)]
    if not found:
        asked, do = f"the gates of a {type(module).__name__} that record", "set config.enable_routing_replay"
        raise ConfigError(asked, "no gate with a replay handle", do)
    return found


@contextmanager
def record(module: nn.Module) -> Iterator[None]:
    """In this context every gate of `module` keeps the experts that it chooses; `collect` returns them.

    A gate that is called twice keeps the latest; a recomputation under activation checkpointing is no call.

    Raises:
        ConfigError: no gate has a handle.
    """
    found = handles(module)
    for handle in found:
        handle.recorded = None
    with _mode(found, RECORD):
        yield


def collect(module: nn.Module) -> list[Tensor]:
    """What the latest `record` kept: [T, K] int32 for each gate, in the order of `handles`; no copies.

    Raises:
        RoutingError: a gate was not called while recording.
    """
    recorded = [handle.recorded for handle in handles(module)]
    missing = [index for index, ids in enumerate(recorded) if ids is None]
    if missing:
        do = "run the model in `with record(module):` first"
        raise RoutingError(f"the recorded experts of {len(recorded)} gates", f"none of the gates {missing}", do)
    return [ids for ids in recorded if ids is not None]


@contextmanager
def replay(module: nn.Module, indices: Sequence[Tensor]) -> Iterator[None]:
    """In this context every gate of `module` chooses the experts that it is given, weighted by its live scores.

    Under activation checkpointing backward belongs inside the context: it runs the gates again.

    Args:
        indices: one [T, K] int32 or int64 for each gate, in the order of `handles`; ids in [0, E), also of padding.
    Raises:
        ConfigError: no gate has a handle, or there are more or fewer entries than gates.
        DTypeError: an entry is no tensor of integers. RoutingError: with MOEBIUS_CHECKS=full, an id out of range.
    """
    found = handles(module)
    if len(indices) != len(found):
        raise ConfigError(f"experts to replay for {len(found)} gates", f"{len(indices)} entries", "pass one per gate")
    for handle, ids in zip(found, indices, strict=True):
        _check(handle, ids)
    try:
        for handle, ids in zip(found, indices, strict=True):
            handle.target = ids
        with _mode(found, REPLAY):
            yield
    finally:
        for handle in found:
            handle.target = None


def _check(handle: RouterReplay, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        what = str(ids.dtype) if isinstance(ids, Tensor) else type(ids).__name__
        raise DTypeError("experts to replay, int32 or int64", what, "pass what `collect` returned")
    if checks.environment() == "full" and bool(((ids < 0) | (ids >= handle.n_experts)).any()):
        asked = f"experts to replay in [0, {handle.n_experts})"
        raise RoutingError(asked, f"{ids.min()} to {ids.max()}", "give padding any expert: it is masked")


@contextmanager
def _mode(found: list[Any], mode: str) -> Iterator[None]:
    before = [handle.mode for handle in found]
    try:
        for handle in found:
            handle.mode = mode
        yield
    finally:
        for handle, own in zip(found, before, strict=True):
            handle.mode = own
