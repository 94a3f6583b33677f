"""Steps 5 and 7: the contract of the grouped matmul, for every backend of the registry, and the dense projection."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.core import ConfigError, DTypeError, RoutingError, ShapeError, reference
from moebius.core.registry import Problem
from moebius.jax_frontend.matmul import BACKENDS, choose, grouped_matmul, linear

DTYPES = ("float32", "bfloat16", "float16", "float64")
R, E, D, F = 40, 4, 6, 5
SIZES = {
    "even": (10, 10, 10, 10),
    "one_takes_all": (40, 0, 0, 0),
    "last_takes_all": (0, 0, 0, 40),
    "all_empty": (0, 0, 0, 0),
    "padding_and_empty": (0, 17, 0, 16),
    "one_row_each": (1, 1, 1, 1),
    "whole_blocks": (16, 16, 8, 0),
}
HERE = Problem(device="cpu", dtype="float32", dim=D, inter_dim=F, n_experts=E)
NAMES = [name for name, state in BACKENDS.explain(HERE) if state in ("chosen", "available", "available when named")]
backends = pytest.mark.parametrize("backend", NAMES)


@cache
def with_gradients(backend):
    """jitted (rows, weight, sizes, dout) -> out, drows, dweight."""

    def run(rows, weight, sizes, dout):
        out, pull = jax.vjp(lambda rows, weight: grouped_matmul(rows, weight, sizes, backend=backend), rows, weight)
        return out, *pull(dout)

    return jax.jit(run)


def reference_run(rows, weight, sizes, dout, arithmetic):
    drows, dweight = reference.grouped_matmul_vjp(rows, weight, sizes, dout, arithmetic)
    return {"out": reference.grouped_matmul(rows, weight, sizes, arithmetic), "drows": drows, "dweight": dweight}


@pytest.fixture(scope="session")
def inside(equations):
    """inside(f, *args): every equation of f and of what its operators lower to."""

    def walk(function, *args):
        for e in equations(function, *args):
            yield e
            if e.primitive.name in ("grouped_product", "grouped_weight_gradient", "contract"):
                yield from walk(partial(e.primitive.impl, **e.params), *[var.aval for var in e.invars])

    return lambda function, *args: list(walk(function, *args))


@pytest.fixture(scope="module")
def check(agree, wide, cast, draws):
    """check(backend, dtype, sizes, shape): values and gradients agree with the reference."""

    def run(backend, dtype, sizes, shape=(R, E, D, F)):
        r, e, d, f = shape
        draw, sizes = draws(0), np.array(sizes, np.int64)
        rows, weight, dout = draw((r, d), dtype), draw((e, d, f), dtype), draw((r, f), dtype)
        with wide(dtype):
            args = cast(dtype, rows, weight)
            found = with_gradients(backend)(*args, jnp.asarray(sizes, jnp.int32), *cast(dtype, dout))
            assert all(value.dtype == dtype for value in found)
            found = dict(zip(("out", "drows", "dweight"), found, strict=True))
        agree(found, partial(reference_run, rows, weight, sizes, dout), dtype)
        return found

    return run


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_agrees_with_reference(check, backend, dtype, sizes):
    found = check(backend, dtype, SIZES[sizes])
    empty = np.array(SIZES[sizes]) == 0
    assert not np.asarray(found["dweight"])[empty].any(), "an empty expert's gradient is exactly zero"
    end = sum(SIZES[sizes])
    assert not np.asarray(found["out"])[end:].any() and not np.asarray(found["drows"])[end:].any()


# Fewer rows than a block and than experts; one expert; blocks of 128; one column.
@backends
@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((2, 3), (5, 2, 4, 3)),
        ((0, 1, 0, 0, 1), (2, 5, 4, 3)),
        ((7,), (7, 1, 1, 1)),
        ((200, 97), (300, 2, 4, 3)),
    ],
    ids=str,
)
def test_grouped_matmul_of_odd_shapes_agrees_with_reference(check, backend, sizes, shape):
    check(backend, "float32", sizes, shape)


@backends
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (4, 0, 4, 5)], ids=["no_rows", "no_experts"])
def test_grouped_matmul_of_nothing_is_zero(check, backend, shape):
    check(backend, "float32", (0,) * shape[1], shape)


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, R), min_size=E, max_size=E))
def test_grouped_matmul_loop_of_any_sizes_agrees_with_reference(check, cuts):
    check("loop", "float32", np.diff([0, *sorted(cuts)]))


@backends
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_grouped_matmul_with_poison_in_padding_is_unchanged_bit_for_bit(draws, backend, poison):
    draw, sizes = draws(1), jnp.array([3, 0, 17, 1], jnp.int32)
    rows, weight, dout = draw((R, D)), draw((E, D, F)), draw((R, F))
    clean = with_gradients(backend)(*map(jnp.float32, (rows, weight)), sizes, jnp.float32(dout))
    rows[21:], dout[21:] = poison, poison
    found = with_gradients(backend)(*map(jnp.float32, (rows, weight)), sizes, jnp.float32(dout))
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name,
            marks=[pytest.mark.xfail(reason="XLA multiplies every row by every expert", strict=True)]
            if name == "ragged_dot"
            else [],
        )
        for name in NAMES
    ],
)
@pytest.mark.parametrize("empty", [False, True], ids=["used_expert", "empty_expert"])
def test_grouped_matmul_with_nan_in_one_expert_keeps_it_there(draws, backend, empty):
    draw, sizes = draws(2), np.array([9, 0 if empty else 8, 9, 9])
    rows, weight, dout = draw((R, D)), draw((E, D, F)), draw((R, F))
    weight[1] = np.nan
    owner = np.repeat(np.arange(E + 1), [*sizes, R - sizes.sum()])
    out, drows, dweight = with_gradients(backend)(
        *map(jnp.float32, (rows, weight)), jnp.asarray(sizes, jnp.int32), jnp.float32(dout)
    )
    assert np.isfinite(out[owner != 1]).all() and np.isfinite(drows[owner != 1]).all()
    assert np.isnan(out[owner == 1]).all() and np.isfinite(dweight).all()


@backends
def test_grouped_matmul_with_nan_in_one_row_keeps_it_to_that_row_and_expert(draws, backend):
    draw, sizes = draws(3), jnp.array([10, 10, 10, 10], jnp.int32)
    rows, weight, dout = draw((R, D)), draw((E, D, F)), draw((R, F))
    rows[12] = np.nan
    out, drows, dweight = with_gradients(backend)(*map(jnp.float32, (rows, weight)), sizes, jnp.float32(dout))
    assert np.isnan(out[12]).all() and np.isfinite(np.delete(out, 12, 0)).all()
    assert np.isfinite(drows).all()
    assert np.isnan(dweight[1]).all() and np.isfinite(np.delete(dweight, 1, 0)).all()


@backends
def test_grouped_matmul_of_other_sizes_traces_once(traces, draws, backend):
    draw, call = draws(4), partial(grouped_matmul, backend=backend)
    rows, weight = map(jnp.float32, (draw((R, D)), draw((E, D, F))))
    run, seen = traces(lambda *args: jax.grad(lambda r, w, s: call(r, w, s).sum(), (0, 1))(*args))
    for sizes in SIZES.values():
        run(rows, weight, jnp.array(sizes, jnp.int32))
    assert len(seen) == 1


@backends
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_grouped_matmul_with_64_bit_numbers_on_is_the_same_bit_for_bit(draws, backend, index):
    draw, sizes = draws(6), SIZES["padding_and_empty"]
    rows, weight, dout = (jnp.float32(draw(shape)) for shape in ((R, D), (E, D, F), (R, F)))
    wanted = with_gradients(backend)(rows, weight, jnp.array(sizes, jnp.int32), dout)
    with jax.enable_x64(True):
        found = with_gradients(backend)(rows, weight, jnp.array(sizes, index), dout)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_grouped_matmul_loops_count_in_int32_with_64_bit_numbers_on(draws, inside, index):
    draw, sizes = draws(6), SIZES["padding_and_empty"]
    rows, weight, dout = (jnp.float32(draw(shape)) for shape in ((R, D), (E, D, F), (R, F)))
    with jax.enable_x64(True):
        args = rows, weight, jnp.array(sizes, index), dout
        loops = [e for e in inside(with_gradients("loop"), *args) if e.primitive.name == "while"]
        assert len(loops) == 5  # two nested walks forward, two for the rows' gradient, one below a scan
        carried = [var.aval.dtype for e in loops for var in e.invars]
        assert {str(dtype) for dtype in carried} <= {"int32", "float32", "bool"} | {index}
        assert all(var.aval.dtype != "int64" for e in loops for var in e.outvars)


def test_grouped_matmul_gradient_of_gradient_agrees_with_jax(draws):
    """The oracle is JAX's own differentiation of the same sum as one einsum."""
    draw, sizes = draws(7), jnp.array([9, 0, 20, 5], jnp.int32)
    rows, weight, direction = map(jnp.float32, (draw((R, D)), draw((E, D, F)), draw((R, D))))

    def twice(product):
        def slope(rows, weight):
            return (jax.grad(lambda r: jnp.sin(product(r, weight)).sum())(rows) * direction).sum()

        return jax.jit(jax.grad(slope, (0, 1)))(rows, weight)

    def one_hot(rows, weight):
        owner = jnp.repeat(jnp.arange(E + 1), jnp.append(sizes, R - sizes.sum()), total_repeat_length=R)
        return jnp.einsum("rd,edf,re->rf", rows, weight, jax.nn.one_hot(owner, E), precision="highest")

    for found, wanted in zip(twice(lambda r, w: grouped_matmul(r, w, sizes)), twice(one_hot), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@backends
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None)], ids=str)
def test_grouped_matmul_under_vmap_is_the_loop_of_calls(draws, backend, axes):
    draw, call = draws(8), partial(grouped_matmul, backend=backend)
    pick = [jnp.float32(draw((2, R, D))), jnp.float32(draw((2, E, D, F))), jnp.array([[9, 0, 20, 5], [0, 40, 0, 0]])]
    args = [value if axis == 0 else value[0] for value, axis in zip(pick, axes, strict=True)]
    run = jax.value_and_grad(lambda r, w, s: (call(r, w, s) ** 2).sum(), (0, 1))
    found = jax.jit(jax.vmap(run, axes))(*args)
    single = jax.jit(run)
    for i in range(2):
        wanted = single(*[value[i] if axis == 0 else value for value, axis in zip(args, axes, strict=True)])
        here = jax.tree.map(lambda value, i=i: value[i], found)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), here, wanted)


