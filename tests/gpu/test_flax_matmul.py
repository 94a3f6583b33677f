"""The Flax grouped matmul on an NVIDIA GPU: the contract of every backend that is there, values and both gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import on_gpu
import pytest
from sides import Side, rounded

from moebius.core import Unsupported, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

pytestmark = on_gpu.MARKS
R, E, D, F = 1000, 5, 128, 192
SIZES = {
    "uneven": (1, 127, 300, 0, 572),
    "padding": (64, 0, 7, 500, 16),
    "one_takes_all": (0, 0, 1000, 0, 0),
    "all_empty": (0, 0, 0, 0, 0),
}
NAMES = ("out", "drows", "dweight")
backends = pytest.mark.parametrize("backend", on_gpu.BACKENDS)
Arrays = dict[str, np.ndarray]


@cache
def program(backend: str) -> Any:
    """(rows, weight, sizes, dout) -> out, drows, dweight; one program for each shape and dtype."""
    import jax

    from moebius.jax_frontend import grouped_matmul

    @jax.jit
    def run(rows: Any, weight: Any, sizes: Any, dout: Any) -> Any:
        product = lambda rows, weight: grouped_matmul(rows, weight, sizes, backend=backend)  # noqa: E731
        out, pull = jax.vjp(product, rows, weight)
        return out, *pull(dout)

    return run


@cache
def operands(dtype: str = "bfloat16", n_rows: int = R, n_in: int = D, n_out: int = F) -> tuple[np.ndarray, ...]:
    """rows, weight, dout: normal numbers, exact in dtype. Shared: copy before writing."""
    rng = np.random.default_rng(0)
    shapes = {(n_rows, n_in): 1.0, (E, n_in, n_out): n_in**-0.5, (n_rows, n_out): 1.0}
    return tuple(rounded(rng.normal(size=shape) * scale, dtype) for shape, scale in shapes.items())


def run(backend: str, rows: Any, weight: Any, sizes: Any, dout: Any, dtype: str = "bfloat16") -> Arrays:
    on_gpu.require(backend, dtype, weight.shape[1], weight.shape[2], E)
    side = Side("jax", backend, "cuda")
    given = [side.array(value, dtype) for value in (rows, weight, dout)]
    found = program(backend)(given[0], given[1], side.array(sizes, "int32"), given[2])
    assert {next(iter(value.devices())).platform for value in found} == {"gpu"}
    assert {str(value.dtype) for value in found} == {dtype}
    return {name: side.numpy(value) for name, value in zip(NAMES, found, strict=True)}


def assert_near_reference(found: Arrays, rows: Any, weight: Any, sizes: Any, dout: Any, dtype: str) -> None:
    def wanted(arithmetic: Any) -> Arrays:
        drows, dweight = reference.grouped_matmul_vjp(rows, weight, sizes, dout, arithmetic)
        return {"out": reference.grouped_matmul(rows, weight, sizes, arithmetic), "drows": drows, "dweight": dweight}

    exact = wanted(EXACT)
    limits = bounds(wanted, exact, dtype)
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        assert within(value, exact[name], limits[name]), name
    assert (found["dweight"][np.asarray(sizes) == 0] == 0).all(), "an empty expert's gradient is exactly zero"
    end = sum(sizes)
    assert (found["out"][end:] == 0).all() and (found["drows"][end:] == 0).all(), "padding is exactly zero"


# -------------------------------------------------------------------------------------------------------------- values
@backends
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_on_a_gpu_agrees_with_reference(backend: str, dtype: str, sizes: str) -> None:
    rows, weight, dout = operands(dtype)
    found = run(backend, rows, weight, SIZES[sizes], dout, dtype)
    assert_near_reference(found, rows, weight, SIZES[sizes], dout, dtype)


@backends
@pytest.mark.parametrize(("n_in", "n_out"), [(72, 40), (33, 51)], ids=str)
def test_grouped_matmul_on_a_gpu_of_odd_widths_agrees_with_reference(backend: str, n_in: int, n_out: int) -> None:
    rows, weight, dout = operands(n_in=n_in, n_out=n_out)
    found = run(backend, rows, weight, SIZES["padding"], dout)
    assert_near_reference(found, rows, weight, SIZES["padding"], dout, "bfloat16")


@backends
def test_grouped_matmul_on_a_gpu_of_one_row_agrees_with_reference(backend: str) -> None:
    rows, weight, dout = operands(n_rows=1)
    found = run(backend, rows, weight, (0, 0, 1, 0, 0), dout)
    assert_near_reference(found, rows, weight, (0, 0, 1, 0, 0), dout, "bfloat16")


@backends
def test_grouped_matmul_on_a_gpu_of_no_rows_keeps_its_shape(backend: str) -> None:
    rows, weight, dout = operands(n_rows=0)
    found = run(backend, rows, weight, SIZES["all_empty"], dout)
    assert found["out"].shape == (0, F) and found["drows"].shape == (0, D) and (found["dweight"] == 0).all()


# -------------------------------------------------------------------------------------------------------------- poison
@backends
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_grouped_matmul_on_a_gpu_past_the_last_group_reads_nothing(backend: str, poison: float) -> None:
    rows, weight, dout = (value.copy() for value in operands())
    clean = run(backend, rows, weight, SIZES["padding"], dout)
    end = sum(SIZES["padding"])
    rows[end:], dout[end:] = poison, poison
    found = run(backend, rows, weight, SIZES["padding"], dout)
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# ragged_dot multiplies every row by every expert, and zero times NaN is NaN.
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=[pytest.mark.xfail(strict=True)] if name == "ragged_dot" else [])
        for name in on_gpu.BACKENDS
    ],
)
@pytest.mark.parametrize("expert", [0, 1, 3, 4], ids=["first", "empty", "middle", "last"])
def test_grouped_matmul_on_a_gpu_keeps_nan_of_one_expert_to_its_rows(backend: str, expert: int) -> None:
    rows, weight, dout = (value.copy() for value in operands())
    sizes = SIZES["padding"]
    clean = run(backend, rows, weight, sizes, dout)
    weight[expert] = np.nan
    found = run(backend, rows, weight, sizes, dout)
    mine = np.zeros(R, bool)
    mine[sum(sizes[:expert]) : sum(sizes[: expert + 1])] = True
    for name in ("out", "drows"):
        assert np.isnan(found[name][mine]).all(), name
        np.testing.assert_array_equal(found[name][~mine], clean[name][~mine], err_msg=name)
    np.testing.assert_array_equal(found["dweight"], clean["dweight"])  # which does not read the weights


@backends
def test_grouped_matmul_on_a_gpu_keeps_nan_of_one_experts_rows_out_of_the_other_gradients(backend: str) -> None:
    rows, weight, dout = (value.copy() for value in operands())
    sizes = SIZES["padding"]
    clean = run(backend, rows, weight, sizes, dout)
    rows[:64] = np.nan  # of expert 0
    found = run(backend, rows, weight, sizes, dout)
    assert np.isnan(found["out"][:64]).all() and np.isnan(found["dweight"][0]).all()
    np.testing.assert_array_equal(found["out"][64:], clean["out"][64:])
    np.testing.assert_array_equal(found["dweight"][1:], clean["dweight"][1:])


# --------------------------------------------------------------------------------------------------------------- manner
@backends
def test_grouped_matmul_on_a_gpu_twice_is_the_same_bit_for_bit(backend: str) -> None:
    rows, weight, dout = operands()
    first, second = (run(backend, rows, weight, SIZES["uneven"], dout) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


def test_grouped_matmul_on_a_gpu_compiles_once_for_all_group_sizes() -> None:
    rows, weight, dout = operands()
    for backend in filter(on_gpu.served, on_gpu.BACKENDS):
        run(backend, rows, weight, SIZES["uneven"], dout)
        before = program(backend)._cache_size()
        for sizes in SIZES.values():
            run(backend, rows, weight, sizes, dout)
        assert program(backend)._cache_size() == before, backend


def test_choose_on_a_gpu_takes_tokamax_where_it_is_there() -> None:
    import jax.numpy as jnp

    from moebius.jax_frontend.matmul import choose

    on_gpu.require("tokamax")
    for dtype in ("bfloat16", "float16", "float32"):
        assert choose(None, jnp.zeros((0, 64), dtype), (4, 64, 128)).name == "tokamax"


@pytest.mark.parametrize(
    ("dtype", "width", "said"), [("float32", 64, "TF32"), ("bfloat16", 51, "multiple of 16 bytes")]
)
def test_te_on_a_gpu_refuses_what_it_would_round_or_misread(dtype: str, width: int, said: str) -> None:
    import jax.numpy as jnp

    from moebius.jax_frontend.matmul import choose

    on_gpu.require("te")
    with pytest.raises(Unsupported, match=said):
        choose("te", jnp.zeros((0, 64), dtype), (4, 64, width))


def test_te_on_a_gpu_runs_the_gemm_that_it_says() -> None:
    import jax
    import jax.numpy as jnp

    from moebius.jax_frontend import grouped_matmul, matmul_te

    on_gpu.require("te")
    targets = {"V1": "te_grouped_gemm_ffi", "V2": "te_grouped_gemm_v2_ffi"}
    for dtype in ("bfloat16", "float16"):
        said, why = matmul_te.path(dtype)
        given = jnp.ones((16, 64), dtype), jnp.ones((4, 64, 64), dtype), jnp.full(4, 4, jnp.int32)
        compiled = jax.jit(lambda *given: grouped_matmul(*given, backend="te")).lower(*given)
        text = compiled.as_text()
        assert {name for name, target in targets.items() if target in text} == {said}, why
        np.testing.assert_array_equal(np.asarray(compiled.compile()(*given), np.float32), 64.0)
