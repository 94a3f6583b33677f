"""Step 6: activation times routing weight."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moebius.core import ACTIVATIONS, reference
from moebius.jax_frontend import activate

ROWS, INTER = 6, 5


def problem(name, draws, dtype):
    """(hidden, weights, dact) of one activation, float64 and exact in dtype."""
    row, draw = ACTIVATIONS[name], draws(list(ACTIVATIONS).index(name))
    # Wide enough to clamp. Where nothing clamps gelu's tail only cancels, which is more than the noise model knows.
    scale = 2.0 if row.limit is None else row.limit
    hidden, dact = draw((ROWS, row.up_width(INTER)), dtype, scale), draw((ROWS, INTER), dtype)
    return hidden, draw((ROWS,), "float64" if dtype == "float64" else "float32"), dact


@pytest.fixture(scope="module")
def computed(wide, draws):
    """computed(dtype, weighted): (act, dhidden, dweights) of every activation; compiled together, that is faster."""

    def one(name, hidden, weights, dact, weighted):
        call = lambda hidden, weights: activate(hidden, weights if weighted else None, ACTIVATIONS[name])  # noqa: E731
        act, pull = jax.vjp(call, hidden, weights)
        return act, *pull(dact)

    @cache
    def of(dtype, weighted):
        with wide(dtype):
            given = {name: problem(name, draws, dtype) for name in ACTIVATIONS}
            kinds = dtype, "float64" if dtype == "float64" else "float32", dtype
            arrays = {name: [jnp.asarray(*pair) for pair in zip(p, kinds, strict=True)] for name, p in given.items()}
            return jax.jit(lambda every: {name: one(name, *p, weighted) for name, p in every.items()})(arrays)

    return of


@pytest.mark.parametrize(
    "dtype, weighted",
    [("float32", True), ("float32", False), ("bfloat16", True), ("float16", True), ("float64", True)],
)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate_and_its_gradients_agree_with_reference(agree, computed, draws, name, dtype, weighted):
    act, dhidden, dweights = computed(dtype, weighted)[name]
    assert act.dtype == dhidden.dtype == dtype
    assert dweights.dtype == ("float64" if dtype == "float64" else "float32")
    row, (hidden, weights, dact) = ACTIVATIONS[name], problem(name, draws, dtype)

    def exact(arithmetic):
        used = weights if weighted else None
        slopes = reference.activate_vjp(hidden, used, row, dact, arithmetic)
        value = reference.activate(hidden, used, row, arithmetic)
        return {"act": value, "dhidden": slopes[0]} | ({"dweights": slopes[1]} if weighted else {})

    found = {"act": act, "dhidden": dhidden} | ({"dweights": dweights} if weighted else {})
    agree(found, exact, dtype)


@pytest.mark.parametrize("name", [name for name, row in ACTIVATIONS.items() if row.limit is not None])
def test_activate_passes_the_gradient_at_a_clamp_and_none_beyond(name):
    row, limit = ACTIVATIONS[name], ACTIVATIONS[name].limit
    beyond = float(np.nextafter(np.float32(limit), np.float32(np.inf)))
    gate = np.array([limit, beyond, 1.0, 1.0, 1.0, 1.0])
    up = np.array([1.0, 1.0, limit, -limit, beyond, -beyond])
    pair = np.stack([gate, up], -1).reshape(1, -1) if row.interleaved else np.concatenate([gate, up])[None]
    slope = jax.jit(jax.grad(lambda hidden: activate(hidden, None, row).sum()))(jnp.float32(pair))[0]
    dgate, dup = (slope[0::2], slope[1::2]) if row.interleaved else (slope[:6], slope[6:])
    assert (np.asarray(dgate[:2]) != 0).tolist() == [True, False]
    assert (np.asarray(dup[2:]) != 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate_keeps_nan_and_does_not_spread_it(name):
    row = ACTIVATIONS[name]
    hidden = jnp.ones((2, row.up_width(INTER))).at[0].set(jnp.nan)
    act = activate(hidden, None, row)
    assert np.isnan(act[0]).all() and np.isfinite(act[1]).all()


def test_activate_keeps_its_input_alone_for_the_backward_pass():
    hidden, weights = jnp.ones((64, 32), jnp.bfloat16), jnp.ones(64)
    _, pull = jax.vjp(lambda hidden, weights: activate(hidden, weights, ACTIVATIONS["swigluoai"]), hidden, weights)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes"))
    assert kept <= hidden.nbytes + weights.nbytes
