"""Backend "te" inside Transformer Engine's autocast, on a stand-in: what is quantised, padded, run and refused."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import transformer_engine_jax as te

from moebius.core import Unsupported
from moebius.jax_frontend import matmul, matmul_te, matmul_te_fp8
from moebius.jax_frontend.matmul import BACKENDS, grouped_matmul

R, E, D, F = 41, 3, 32, 48
SIZES = {"uneven": (3, 17, 5), "empty_and_full": (16, 0, 25), "empty_last": (20, 5, 0), "one_takes_all": (0, 41, 0)}
HYBRID, E4M3 = te.Float8CurrentScaling(), te.Float8CurrentScaling((te.E4M3, te.E4M3))


@pytest.fixture
def autocast(monkeypatch):
    """autocast(recipe) opens it, autocast(None) closes it; "te" serves a CPU."""
    te.fake(monkeypatch)
    monkeypatch.setitem(BACKENDS._rows, "te", replace(BACKENDS["te"], supports=lambda problem: None))
    forget()
    yield lambda recipe: setattr(te.STATE, "recipe", recipe)
    forget()


def forget():
    matmul._choose.cache_clear()
    matmul_te._against_v2.cache_clear()
    BACKENDS._loaded.pop("te", None)
    jax.clear_caches()


def operands(draws):
    """Rows, matrices and a gradient; what is past the end holds poison."""
    draw = draws(0)
    return [jnp.asarray(draw(shape), "bfloat16") for shape in ((R, D), (E, D, F), (R, F))]


def differentiated(rows, weight, sizes, dout):
    product = lambda rows, weight: grouped_matmul(rows, weight, sizes, backend="te")  # noqa: E731
    out, pull = jax.vjp(product, rows, weight)
    return out, *pull(dout)


def wanted(rows, weight, sizes, dout, recipe):
    """Each expert's products of what the recipe makes of its operands."""
    forward, backward = recipe.fp8_format
    rows, weight, dout = (np.asarray(array, np.float32) for array in (rows, weight, dout))
    out, drows, dweight = (np.zeros(shape) for shape in ((R, F), (R, D), (E, D, F)))
    for expert, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        part = slice(end - size, end)
        x, w, dy = te.fp8(rows[part], forward), te.fp8(weight[expert], forward), te.fp8(dout[part], backward)
        out[part], drows[part], dweight[expert] = x @ w, dy @ w.T, x.T @ dy
    return out, drows, dweight


@pytest.mark.parametrize("recipe", [HYBRID, E4M3], ids=["hybrid", "e4m3"])
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_multiplies_what_the_recipe_makes_of_each_expert(autocast, draws, sizes, recipe):
    sizes = SIZES[sizes]
    rows, weight, dout = operands(draws)
    end = sum(sizes)
    autocast(recipe)
    found = jax.jit(differentiated)(
        rows.at[end:].set(np.nan), weight, jnp.array(sizes, jnp.int32), dout.at[end:].set(np.inf)
    )
    for value, expected in zip(found, wanted(rows, weight, sizes, dout, recipe), strict=True):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=2.0**-8, atol=1e-6)
    assert sorted(te.RAN) == ["dgrad", "fprop", "wgrad"], "what only the rule of grouped_dense wants is left out"


@pytest.mark.parametrize("expert", range(E))
def test_fp8_with_nan_in_one_expert_keeps_it_there(autocast, draws, expert):
    rows, weight, dout = operands(draws)
    sizes = SIZES["uneven"]
    autocast(HYBRID)
    weight = weight.at[expert].set(np.nan)
    out, drows, dweight = map(np.asarray, differentiated(rows, weight, jnp.array(sizes, jnp.int32), dout))
    mine = np.repeat(np.arange(E + 1), [*sizes, R - sum(sizes)]) == expert
    assert np.isfinite(out[~mine]).all() and np.isnan(out[mine]).all()
    assert np.isfinite(drows[~mine]).all() and np.isfinite(dweight).all()


