"""Dispatcher "te": Transformer Engine's expert parallelism, over NCCL EP.

Rows come sorted by expert, one for each route, in a buffer for as many as there could be: nothing can overflow. What a
token's routes gave is added on the way home, so each of them is rounded to bfloat16 before. Transformer Engine's own
functions are for arrays of all devices, outside of shard_map; here each device calls what those call on each device,
with a handle that is an array.

The library is made once for a process, by `bootstrap`: for layers of one D, E and K, of any number of tokens up to
that."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moebius.core.errors import BackendUnavailable, ConfigError, DTypeError, Unsupported
from moebius.core.registry import Problem
from moebius.jax_frontend.dispatch import Sent, routed
from moebius.jax_frontend.dtypes import promoted
from moebius.jax_frontend.matmul_te import row_experts
from moebius.jax_frontend.operators import alike, varying_like
from moebius.jax_frontend.sharding import ep_axis, held
from moebius.jax_frontend.transport import axis_size, varying

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_WIRE = "bfloat16"
# In pieces of 16 bytes: of a row, of a map of routes, of a token's weights for all experts.
_WIDTH, _STEP, _EXPERTS = 8, 4, 4
_MOST_ROUTES = 32
_PIECES = ("EpPrepare", "EpDispatch", "EpCombine", "EpDispatchBwd", "EpCombineBwd")
_made_for: list[int] = []  # K, of which the library's own record says nothing


class Away(NamedTuple):
    """What `combine` needs: the library's handle, uint8 memory of this device, and which routes were sent."""

    memory: Array
    sent_TK: Bool[Array, "T K"]


class _Call(NamedTuple):
    """What is static of one: tokens of this device, K, and the rows that a device receives."""

    tokens: int
    k: int
    rows: int


@dataclass(frozen=True)
class TE:
    """Tokens by Transformer Engine's expert parallelism, inside of jax.shard_map, on CUDA; reverse mode, once.

    An expert that a token names twice gets it once, with the sum of the weights.

    Args:
        axis: of the mesh. combine_dtype: None or bfloat16.

    Raises:
        Unsupported: another combine_dtype.
    """

    axis: str
    combine_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.combine_dtype not in (None, _WIRE):
            found = f"'te' adds {_WIRE} alone"
            raise Unsupported(f"combine_dtype={self.combine_dtype!r}", found, "leave it out, or name 'alltoall'")

    @property
    def ranks(self) -> int:
        """Devices along the axis."""
        return axis_size(self.axis)

    @property
    def rank(self) -> Any:
        """This device's place on the axis: traced."""
        return lax.axis_index(self.axis)

    def dispatch(
        self,
        x_TD: Float[Array, "T D"],
        weights_TK: Float[Array, "T K"],
        ids_TK: Int[Array, "T K"],
        token_mask_T: Bool[Array, " T"],
        n_experts: int,
    ) -> tuple[Sent, Away]:
        """As Dispatcher.dispatch; what rows without a route hold is undefined.

        Raises:
            DTypeError: x is not bfloat16. Unsupported: a limit of the library is passed.
            ConfigError: it was not made, or for other layers; the ranks do not divide the experts.
        """
        held(n_experts, self.ranks)  # or it raises
        rows = _rows_of(x_TD, ids_TK, n_experts, self.ranks)
        ids_TK = routed(ids_TK, token_mask_T, n_experts, -1)
        weights_TK, ids_TK = once_each(promoted(weights_TK, x_TD.dtype), ids_TK)
        sent_TK = ids_TK >= 0
        # Of what goes nowhere the library's gradient may be unwritten; the adjoint of this makes it 0.
        x_TD = jnp.where(jnp.any(sent_TK, axis=1, keepdims=True), x_TD, 0)
        T, K = ids_TK.shape
        if T == 0:  # one row that goes nowhere
            x_TD, weights_TK = jnp.zeros((1, x_TD.shape[1]), x_TD.dtype), jnp.zeros((1, K), weights_TK.dtype)
            ids_TK = jnp.full((1, K), -1, jnp.int32)
        x_TD, weights_TK, ids_TK = varying(self.axis, x_TD, weights_TK, ids_TK)
        x_RD, weights_R, sizes_e, memory = _away(_Call(max(1, T), K, rows), x_TD, weights_TK, ids_TK)
        return Sent(x_RD, weights_R[:, None], row_experts(rows, sizes_e)[:, None]), Away(memory, sent_TK)

    def combine(self, y_SD: Float[Array, "S D"], state: Away) -> Array:
        """[T, D]: each of this rank's tokens, its parts rounded to bfloat16, added in float32 and rounded once."""
        T, K = state.sent_TK.shape
        y_SD, memory = alike(y_SD.astype(_WIRE), state.memory)
        y_TD = _home(_Call(max(1, T), K, y_SD.shape[0]), y_SD, memory)[:T]
        # Nothing came home for some of them: unwritten.
        return jnp.where(jnp.any(state.sent_TK, axis=1, keepdims=True), y_TD, 0)


