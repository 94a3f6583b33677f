"""Steps 3 and 9 over several ranks, against the reference's list of ranks: exact integers, so every sum is exact too.

The ranks are elements of a batch with a named axis, whose collectives are those of devices; on devices of their own,
inside of shard_map: test_experts_ranks.py.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import ConfigError, reference
from moebius.core.reference import Tokens
from moebius.jax_frontend.dispatch_allgather import AllGather
from moebius.jax_frontend.dispatch_alltoall import AllToAll

E, D, K, T = 8, 3, 2, 5
KINDS = {"allgather": AllGather, "alltoall": AllToAll}
kinds = pytest.mark.parametrize("kind", KINDS)
over_ranks = pytest.mark.parametrize("ranks", [2, 4])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@cache
def drawn(ranks):
    """(tokens of every rank, what each rank makes of all of them, gradients of all of them)."""
    rng = np.random.default_rng(ranks)
    tokens = [
        Tokens(
            x_TD=rng.integers(-255, 255, (T, D)).astype(float),
            weights_TK=rng.integers(0, 255, (T, K)).astype(float),
            ids_TK=rng.choice([-2, -1, *range(E), E, E + 1], (T, K)),
            token_mask_T=rng.random(T) < 0.8,
        )
        for _ in range(ranks)
    ]
    outputs = [rng.integers(-(2**13), 2**13, (ranks * T, D)).astype(float) for _ in range(ranks)]
    return tokens, outputs, [rng.integers(-255, 255, (ranks * T, D)).astype(float) for _ in range(ranks)]


@cache
def rows(ranks, kind):
    """[S] of each rank: in which of its rows each of all tokens lies, S for none."""
    sent, n_rows = reference.dispatch(drawn(ranks)[0], E), ranks * T
    if kind == "allgather":
        return [np.arange(n_rows)] * ranks
    found = []
    for rank in sent:
        here = ((rank.ids_TK < E // ranks).any(1) & rank.token_mask_T).reshape(ranks, T)
        places = np.cumsum(here, 1) - 1 + np.arange(ranks)[:, None] * T
        found.append(np.where(here, places, n_rows).reshape(-1))
    return found


def of_rows(values, rows):
    """The values of all tokens, in the rows where they lie; zeros in the others."""
    out = np.zeros((len(rows) + 1, *values.shape[1:]))
    out[rows] = values
    return out[:-1]


@cache
def outcome(ranks, kind, dtype, combine_dtype=None):
    """What dispatch and combine give on every rank, and the gradients of both."""
    tokens, outputs, dx = drawn(ranks)
    dispatcher = KINDS[kind]("ep", combine_dtype)
    places = rows(ranks, kind)
    arrays = [np.stack([getattr(rank, name) for rank in tokens]) for name in ("x_TD", "weights_TK")]
    x, weights = (jnp.asarray(value, dtype) for value in arrays)
    ids, mask = (jnp.asarray(np.stack([getattr(rank, name) for rank in tokens])) for name in ("ids_TK", "token_mask_T"))
    wide = jnp.promote_types(dtype, jnp.float32)
    y_SD = jnp.asarray(np.stack([of_rows(*pair) for pair in zip(outputs, places, strict=True)]), wide)
    dx_SD = jnp.asarray(np.stack([of_rows(*pair) for pair in zip(dx, places, strict=True)]), dtype)

    def one(x, weights, ids, mask, y_SD, dx_SD):
        factor = (jax.lax.axis_index("ep") + 1).astype(wide)

        def send(x, weights):
            sent, state = dispatcher.dispatch(x, weights, ids, mask, E)
            return (sent.x_SD, sent.weights_SK), (sent.ids_SK, state)

        (x_SD, weights_SK), pull, (ids_SK, state) = jax.vjp(send, x, weights, has_aux=True)
        found_dx, found_dweights = pull((dx_SD, jnp.full_like(weights_SK, factor)))
        y, back = jax.vjp(lambda y: dispatcher.combine(y, state), y_SD)
        return x_SD, weights_SK, ids_SK, y, found_dx, found_dweights, *back(x + 1)

    return jax.jit(jax.vmap(one, axis_name="ep"))(x, weights, ids, mask, y_SD, dx_SD)


def equal(found, wanted, dtype):
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float64), np.asarray(jnp.asarray(wanted, dtype), np.float64))


@over_ranks
@kinds
@dtypes
def test_dispatch_gives_every_rank_what_the_reference_does(ranks, kind, dtype):
    x, weights, ids, *_ = outcome(ranks, kind, dtype)
    e = E // ranks
    for rank, (want, places) in enumerate(zip(reference.dispatch(drawn(ranks)[0], E), rows(ranks, kind), strict=True)):
        equal(x[rank], of_rows(want.x_TD, places), dtype)
        equal(weights[rank], of_rows(want.weights_TK, places), "float32")
        local = np.where(want.token_mask_T[:, None], want.ids_TK, e)
        equal(ids[rank], of_rows(local - e, places) + e, "int32")


@over_ranks
@kinds
@dtypes
def test_combine_rounds_each_ranks_part_once_and_their_sum_once(ranks, kind, dtype):
    _, outputs, _ = drawn(ranks)
    held = [places < ranks * T for places in rows(ranks, kind)]
    parts = [part * own[:, None] for part, own in zip(outputs, held, strict=True)]
    short = [np.asarray(jnp.asarray(part, dtype), np.float64) for part in parts]
    for combine_dtype, summands in [(None, short), ("float32", parts)]:
        found = outcome(ranks, kind, dtype, combine_dtype)[3]
        wanted = reference.combine([T] * ranks, summands)
        for rank in range(ranks):
            equal(found[rank], wanted[rank], dtype)


@over_ranks
@kinds
@dtypes
def test_gradients_are_sums_over_ranks_rounded_once(ranks, kind, dtype):
    tokens, _, dx = drawn(ranks)
    places = rows(ranks, kind)
    held = [(own < ranks * T)[:, None] for own in places]
    dweights = [np.full((ranks * T, K), rank + 1.0) * held[rank] for rank in range(ranks)]
    wanted = reference.dispatch_vjp([T] * ranks, [part * own for part, own in zip(dx, held, strict=True)], dweights)
    dy = reference.combine_vjp([rank.x_TD + 1 for rank in tokens])
    *_, found_dx, found_dweights, found_dy = outcome(ranks, kind, dtype)
    for rank in range(ranks):
        equal(found_dx[rank], wanted[rank][0], dtype)
        equal(found_dweights[rank], wanted[rank][1], dtype)
        equal(found_dy[rank], of_rows(dy[rank], places[rank]), "float32")


@kinds
def test_dispatchers_without_a_bound_drop_nothing(kind):
    ids, mask = jnp.full((2, 3, 2), 7), jnp.ones(3, bool)
    found = jax.vmap(lambda ids: KINDS[kind]("ep").dropped(ids, mask, 8), axis_name="ep")(ids)
    assert found.shape == (2, 3) and found.dtype == jnp.int32 and not found.any()


# ---------------------------------------------------------------------------------------------------- a bound of tokens
def bounded(ids, bound, on_overflow, e=2):
    """(rows that arrive, output, dropped) on each of two ranks whose experts return their tokens."""

    def one(ids):
        dispatcher = AllToAll("ep", bound=bound, on_overflow=on_overflow)
        x, mask = jnp.arange(1.0, 1 + len(ids))[:, None], jnp.ones(len(ids), bool)
        sent, state = dispatcher.dispatch(x, jnp.ones(ids.shape), ids, mask, 2 * e)
        dropped = state.dropped_T, dispatcher.dropped(ids, mask, 2 * e)
        return sent.x_SD, dispatcher.combine(sent.x_SD, state), dropped

    return jax.vmap(one, axis_name="ep")(jnp.asarray(ids, jnp.int32))


@pytest.mark.parametrize("on_overflow", ["count", "poison"])
def test_alltoall_with_too_small_a_bound_drops_the_last_tokens_and_says_how_many_routes(on_overflow):
    ids = [[[0, 1], [1, 0], [0, 3], [2, 2]], [[0, 1], [2, 3], [-1, 2], [3, 0]]]
    rows, y, dropped = bounded(ids, 2, on_overflow)
    assert rows.shape == (2, 4, 1)
    assert rows[..., 0].tolist() == [[1, 2, 1, 4], [3, 4, 2, 3]]
    for found in dropped:
        assert found.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    lost = np.nan if on_overflow == "poison" else 3.0
    np.testing.assert_array_equal(y[0, :, 0], [1, 2, lost, 4])


def test_alltoall_with_a_bound_that_suffices_drops_nothing():
    ids = [[[0, 1], [1, 0], [2, 3], [-1, 3]]] * 2
    _, y, dropped = bounded(ids, 2, "count")
    assert not np.any(dropped) and y[0, :, 0].tolist() == [1, 2, 3, 4]


def test_alltoall_with_a_bound_that_may_drop_and_no_word_of_what_then_is_refused():
    with pytest.raises(ConfigError, match=r"bound=2 of 4 tokens\nfound: .*dropped\ndo: set on_overflow"):
        bounded([[[0, 1]] * 4] * 2, 2, None)


@pytest.mark.parametrize("settings", [{"bound": 0}, {"bound": 2, "on_overflow": "ignore"}])
def test_alltoall_of_impossible_settings_is_refused(settings):
    with pytest.raises(ConfigError, match="do: "):
        AllToAll("ep", **settings)


@kinds
def test_dispatchers_outside_of_their_axis_say_where_to_call_them(kind):
    with pytest.raises(ConfigError, match=r'mesh axis "ep"\nfound: no such axis is in force here\ndo: .*shard_map'):
        KINDS[kind]("ep").dispatch(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.zeros((2, 1), int), jnp.ones(2, bool), 4)


@kinds
def test_dispatchers_over_ranks_that_do_not_divide_the_experts_are_refused(kind):
    def one(x):
        return KINDS[kind]("ep").dispatch(x, jnp.ones((2, 1)), jnp.zeros((2, 1), int), jnp.ones(2, bool), 5)[0].x_SD

    with pytest.raises(ConfigError, match="5 experts over 2 ranks"):
        jax.vmap(one, axis_name="ep")(jnp.ones((2, 2, 3)))