def test_fp8_of_int64_sizes_with_64_bit_numbers_on_is_the_same_bit_for_bit(autocast, draws):
    rows, weight, dout = operands(draws)
    autocast(HYBRID)
    expected = jax.jit(differentiated)(rows, weight, jnp.array(SIZES["uneven"], jnp.int32), dout)
    with jax.enable_x64(True):
        sizes = jnp.array(SIZES["uneven"], jnp.int64)
        found = jax.jit(differentiated)(rows, weight, sizes, dout)
        spread = matmul_te_fp8._spread(R, sizes)
    assert sizes.dtype == jnp.int64 and spread.sizes_e.dtype == spread.place_R.dtype == jnp.int32
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_fp8_inside_shard_map_is_refused_where_it_is_checked_and_the_same_where_it_is_not(autocast, draws):
    rows, weight, dout = operands(draws)
    sizes = jnp.array(SIZES["uneven"], jnp.int32)
    mesh, spec = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec

    def inside(run, check_vma):
        varying, same = spec("data"), spec()
        specs = {"in_specs": (varying, same, varying, varying), "out_specs": (varying,) * 3}
        return jax.jit(jax.shard_map(run, mesh=mesh, check_vma=check_vma, **specs))(rows, weight, sizes, dout)

    autocast(HYBRID)
    product = lambda rows, weight, sizes, _: (grouped_matmul(rows, weight, sizes, backend="te"),) * 3  # noqa: E731
    of_weight = lambda *args: (matmul_te_fp8.weight_gradient(*args[::3], args[2], recipe=HYBRID),) * 3  # noqa: E731
    for run in (product, of_weight):
        with pytest.raises(Unsupported, match="with the recipe Float8CurrentScaling inside shard_map with check_vma"):
            inside(run, True)
    assert not te.RAN
    wanted = differentiated(rows, weight, sizes, dout)
    jax.tree.map(np.testing.assert_array_equal, inside(differentiated, False), wanted)


def test_fp8_of_the_forward_pass_holds_for_a_backward_pass_outside(autocast, draws):
    rows, weight, dout = operands(draws)
    sizes = jnp.array(SIZES["uneven"], jnp.int32)
    autocast(HYBRID)
    out, pull = jax.vjp(lambda rows, weight: grouped_matmul(rows, weight, sizes, backend="te"), rows, weight)
    autocast(None)
    found = out, *pull(dout)
    for value, expected in zip(found, wanted(rows, weight, SIZES["uneven"], dout, HYBRID), strict=True):
        np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=2.0**-8, atol=1e-6)


def test_fp8_is_of_calls_inside_of_the_autocast_alone_whatever_was_compiled_before(autocast, draws):
    rows, weight, _ = operands(draws)
    run = partial(grouped_matmul, rows, weight, jnp.array(SIZES["uneven"], jnp.int32), backend="te")
    values = []
    for recipe in (None, HYBRID, E4M3, None):
        autocast(recipe)
        values.append(np.asarray(run(), np.float64))
    assert te.RAN == ["V1", "fprop", "fprop", "V1"]
    np.testing.assert_array_equal(values[0], values[3])
    assert 0 < np.abs(values[0] - values[1]).max() < 1


def test_fp8_of_no_rows_or_no_experts_runs_nothing(autocast):
    autocast(HYBRID)
    for r, e in ((0, 3), (4, 0)):
        given = jnp.ones((r, D), jnp.bfloat16), jnp.ones((e, D, F), jnp.bfloat16), jnp.zeros(e, jnp.int32)
        assert not np.asarray(grouped_matmul(*given, backend="te")).any()
    assert not te.RAN


@pytest.mark.parametrize("d, f", [(24, 48), (32, 40)])
def test_fp8_of_widths_that_are_no_multiples_of_16_is_refused(autocast, d, f):
    autocast(HYBRID)
    rows, weight = jnp.ones((R, d), jnp.bfloat16), jnp.ones((E, d, f), jnp.bfloat16)
    sizes, dout = jnp.array(SIZES["uneven"], jnp.int32), jnp.ones((R, f), jnp.bfloat16)
    words = rf"recipe Float8CurrentScaling\nfound: matrices \[{d}, {f}\]; it takes multiples of 16\ndo: ."
    with pytest.raises(Unsupported, match=words):
        grouped_matmul(rows, weight, sizes, backend="te")
    with pytest.raises(Unsupported, match=words):
        matmul_te_fp8.weight_gradient(rows, dout, sizes, recipe=HYBRID)


def test_fp8_by_another_recipe_is_refused_where_it_is_asked_for(autocast, draws):
    rows, weight, _ = operands(draws)
    sizes = jnp.array(SIZES["uneven"], jnp.int32)
    grouped_matmul(rows, weight, sizes, backend="te")
    autocast(te.DelayedScaling())
    words = r"with the recipe DelayedScaling\nfound: .* Float8CurrentScaling alone.*\ndo: .*autocast\(enabled=False\)"
    with pytest.raises(Unsupported, match=words):
        grouped_matmul(rows, weight, sizes, backend="te")
    grouped_matmul(rows, weight, sizes, backend="loop")


def test_asked_is_the_recipe_of_the_autocast_that_is_open(autocast, monkeypatch):
    assert matmul_te_fp8.asked() == ""
    keys = []
    for recipe in (HYBRID, E4M3):
        autocast(recipe)
        keys.append(matmul_te_fp8.asked())
        assert matmul_te_fp8.recipe_of(keys[-1]) is recipe
    assert len(set(keys)) == 2
    monkeypatch.delitem(sys.modules, "transformer_engine.jax.quantize")
    assert matmul_te_fp8.asked() == ""