# ---------------------------------------------------------------------------------- out, and home; each other's adjoint
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _away(call: _Call, x_TD: Array, weights_TK: Array, ids_TK: Array) -> tuple[Array, ...]:
    return _away_forward(call, x_TD, weights_TK, ids_TK)[0]


def _away_forward(call: _Call, x_TD: Array, weights_TK: Array, ids_TK: Array) -> tuple[Any, Array]:
    sizes, _, memory = _piece("EpPrepare")(ids_TK, call.k, 0, False)
    rows, weights = _piece("EpDispatch")(memory, ids_TK, x_TD, weights_TK, call.k, 0, call.rows, False)
    # For one device: what their first axis counts.
    out = [varying_like(value[0], x_TD) for value in (rows, weights, sizes)]
    memory = varying_like(memory, x_TD)
    return (*out, memory), memory


def _away_backward(call: _Call, memory: Array, grads: tuple[Array, ...]) -> tuple[Any, ...]:
    dx, dweights = grads[0][None], grads[1][None]
    found = _piece("EpDispatchBwd")(memory, dx, dweights, call.k, 0, (call.tokens,), None)
    dx_TD, dweights_TK = (varying_like(value, memory) for value in found)
    return dx_TD, dweights_TK, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _home(call: _Call, y_RD: Array, memory: Array) -> Array:
    y_TD: Array = _piece("EpCombine")(memory, y_RD[None], call.k, 0, (call.tokens,), None)
    return varying_like(y_TD, memory)


def _home_backward(call: _Call, memory: Array, dy_TD: Array) -> tuple[Array, None]:
    dy = _piece("EpCombineBwd")(memory, dy_TD, call.k, 0, call.rows, False)
    return varying_like(dy[0], memory), None


_away.defvjp(_away_forward, _away_backward)
_home.defvjp(lambda call, y, memory: (_home(call, y, memory), memory), _home_backward)


def once_each(weights_TK: Float[Array, "T K"], ids_TK: Int[Array, "T K"]) -> tuple[Array, Array]:
    """The same routes with no expert twice in a token, nor weights where there is no route.

    Of an expert's slots the first keeps the sum of the weights; the others become -1.
    """
    same_TKK = (ids_TK[:, :, None] == ids_TK[:, None, :]) & (ids_TK >= 0)[:, :, None]
    first_TK = (ids_TK >= 0) & ~jnp.any(jnp.tril(same_TKK, -1), axis=2)
    summed_TK = jnp.sum(jnp.where(same_TKK, weights_TK[:, None, :], 0), axis=2)
    return jnp.where(first_TK, summed_TK, 0), jnp.where(first_TK, ids_TK, -1)