@backends
def test_grouped_matmul_under_scan_and_remat_is_the_loop_of_calls(draws, backend):
    draw, call = draws(9), jax.checkpoint(partial(grouped_matmul, backend=backend))
    rows, weight = map(jnp.float32, (draw((R, D)), draw((E, D, F))))
    sizes = jnp.array([[9, 0, 20, 5], [0, 40, 0, 0]], jnp.int32)

    def scanned(rows, weight):
        body = lambda total, s: (total + (call(rows, weight, s) ** 2).sum(), None)  # noqa: E731
        return jax.lax.scan(body, jnp.float32(0), sizes)[0]

    found = jax.jit(jax.grad(scanned, (0, 1)))(rows, weight)
    out = [with_gradients("loop")(rows, weight, s, jnp.zeros((R, F)))[0] for s in sizes]
    wanted = [with_gradients("loop")(rows, weight, s, 2 * o)[1:] for s, o in zip(sizes, out, strict=True)]
    for grad, *parts in zip(found, *wanted, strict=True):
        np.testing.assert_allclose(grad, sum(parts), rtol=1e-5, atol=1e-4)


@backends
def test_grouped_matmul_into_donated_rows_is_the_same(draws, backend):
    draw, sizes, call = draws(10), jnp.array([9, 0, 20, 5], jnp.int32), partial(grouped_matmul, backend=backend)
    rows, weight = jnp.float32(draw((R, D))), jnp.float32(draw((E, D, D)))
    wanted = np.asarray(call(rows, weight, sizes))
    found = jax.jit(call, donate_argnums=0)(rows, weight, sizes)
    assert rows.is_deleted()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def compiled(e):
    """value and gradients of a loop over `e` experts at equal rows, compiled but not run."""
    rows, weight = jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((e, 64, 96), jnp.float32)
    run = jax.grad(lambda r, w, s: grouped_matmul(r, w, s, backend="loop").sum(), (0, 1))
    return jax.jit(run).lower(rows, weight, jax.ShapeDtypeStruct((e,), jnp.int32)).compile()


