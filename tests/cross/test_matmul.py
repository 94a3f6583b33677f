"""The contract of the grouped matmul, for every backend of both frontends."""

from __future__ import annotations

import numpy as np
import pytest
from sides import SIDES, Side, rounded

from moebius.core import BackendUnavailable, ConfigError, DTypeError, ShapeError, Unsupported, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

sides = pytest.mark.parametrize("side", SIDES, ids=str)
isolating = pytest.mark.parametrize("side", [side for side in SIDES if side.backend != "ragged_dot"], ids=str)
ROWS, N_IN, N_OUT = 13, 10, 7
SIZES = {
    "even": [4, 4, 4],
    "padding": [3, 2, 4],
    "empty_first": [0, 5, 8],
    "empty_last": [5, 8, 0],
    "one_takes_all": [0, 13, 0],
    "all_empty": [0, 0, 0],
}


def operands(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (ROWS, N_IN), (3, N_IN, N_OUT), (ROWS, N_OUT)
    rows, weight, dout = (rounded(rng.normal(size=shape), dtype) for shape in shapes)
    return rows, weight, dout


def run(side: Side, rows, weight, sizes, dout, dtype: str = "float32") -> dict[str, np.ndarray]:
    with side.context(dtype):
        r, w, d = (side.array(value, dtype) for value in (rows, weight, dout))
        gs = side.array(np.array(sizes), "int32")
        if side.framework == "torch":
            out = side.module.grouped_matmul(r.requires_grad_(), w.requires_grad_(), gs, backend=side.backend)
            out.backward(d)
            found = {"out": out, "drows": r.grad, "dweight": w.grad}
        else:
            import jax

            def product(r, w):
                return side.module.grouped_matmul(r, w, gs, backend=side.backend)

            out, pullback = jax.vjp(product, r, w)
            found = dict(zip(("out", "drows", "dweight"), (out, *pullback(d)), strict=True))
        return {name: side.numpy(value) for name, value in found.items()}


@sides
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_agrees_with_reference(side: Side, sizes: str, dtype: str) -> None:
    if not side.serves(dtype):
        pytest.skip("grouped_mm has no float64")
    rows, weight, dout = operands(dtype)

    def wanted(arithmetic):
        drows, dweight = reference.grouped_matmul_vjp(rows, weight, SIZES[sizes], dout, arithmetic)
        return {
            "out": reference.grouped_matmul(rows, weight, SIZES[sizes], arithmetic),
            "drows": drows,
            "dweight": dweight,
        }

    exact = wanted(EXACT)
    limits = bounds(wanted, exact, dtype)
    for name, value in run(side, rows, weight, SIZES[sizes], dout, dtype).items():
        assert within(value, exact[name], limits[name]), name


@sides
def test_grouped_matmul_past_the_last_group_is_exactly_zero_and_reads_nothing(side: Side) -> None:
    rows, weight, dout = operands()
    clean = run(side, rows, weight, [3, 2, 4], dout)
    rows[9:], dout[9:] = np.nan, np.inf
    found = run(side, rows, weight, [3, 2, 4], dout)
    assert (found["out"][9:] == 0).all() and (found["drows"][9:] == 0).all()
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@isolating
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_grouped_matmul_with_poison_in_one_expert_keeps_it_there(side: Side, poison: float) -> None:
    rows, weight, dout = operands()
    clean = run(side, rows, weight, [3, 2, 4], dout)
    weight[1] = poison
    found = run(side, rows, weight, [3, 2, 4], dout)
    for name in ("out", "drows"):
        assert not np.isfinite(found[name][3:5]).any()
        np.testing.assert_array_equal(np.delete(found[name], [3, 4], 0), np.delete(clean[name], [3, 4], 0))
    np.testing.assert_array_equal(found["dweight"], clean["dweight"])


@isolating
def test_grouped_matmul_with_poison_in_one_experts_rows_keeps_it_there(side: Side) -> None:
    rows, weight, dout = operands()
    clean = run(side, rows, weight, [3, 2, 4], dout)
    rows[4], dout[4] = np.nan, np.inf
    found = run(side, rows, weight, [3, 2, 4], dout)
    np.testing.assert_array_equal(np.delete(found["out"], 4, 0), np.delete(clean["out"], 4, 0))
    np.testing.assert_array_equal(np.delete(found["drows"], 4, 0), np.delete(clean["drows"], 4, 0))
    np.testing.assert_array_equal(found["dweight"][[0, 2]], clean["dweight"][[0, 2]])


@isolating
def test_grouped_matmul_of_an_empty_expert_with_poison_is_untouched(side: Side) -> None:
    rows, weight, dout = operands()
    weight[0] = np.nan
    found = run(side, rows, weight, SIZES["empty_first"], dout)
    assert np.isfinite(found["out"]).all() and np.isfinite(found["drows"]).all()
    assert (found["dweight"][0] == 0).all()


@pytest.mark.parametrize("n_experts, rows", [(1, 5), (3, 0), (1, 0), (5, 2)])
@sides
def test_grouped_matmul_of_few_rows_or_experts_keeps_its_shape(side: Side, n_experts: int, rows: int) -> None:
    sizes = [rows, *[0] * (n_experts - 1)]
    found = run(side, np.ones((rows, 4)), np.ones((n_experts, 4, 3)), sizes, np.ones((rows, 3)))
    assert found["out"].shape == (rows, 3) and (found["out"] == 4).all()
    assert found["drows"].shape == (rows, 4) and (found["drows"] == 3).all()
    assert (found["dweight"][0] == rows).all() and (found["dweight"][1:] == 0).all()


@sides
@pytest.mark.parametrize(
    "error, rows, weight, sizes",
    [
        (ShapeError, (5, 4), (4, 3), [5]),
        (ShapeError, (5, 4, 1), (1, 4, 3), [5]),
        (ShapeError, (5, 3), (1, 4, 3), [5]),
        (ShapeError, (5, 4), (2, 4, 3), [5]),
    ],
    ids=["flat_weight", "deep_rows", "width", "sizes"],
)
def test_grouped_matmul_of_shapes_that_do_not_fit_says_what_does(side: Side, error, rows, weight, sizes) -> None:
    with pytest.raises(error, match=r"asked: .*\nfound: .*\ndo: "):
        r, w = side.array(np.zeros(rows), "float32"), side.array(np.zeros(weight), "float32")
        side.module.grouped_matmul(r, w, side.array(np.array(sizes), "int32"))


@sides
def test_grouped_matmul_of_two_dtypes_is_refused(side: Side) -> None:
    rows, weight, _ = operands()
    sizes = side.array(np.array([4, 4, 4]), "int32")
    with pytest.raises(DTypeError, match="weight of rows' dtype float32"):
        side.module.grouped_matmul(side.array(rows, "float32"), side.array(weight, "bfloat16"), sizes)
    with pytest.raises(DTypeError, match="group_sizes of dtype int32"):
        rows, weight = side.array(rows, "float32"), side.array(weight, "float32")
        side.module.grouped_matmul(rows, weight, side.array(np.ones(3), "float32"))


@sides
def test_grouped_matmul_with_an_unknown_backend_lists_the_known(side: Side) -> None:
    rows, weight, _ = operands()
    sizes = side.array(np.array([4, 4, 4]), "int32")
    with pytest.raises(ConfigError, match=r"found: the backends .*loop"):
        side.module.grouped_matmul(side.array(rows, "float32"), side.array(weight, "float32"), sizes, backend="no_such")


def test_grouped_matmul_with_a_named_backend_that_cannot_serve_is_refused() -> None:
    side = Side("torch", "grouped_mm")
    rows, weight, _ = operands()
    sizes = side.array(np.array([4, 4, 4]), "int32")
    with pytest.raises(Unsupported, match="no float64"):
        side.module.grouped_matmul(
            side.array(rows, "float64"), side.array(weight, "float64"), sizes, backend="grouped_mm"
        )
    assert issubclass(BackendUnavailable, ImportError)


@sides
def test_grouped_matmul_under_full_checks_refuses_impossible_group_sizes(side: Side, monkeypatch) -> None:
    from moebius.core import RoutingError

    monkeypatch.setenv("MOEBIUS_CHECKS", "full")
    rows, weight, _ = operands()
    for sizes in ([4, -1, 4], [9, 9, 9]):
        with pytest.raises(RoutingError, match="group sizes >= 0 that sum to at most 13"):
            side.module.grouped_matmul(
                side.array(rows, "float32"),
                side.array(weight, "float32"),
                side.array(np.array(sizes), "int32"),
                backend=side.backend,
            )
