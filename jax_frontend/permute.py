"""Steps 4 and 8: tokens to rows sorted by expert, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moebius.core.registry import Backend, Problem, Registry
from moebius.jax_frontend.dispatch import Sent
from moebius.jax_frontend.dtypes import promoted
from moebius.jax_frontend.matmul import device_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class PermuteState(NamedTuple):
    """Where each row came from and went. A slot is token * K + k.

    Attributes:
        slot_of_row_R: [R] int32. row_of_slot_SK: [S, K] int32, its inverse.
    """

    slot_of_row_R: Int[Array, " R"]
    row_of_slot_SK: Int[Array, "S K"]


class Permuted(NamedTuple):
    """Rows sorted by expert; inside one expert by token, then slot. Rows past sum(group_sizes_e) are padding.

    Attributes:
        rows_RD: one row per (token, slot). row_weights_R: its routing weight, 0 in padding.
        group_sizes_e: int32, rows of each expert. row_experts_R: int32, each row's expert, e in padding.
        state: for `unpermute`; a PermuteState, or what another backend keeps.
    """

    rows_RD: Float[Array, "R D"]
    row_weights_R: Float[Array, " R"]
    group_sizes_e: Int[Array, " e"]
    row_experts_R: Int[Array, " R"]
    state: Any


class Permuter(NamedTuple):
    """One backend: functions with the arguments of `permute` and `unpermute`, but `backend`."""

    permute: Callable[[Sent, int], Permuted]
    unpermute: Callable[..., Array]


def permute(sent: Sent, n_experts: int, *, backend: str | None = None) -> Permuted:
    """Copy each token once per slot, in the order of its experts; slots without a route come last.

    Spec: core.reference.permute. R = S * K always, so every shape is static.

    Args:
        sent: tokens with local ids in [0, n_experts], n_experts for no route.
        n_experts: e, experts held here.
        backend: a registered name, or None for moebius' own.
    Raises:
        ConfigError, BackendUnavailable, Unsupported: `backend` was named and cannot serve; says why.
    """
    name = choose_permuter(backend, sent.x_SD, n_experts).name if sent.ids_SK.size else "xla"
    return _permuter(name).permute(sent, n_experts)


def choose_permuter(backend: str | None, x: Array, n_experts: int) -> Backend:
    """The registry row that serves tokens like `x` [S, D]; see Registry.choose."""
    device, capability = device_of(x)
    size: dict[str, Any] = {"dim": x.shape[1], "inter_dim": x.shape[1], "n_experts": n_experts}
    return PERMUTERS.choose(backend, Problem(device=device, dtype=str(x.dtype), capability=capability, **size))


def _permute(sent: Sent, n_experts: int) -> Permuted:
    routes = sort_routes(sent, n_experts)
    # Promoted and cast back: exact for the rows, and the gradient of x is summed promoted and rounded once.
    rows_RD = _take(promoted(sent.x_SD), routes.state.slot_of_row_R // max(sent.ids_SK.shape[1], 1))
    return routes._replace(rows_RD=rows_RD.astype(sent.x_SD.dtype))


def sort_routes(sent: Sent, n_experts: int) -> Permuted:
    """What `permute` returns, but for the rows: the tokens as they came stand in their place."""
    S, K = sent.ids_SK.shape
    slots_R = jnp.arange(S * K, dtype=jnp.int32)
    ids_R = sent.ids_SK.reshape(-1)
    row_experts_R, order_R = lax.sort_key_val(ids_R, slots_R, is_stable=True)
    # Of the ids as they come: of sorted ones neighbours add to one number, which on a GPU took 20 times as long.
    group_sizes_e = jnp.zeros(n_experts, jnp.int32).at[ids_R].add(1, mode="drop")
    row_of_slot_SK = jnp.zeros_like(slots_R).at[order_R].set(slots_R, unique_indices=True)
    state = PermuteState(order_R, row_of_slot_SK.reshape(S, K))
    weights_R = _take(sent.weights_SK.reshape(-1), order_R)
    # where, not a product: a NaN weight of a masked token must not survive.
    row_weights_R = jnp.where(row_experts_R < n_experts, weights_R, 0)
    return Permuted(sent.x_SD, row_weights_R, group_sizes_e, row_experts_R, state)


def unpermute(
    out_RD: Float[Array, "R D"],
    state: Any,
    row_weights_R: Float[Array, " R"] | None = None,
    *,
    partial: bool = False,
) -> Array:
    """Sum each token's rows in promote_types(dtype, float32), weighted where weights are given, and round once.

    Spec: core.reference.unpermute. The backend is the one that made `state`.

    Args:
        out_RD: rows in the order of `permute`; padding rows are zero.
        state: Permuted.state.
        row_weights_R: [R] weights to multiply by before the sum, None for none.
        partial: other ranks hold the rest of the sum: do not round yet.
    Returns:
        [S, D], dtype of out_RD, promoted where partial.
    """
    name = "xla" if isinstance(state, PermuteState) else "te"
    return _permuter(name).unpermute(out_RD, state, row_weights_R, partial=partial)


def _unpermute(
    out_RD: Float[Array, "R D"],
    state: PermuteState,
    row_weights_R: Float[Array, " R"] | None,
    *,
    partial: bool,
) -> Array:
    dtype = out_RD.dtype
    out_RD = promoted(out_RD)
    if row_weights_R is not None:
        out_RD = out_RD * row_weights_R[:, None]
    summed = _take(out_RD, state.row_of_slot_SK).sum(1)
    return summed if partial else summed.astype(dtype)


def _take(array: Array, indices: Array) -> Array:
    return jnp.asarray(array).at[indices].get(mode="promise_in_bounds")


def _permuter(name: str) -> Permuter:
    found: Permuter = PERMUTERS.implementation(PERMUTERS[name])
    return found


def _load_te() -> Permuter:
    from moebius.jax_frontend import permute_te as backend

    backend.load()
    return Permuter(backend.permute, backend.unpermute)


def _te_supports(problem: Problem) -> str | None:
    if problem.dtype == "float64":
        return "Transformer Engine adds a token's rows in float32"
    if problem.device != "cuda":
        return f"Transformer Engine permutes on CUDA, not on {problem.device}"
    return None


PERMUTERS = Registry("moebius.jax_frontend", "permute")
PERMUTERS.add(name="xla", load=lambda: Permuter(_permute, _unpermute), note="sort and gather; any dtype")
PERMUTERS.add(
    name="te",
    load=_load_te,
    needs=("transformer_engine", "triton"),
    install="pip install --no-build-isolation 'transformer-engine[jax]>=2.20.2' and pip install triton",
    supports=_te_supports,
    only_when_named=True,
    note="Transformer Engine's Triton kernels; reverse mode alone, no vmap; one row for an expert named twice",
)