def test_grouped_matmul_loop_needs_no_more_scratch_for_more_experts():
    few, many = (compiled(e).memory_analysis().temp_size_in_bytes for e in (8, 64))
    assert many <= few


def test_backends_default_is_the_loop_and_ragged_dot_comes_only_when_named():
    rows = jnp.zeros((4, 2))
    assert choose(None, rows, (3, 2, 2)).name == "loop"
    assert choose("ragged_dot", rows, (3, 2, 2)).name == "ragged_dot"
    assert "NaN" in BACKENDS["ragged_dot"].note
    with pytest.raises(ConfigError, match=r"backend 'grouped_mm'.*\nfound: .*'loop', 'ragged_dot'"):
        choose("grouped_mm", rows, (3, 2, 2))


@pytest.mark.parametrize(
    "error, asked, shapes",
    [
        (ShapeError, r"rows of shape \[tokens, 3\]", ((4, 2), (2, 3, 5), (2,))),
        (ShapeError, r"weight of shape \[e, D, F\]", ((4, 3), (3, 5), (2,))),
        (ShapeError, r"group_sizes of shape \[2\]", ((4, 3), (2, 3, 5), (3,))),
    ],
)
def test_grouped_matmul_of_shapes_that_do_not_fit_says_what_does(error, asked, shapes):
    rows, weight, sizes = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(error, match=asked):
        grouped_matmul(rows, weight, sizes.astype(jnp.int32))


