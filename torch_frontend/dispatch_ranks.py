"""What the dispatchers over several ranks share: an agreement on what is sent; dispatch and combine by a transport.

A rank that left a collective out would leave the others waiting for ever. So everything on which they must agree
travels ahead, with the numbers of tokens, and is read on the host once a forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.core.errors import ConfigError, ShapeError
from moebius.core.liveness import Position
from moebius.core.precision import DTYPES
from moebius.torch_frontend import liveness, preflight
from moebius.torch_frontend.dispatch import Sent, routed
from moebius.torch_frontend.dtypes import as_dtype, promoted
from moebius.torch_frontend.liveness import Layer, collective, peers
from moebius.torch_frontend.recompute import recomputing
from moebius.torch_frontend.sharding import held
from moebius.torch_frontend.transport import Layout, collect, spread

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

P = ParamSpec("P")
R = TypeVar("R")

# torch 2.13 renamed it and warns of the old name.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def not_compiled(method: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable, which would load the compiler, most of a second, also where nothing is compiled."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        called: Callable[P, R] = torch.compiler.disable(method) if torch.compiler.is_compiling() else method
        return called(*args, **kwargs)

    return call


class Spread(NamedTuple):
    """What `combine` needs: where tokens went, the dtype of x, of which forward pass they are, and how many."""

    layout: Layout
    dtype: torch.dtype
    carrier: Carrier
    tokens: int


class Carrier(NamedTuple):
    """A dispatcher as the Transport of one forward pass, which its errors name, and of the backward pass to it."""

    dispatcher: OverRanks
    at: Position

    def send(self, x: Tensor, layout: Layout) -> Tensor:
        """See Transport."""
        self.dispatcher.mark(self.at)
        return self.dispatcher.send(x, layout)

    def back(self, y: Tensor, layout: Layout) -> Tensor:
        """See Transport."""
        self.dispatcher.mark(self.at)
        return self.dispatcher.back(y, layout)


class OverRanks:
    """A dispatcher over the ranks of a process group; its subclasses say how tokens travel.

    A token's weights and ids travel with it. Spec: core.reference.dispatch. Each rank's gradients are those of the sum
    of all ranks' losses. All ranks of the group call `dispatch`, `combine` and backward in the same order, with any
    number of tokens each, none included. Parameters are frozen on every rank or on none. Under torch.compile both
    methods run between the graphs, not in them; torch.func does not transform them.

    Gradients are enabled (torch.is_grad_enabled) on every rank or on none. That is compared in the pass in which layers
    are, and in each pass in which ranks tell one another how many tokens they have. With `max_tokens`, and by DeepEP's
    Buffer, they do not: there a rank that differs later goes on alone, and the others wait in their backward pass.

    Args:
        group: the torch.distributed process group over which the experts are spread; None for the default one.
        combine_dtype: in which each rank's part of the output travels, None for x's: rounded once more than on one
            rank.

    Attributes:
        layer: what errors call the layer whose forward pass began last; None before the first.
        takes: the one dtype of its tokens; None for any. arrives: see core.dispatchers.routed_share.

    Raises:
        ConfigError: there is no such group, or this process is not in it.
    """

    layer: Layer | None = None
    takes: torch.dtype | None = None
    arrives = "tokens"

    def __init__(self, group: Any = None, combine_dtype: str | None = None):
        if not dist.is_initialized():
            do = "call torch.distributed.init_process_group first"
            raise ConfigError("experts over the ranks of a process group", "torch.distributed is not initialised", do)
        self.group, self.combine_dtype = group, combine_dtype
        self.ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            found = f"global rank {dist.get_rank()} is not in it"
            raise ConfigError("a process group of this rank", found, "pass the group of this rank's mesh dimension")
        peers(group).dispatchers.add(self)
        self._alone = Layer(f"of {type(self).__name__} alone")

    @property
    def reads_host(self) -> bool:
        """Whether a forward pass reads on the host: "allgather" and "alltoall" once. A backward pass never does."""
        return True

    @not_compiled
    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> tuple[Sent, Spread]:
        """Tokens of all ranks with routes to this one's experts, ids counted from the first of them, e for no route.

        Raises:
            ConfigError: the ranks do not divide E, or gradients are enabled on some and not on others.
            ShapeError: the ranks' tokens differ in more than their number. Raised on every rank; what one rank refuses
            before, a wrong width for instance, leaves the others waiting.
            RankLost: a rank is missing; also in `combine`, and in the backward pass.
        """
        carrier = Carrier(self, self.position())
        weights_TK = promoted(weights_TK, x_TD.dtype)
        ids_TK = routed(ids_TK, token_mask_T, n_experts, -1)
        # Refused only where all ranks have told of their experts: rounded up, it is good for counting.
        layout, grads = self.layout(Note.of(x_TD, weights_TK, n_experts), ids_TK, -(-n_experts // self.ranks))
        e = held(n_experts, self.ranks)
        x_SD, weights_SK, ids_SK = spread(carrier, layout, x_TD, weights_TK, ids_TK, grads)
        local_SK = ids_SK - self.rank * e
        local_SK = torch.where((local_SK >= 0) & (local_SK < e), local_SK, e)
        return Sent(x_SD, weights_SK, local_SK), Spread(layout, x_TD.dtype, carrier, x_TD.shape[0])

    @not_compiled
    def combine(self, y_SD: Float[Tensor, "S D"], state: Spread) -> Tensor:
        """[T, D]: each of this rank's tokens, its parts added promoted in the order of the ranks, rounded once."""
        wire = state.dtype if self.combine_dtype is None else as_dtype(self.combine_dtype)
        return collect(state.carrier, state.layout, y_SD.to(wire), state.dtype)

    def position(self) -> Position:
        """The position of the forward pass that begins now; the ranks were compared before it."""
        here = peers(self.group)
        preflight.check(here)
        here.watch.at = self._alone.begin() if self.layer is None else self.layer.at
        return here.watch.at

    def mark(self, at: Position) -> None:
        """What comes next is of the forward pass `at`, or of the backward pass to it: errors and the log say so."""
        backward = at.phase == "forward" and recomputing()
        peers(self.group).watch.at = at._replace(phase="backward") if backward else at

    def close(self) -> None:
        """Give back what it holds; after a group's last dispatcher no thread is left. By all ranks, or by none."""
        here = liveness.known(self.group)
        if here is None:  # the group was destroyed, and its thread with it
            return
        here.dispatchers.discard(self)
        if not here.dispatchers:
            liveness.close(dist.group.WORLD if self.group is None else self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """One more over the same ranks: a process group cannot be copied. It is closed by itself."""
        copied = memo[id(self)] = copy.copy(self)
        copied._alone = Layer(self._alone.name)
        here = liveness.known(self.group)
        if here is not None and self in here.dispatchers:
            here.dispatchers.add(copied)
        return copied

    def __enter__(self) -> OverRanks:
        """For `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        """`close`."""
        self.close()

    def layout(self, note: Note, ids_TK: Int[Tensor, "T K"], e: int) -> tuple[Layout, tuple[bool, bool]]:
        """Where tokens go, and whether any rank needs the gradients of x and of the weights; -1 is no route."""
        raise NotImplementedError

    def send(self, x: Tensor, layout: Layout) -> Tensor:
        """See Transport."""
        raise NotImplementedError

    def back(self, y: Tensor, layout: Layout) -> Tensor:
        """See Transport."""
        raise NotImplementedError

    def exchange_notes(self, note: Note, *more: Tensor) -> tuple[list[Note], list[list[int]]]:
        """Every rank's note, and the numbers on the device that it says besides: read on the host, once.

        All agree, or an error on every rank.
        """
        sent = torch.cat([_on_device(note, more), *(value.to(torch.int64) for value in more)])
        notes = sent.new_empty(self.ranks * len(sent))
        collective(all_gather, notes, sent, group=self.group)
        rows = notes.view(self.ranks, -1).tolist()
        found = [Note(*row[: len(note)]) for row in rows]
        _check(found)
        return found, [row[len(note) :] for row in rows]


class Note(NamedTuple):
    """What a rank tells the others of its tokens before it sends them."""

    tokens: int
    width: int
    k: int
    n_experts: int
    dtype: int
    grad: int
    x_grad: int
    weights_grad: int

    @classmethod
    def of(cls, x_TD: Tensor, weights_TK: Tensor, n_experts: int) -> Note:
        """Of this rank's tokens."""
        grad = torch.is_grad_enabled()
        dtype = [as_dtype(name) for name in DTYPES].index(x_TD.dtype)
        return cls(
            tokens=x_TD.shape[0],
            width=x_TD.shape[1],
            k=weights_TK.shape[1],
            n_experts=n_experts,
            dtype=dtype,
            grad=grad,
            x_grad=grad and x_TD.requires_grad,
            weights_grad=grad and weights_TK.requires_grad,
        )

    def __str__(self) -> str:
        return f"D={self.width}, K={self.k}, E={self.n_experts}, {tuple(DTYPES)[self.dtype]}"


def _on_device(note: Note, beside: Sequence[Tensor]) -> Tensor:
    """[len(note)] int64, where the other tensors are. The host waits for no copy: only pinned memory is copied so."""
    device = beside[0].device if beside else torch.device("cpu")
    on_host = torch.tensor(note, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def wanted(notes: list[Note]) -> tuple[bool, bool]:
    """Whether any rank needs the gradient of x, and of the weights."""
    return any(note.x_grad for note in notes), any(note.weights_grad for note in notes)


def _check(notes: list[Note]) -> None:
    """Alike on every rank, since all read the same notes: no rank is left waiting in a collective."""
    if len({str(note) for note in notes}) > 1:
        found = "; ".join(f"rank {rank}: {note}" for rank, note in enumerate(notes))
        raise ShapeError("tokens that differ in their number alone", found, "call the same layer on every rank")
    without = [str(rank) for rank, note in enumerate(notes) if not note.grad]
    if 0 < len(without) < len(notes):
        found = f"none on rank {', '.join(without)}, some on others"
        raise ConfigError("gradients on every rank or on none", found, "enter torch.no_grad on all ranks or on none")
