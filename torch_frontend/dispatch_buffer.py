"""What the dispatchers over a library's buffer share: when it is made, what it is handed, and what is refused.

`dispatch` is `begin` and `end`: between the two the tokens are under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moebius.core.errors import ConfigError, DTypeError, ShapeError, Unsupported
from moebius.core.registry import Problem
from moebius.torch_frontend import dispatch_limits as limits
from moebius.torch_frontend.dispatch import Options, Sent, routed
from moebius.torch_frontend.dispatch_pool import Generation, Lease
from moebius.torch_frontend.dispatch_ranks import OverRanks, not_compiled
from moebius.torch_frontend.dispatch_trip import Arrival, Trip, arrive, home, set_off
from moebius.torch_frontend.dtypes import as_dtype, promoted
from moebius.torch_frontend.sharding import held

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

WIRE = as_dtype(limits.DTYPE)


class Begun(NamedTuple):
    """Tokens under way, between the halves of a dispatch; what they are is undefined until `end`."""

    trip: Trip
    x_SD: Tensor
    weights_SK: Tensor
    ids: Tensor


class OverBuffer(OverRanks):
    """A dispatcher over a communication buffer, which is made here: by all ranks of the group together.

    Tokens are bfloat16; each rank's part of the output travels so, and the parts are added in float32 and rounded once.
    Gradients have no gradients. A rank whose own tensors need no gradient takes part in the backward pass all the same,
    unless gradients are disabled, on all ranks then; see OverRanks.
    Every call is made by all ranks, with any number of tokens each. Without `options.max_tokens` counts are read on the
    host in each forward pass, never in a backward pass; with it nothing is read, rows are as many as there could be,
    and a CUDA graph may hold all of it.

    Args:
        group: of the ranks that share the experts. combine_dtype: None or bfloat16. options: see Options.

    Raises:
        Unsupported: a limit of the library is passed; says which, and which dispatcher has another.
        ConfigError: there is no such group, or a setting that nothing could use.
    """

    name = ""
    arrives = "wanted"
    takes = WIRE

    def __init__(self, group: Any, combine_dtype: str | None, options: Options):
        super().__init__(group, combine_dtype)
        self.group = torch.distributed.group.WORLD if group is None else group
        self.options = options
        self._require(options)
        key = (self.name, self.group, *self.key()) if options.share else None
        self.lease = Lease(key, self.sizes(), self.make)

    @property
    def reads_host(self) -> bool:
        """Whether a forward pass reads on the host."""
        return self.options.max_tokens is None

    # --------------------------------------------------------------------------------------- what a library says of it
    def key(self) -> tuple[Any, ...]:
        """What layers must have in common to share a buffer."""
        return ()

    def sizes(self) -> tuple[int, ...]:
        """What the buffer has to be large enough for."""
        raise NotImplementedError

    def make(self, sizes: tuple[int, ...]) -> Any:
        """The library's object."""
        raise NotImplementedError

    def prepare(self, x_TD: Tensor, weights_TK: Tensor, n_experts: int) -> tuple[Generation, int]:
        """The buffer, and to how many rows this rank's tokens are padded."""
        # Empty tensors have null pointers: one row that goes nowhere in place of none.
        return self.lease.grow(self.sizes()), max(1, x_TD.shape[0])

    def routes(self, trip: Trip, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """float32 weights and -1 ids as the library wants them."""
        return weights_TK.contiguous(), ids_TK.to(torch.int64).contiguous()

    def leave(self, x: Tensor, trip: Trip, weights: Tensor, ids: Tensor) -> Arrival:
        """See Ferry; the last of its tensors is for `local`."""
        raise NotImplementedError

    def leave_again(self, x: Tensor, trip: Trip) -> Arrival:
        """See Ferry."""
        raise NotImplementedError

    def come_home(self, y: Tensor, trip: Trip, weights: Tensor | None) -> Arrival:
        """See Ferry."""
        raise NotImplementedError

    def local(self, trip: Trip, ids: Tensor) -> Tensor:
        """int32 ids [S, K] counted from this rank's first expert, e for no route."""
        return torch.where((ids >= 0) & (ids < trip.held), ids, trip.held).to(torch.int32)

    # -------------------------------------------------------------------------------------------------- the dispatcher
    @not_compiled
    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> tuple[Sent, Any]:
        """As Dispatcher.dispatch; rows without any route may come, and what they hold is undefined.

        Raises:
            DTypeError: x is not bfloat16. ShapeError, Unsupported, ConfigError: a limit is passed, or it was closed.
            On this rank: what one rank alone refuses leaves the others waiting.
        """
        return self.end(self.begin(x_TD, weights_TK, ids_TK, token_mask_T, n_experts))

    @not_compiled
    def begin(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        ids_TK: Int[Tensor, "T K"],
        token_mask_T: Bool[Tensor, " T"],
        n_experts: int,
    ) -> Begun:
        """The first half of `dispatch`: tokens set off, nothing is waited for on the device. See there."""
        trip = self._trip(x_TD, weights_TK, n_experts)
        ids_TK = _padded(routed(ids_TK, token_mask_T, n_experts, -1), trip.rows, -1)
        weights_TK = _padded(promoted(weights_TK, x_TD.dtype), trip.rows, 0)
        return Begun(trip, *set_off(trip, _padded(x_TD, trip.rows, 0), *self.routes(trip, weights_TK, ids_TK)))

    @not_compiled
    def end(self, begun: Begun) -> tuple[Sent, Trip]:
        """The second half: the current stream waits for what came."""
        trip = begun.trip
        x_SD, weights_SK = arrive(trip, begun.x_SD, begun.weights_SK)
        return Sent(x_SD, weights_SK, self.local(trip, begun.ids)), trip

    @not_compiled
    def combine(self, y_SD: Float[Tensor, "S D"], state: Any) -> Tensor:
        """[T, D]: each of this rank's tokens, its parts rounded to bfloat16, added in float32 and rounded once.

        Raises:
            ConfigError: the buffer was destroyed since `dispatch`, or the state is not of this dispatcher.
        """
        if not isinstance(state, Trip) or state.by is not self or y_SD.shape[0] != state.received:
            asked = f"combine of [{y_SD.shape[0]}, D] with the state of its dispatch"
            raise ConfigError(asked, "the state of another", "pass what the same dispatch returned")
        return home(state, y_SD.to(WIRE))[: state.tokens]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """See OverRanks; it holds the same buffer, as one more."""
        copied = super().__deepcopy__(memo)
        copied.lease = self.lease.again()
        return copied

    def close(self) -> None:
        """Give the buffer back; where no layer holds it any longer it is destroyed. By all ranks together."""
        self.lease.close()
        super().close()

    def _require(self, options: Options) -> None:
        problem = Problem(
            device=limits.DEVICES[0],
            dtype=limits.DTYPE,
            dim=options.dim,
            inter_dim=0,
            n_experts=held(options.n_experts, self.ranks),
            ranks=self.ranks,
        )
        limits.require(self.name, problem, options, self.combine_dtype)

    def _trip(self, x_TD: Tensor, weights_TK: Tensor, n_experts: int) -> Trip:
        """Of a call that begins now, with a buffer that is large enough for it."""
        self._check(x_TD, weights_TK, n_experts)
        at, (tokens, k) = self.position(), weights_TK.shape
        generation, rows = self.prepare(x_TD, weights_TK, n_experts)
        return Trip(self, at, generation, tokens, rows, n_experts, held(n_experts, self.ranks), k)

    def _check(self, x_TD: Tensor, weights_TK: Tensor, n_experts: int) -> None:
        asked = f"dispatch backend {self.name!r} of tokens {list(x_TD.shape)}"
        if x_TD.device.type not in limits.DEVICES:
            raise Unsupported(asked, f"on {x_TD.device.type}", "move them to a GPU, or name 'alltoall'")
        if x_TD.dtype != WIRE:
            do = "compute in bfloat16 (dtype=torch.bfloat16 or autocast), or name 'alltoall'"
            raise DTypeError(f"{asked} in {limits.DTYPE}", str(x_TD.dtype), do)
        asks = self.options._replace(dim=x_TD.shape[1], n_experts=n_experts, k=weights_TK.shape[1])
        if asks != self.options:
            self._require(asks)
        if x_TD.shape[1] > self.options.dim:
            do = f"build it for D={x_TD.shape[1]}"
            raise ShapeError(asked, f"a buffer for D={self.options.dim}", do)
        most = self.options.max_tokens
        if most is not None and x_TD.shape[0] > most:
            raise ShapeError(asked, f"max_tokens={most}", "give more, alike on every rank, or None")
        if most is None and x_TD.is_cuda and torch.cuda.is_current_stream_capturing():
            raise Unsupported(f"{asked} in a CUDA graph", "counts are read on the host", "give max_tokens")


def _padded(value_TX: Tensor, rows: int, with_: int) -> Tensor:
    more = rows - value_TX.shape[0]
    if not more:
        return value_TX
    return torch.cat([value_TX, value_TX.new_full((more, *value_TX.shape[1:]), with_)])