def test_grouped_matmul_of_mixed_dtypes_is_refused_also_while_tracing():
    rows, weight, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    for run in (grouped_matmul, jax.jit(grouped_matmul)):
        with pytest.raises(DTypeError, match="weight of rows' dtype float32\nfound: bfloat16"):
            run(rows, weight, sizes)
    with pytest.raises(DTypeError, match="group_sizes of dtype int32"):
        grouped_matmul(rows, weight.astype(jnp.float32), sizes.astype(jnp.float32))


@pytest.mark.parametrize("sizes", [(-1, 3), (3, 2)], ids=["negative", "beyond_the_rows"])
def test_grouped_matmul_with_full_checks_refuses_impossible_sizes(monkeypatch, sizes):
    monkeypatch.setenv("MOEBIUS_CHECKS", "full")
    args = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.array(sizes, jnp.int32)
    with pytest.raises(RoutingError, match="group sizes >= 0 that sum to at most 4"):
        grouped_matmul(*args)
    jax.jit(grouped_matmul)(*args)  # no values while tracing


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_agrees_with_reference(agree, wide, cast, draws, dtype, bias):
    draw = draws(11)
    x, weight, dout = draw((2, 3, D), dtype), draw((F, D), dtype), draw((2, 3, F), dtype)
    biases = [draw((F,), dtype)] if bias else []
    with wide(dtype):

        @jax.jit
        def both(dout, *args):
            out, pull = jax.vjp(linear, *args)
            return out, *pull(dout)

        values = both(*cast(dtype, dout, x, weight, *biases))
        found = dict(zip(("out", "dx", "dweight", "dbias"), values, strict=False))
        assert all(value.dtype == dtype for value in found.values())

    def run(arithmetic):
        flat, dflat = x.reshape(-1, D), dout.reshape(-1, F)
        value = reference.linear(flat, weight, *biases, arithmetic=arithmetic).reshape(dout.shape)
        dx, dweight, dbias = reference.linear_vjp(flat, weight, dflat, arithmetic)
        return {"out": value, "dx": dx.reshape(x.shape), "dweight": dweight} | ({"dbias": dbias} if bias else {})

    agree(found, run, dtype)


def products(found):
    return [e for e in found if e.primitive.name in ("dot_general", "ragged_dot_general")]


@pytest.mark.parametrize("function", ["linear", *NAMES])
def test_products_multiply_16_bit_by_16_bit_in_both_directions(inside, function):
    """A float32 gradient times bfloat16 operands would be a float32 product on a GPU."""
    run, args = differentiated(function, jnp.bfloat16)
    found = products(inside(run, *args))
    assert len(found) >= 3
    assert {str(var.aval.dtype) for e in found for var in e.invars[:2]} == {"bfloat16"}
    assert {str(e.outvars[0].aval.dtype) for e in found} == {"float32"}


@pytest.mark.parametrize("function", ["linear", *NAMES])
def test_products_of_float32_ask_for_float32_precision(inside, function):
    """Left to its default, JAX multiplies float32 in TF32 on a GPU."""
    run, args = differentiated(function, jnp.float32)
    precisions = [e.params["precision"] for e in products(inside(run, *args))]
    highest = jax.lax.Precision.HIGHEST
    assert len(precisions) >= 3 and all(found in (highest, (highest, highest)) for found in precisions)


def differentiated(function, dtype):
    """(gradient of all arrays, arguments) of a product by its name."""
    rows, sizes = jnp.ones((4, 3), dtype), jnp.array([2, 2], jnp.int32)
    if function == "linear":
        return jax.grad(lambda x, w: linear(x, w).sum().astype("float32"), (0, 1)), (rows, jnp.ones((5, 3), dtype))
    call = partial(grouped_matmul, backend=function)
    run = jax.grad(lambda x, w: call(x, w, sizes).sum().astype("float32"), (0, 1))
    return run, (rows, jnp.ones((2, 3, 5), dtype))