# --------------------------------------------------------------------------------------- made once, and what it refuses
def bootstrap(mesh: Any, *, n_experts: int, k: int, dim: int, max_tokens: int) -> None:
    """Make the library for this process, outside of jit, before the first call; by all processes together.

    Args:
        mesh: of every call; over its axis "ep", or only one, the experts are spread. n_experts: E. k: routes of a
            token. dim: D. max_tokens: no device has more in any call; each has room for all routes of all ranks.
    Raises:
        Unsupported: a limit is passed; or it was made before: `finalize` unmakes it.
        BackendUnavailable, or whatever the import of Transformer Engine raises.
    """
    axis = ep_axis(mesh)
    ranks = int(mesh.shape[axis])
    asked = f"Transformer Engine's EP for D={dim}, E={n_experts}, K={k}, {ranks} ranks"
    refused = _against(dim, held(n_experts, ranks), ranks, k)
    if refused is not None:
        raise Unsupported(asked, refused, "name another dispatcher")
    if _config() is not None:
        raise Unsupported(asked, "it was made before, once for this process", "call finalize() first")
    load()
    sharding, ep = import_module("transformer_engine.jax.sharding"), import_module("transformer_engine.jax.ep")
    tokens = -(-max(1, max_tokens) // _STEP) * _STEP
    guard = sharding.global_shard_guard(sharding.MeshResource(ep_resource=axis))
    with warnings.catch_warnings():
        # JAX wants set_mesh, of which the library would see a mesh without its devices.
        warnings.filterwarnings("ignore", ".*context manager has been deprecated", DeprecationWarning)
        with mesh, guard:
            # A rank may get all routes of all tokens.
            ep.ep_bootstrap(None, None, n_experts, tokens, ranks * tokens * k, dim)
    _made_for[:] = [k]


def finalize() -> None:
    """Unmake it, after the last call, by all processes together; what was compiled is compiled again."""
    import_module("transformer_engine.jax.ep").ep_finalize()
    _made_for.clear()


def supports(problem: Problem) -> str | None:
    """Why it cannot serve; None where it can, as it can on one rank, where nothing moves."""
    if problem.ranks == 1:
        return None
    if problem.device != "cuda":
        return f"Transformer Engine's EP needs CUDA, not {problem.device}"
    if problem.dtype != _WIRE:
        return f"it sends {_WIRE} alone"
    if problem.capability is not None and problem.capability < (9, 0):
        return "it needs compute capability 9.0"
    return _against(problem.dim, problem.n_experts, problem.ranks)


def load() -> None:
    """Load what is called here.

    Raises:
        BackendUnavailable: it was built without it, is older than 2.20, or the NCCL is too old. Otherwise whatever its
            import raises.
    """
    package = import_module("transformer_engine")
    found = f"transformer_engine {getattr(package, '__version__', 'of unknown version')}"
    if not getattr(package, "is_nccl_ep_available", lambda: False)():
        do = "build transformer-engine[jax] 2.20 or later with NCCL EP, and load NCCL 2.30.4 or later"
        raise BackendUnavailable("dispatch backend 'te'", f"{found}: no NCCL EP, or NCCL is too old", do)
    lacks = [name for name in _PIECES if not hasattr(_pieces(), f"{name}Primitive")]
    if lacks:
        do = "take a version that has them, as 2.20.2 does"
        raise BackendUnavailable("dispatch backend 'te'", f"{found} has no {', '.join(lacks)}", do)


def _against(dim: int, e: int, ranks: int, k: int = 1) -> str | None:
    """The limit that is passed, in words."""
    if ranks < 2:
        return f"it takes 2 ranks or more, not {ranks}"
    if dim % _WIDTH:
        return f"it takes hidden sizes that are multiples of {_WIDTH}, not {dim}"
    if e & (e - 1):
        return f"it takes a power of two of experts on a rank, not {e}"
    if e * ranks % _EXPERTS:
        return f"it takes numbers of experts that are multiples of {_EXPERTS}, not {e * ranks}"
    most = min(_MOST_ROUTES, e * ranks)
    return None if k <= most else f"it takes K up to {most}, not {k}"


def _rows_of(x_TD: Array, ids_TK: Array, n_experts: int, ranks: int) -> int:
    """The rows that a device receives, as the library was made; or a refusal of what it was not made for."""
    (T, D), K = x_TD.shape, ids_TK.shape[1]
    asked = f"dispatch backend 'te' of [{T}, {D}], E={n_experts}, K={K}, {ranks} ranks"
    if str(x_TD.dtype) != _WIRE:
        raise DTypeError(f"{asked} in {_WIRE}", str(x_TD.dtype), "compute in bfloat16, or name 'alltoall'")
    made = _config()
    do = "call moebius.jax_frontend.dispatch_te.bootstrap(mesh, ...) for these, once, before the first call"
    if made is None or not _made_for:
        raise ConfigError(asked, "Transformer Engine's EP was not made by it in this process", do)
    sizes = made.hidden_dim, made.num_experts, _made_for[0], made.ep_size
    if (D, n_experts, K, ranks) != sizes or T > made.max_tokens_per_rank:
        found = "it was made for D={}, E={}, K={}, {} ranks".format(*sizes)
        raise ConfigError(asked, f"{found}, {made.max_tokens_per_rank} tokens", do)
    return int(made.recv_capacity_per_rank)


def _config() -> Any:
    """What the library says it was made for; None before."""
    try:
        return _pieces().get_ep_config()
    except RuntimeError:
        return None


def _pieces() -> Any:
    return import_module("transformer_engine.jax.cpp_extensions.ep")


def _piece(name: str) -> Any:
    """What one device calls, as the library's own functions do: in the order of XLA's collectives, never beside one."""
    pieces = _pieces()
    in_order = getattr(pieces, "_on_collective_stream", lambda call: call)
    return in_order(getattr(pieces, f"{name}Primitive").impl)
