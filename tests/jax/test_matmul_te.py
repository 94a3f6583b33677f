"""Backend "te" on a stand-in for Transformer Engine: the contract on both of its grouped GEMMs, and its refusals."""

import os
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import transformer_engine_jax as te

from moebius.core import BackendUnavailable, reference
from moebius.core.registry import Problem
from moebius.jax_frontend import matmul, matmul_te
from moebius.jax_frontend.matmul import BACKENDS, grouped_matmul

R, E, D, F = 40, 4, 8, 16
SIZES = {
    "even": (10, 10, 10, 10),
    "one_takes_all": (40, 0, 0, 0),
    "last_takes_all": (0, 0, 0, 40),
    "all_empty": (0, 0, 0, 0),
    "padding_and_empty": (0, 17, 0, 16),
    "padding_after_an_empty_last": (9, 0, 20, 0),
    "one_row_each": (1, 1, 1, 1),
}
CUBLASLT = {"V1": 130100, "V2": 131000}
USUAL = Problem(device="cuda", dtype="bfloat16", dim=2048, inter_dim=768, n_experts=128, capability=(9, 0))


def forget():
    """What was chosen, loaded and compiled with another stand-in, or without one."""
    matmul._choose.cache_clear()
    matmul_te._against_v2.cache_clear()
    BACKENDS._loaded.pop("te", None)
    BACKENDS._broken.pop("te", None)
    jax.clear_caches()


@pytest.fixture
def install(monkeypatch):
    """install(**settings of the stand-in): a backend "te" that serves a CPU; returns the calls."""

    def run(**settings):
        calls = te.fake(monkeypatch, **settings)
        monkeypatch.setitem(BACKENDS._rows, "te", replace(BACKENDS["te"], supports=lambda problem: None))
        forget()
        return calls

    yield run
    forget()


@pytest.fixture(params=CUBLASLT)
def path(request, install):
    """The grouped GEMM that serves bfloat16."""
    install(cublaslt=CUBLASLT[request.param])
    return request.param


def with_gradients():
    """jitted (rows, weight, sizes, dout) -> out, drows, dweight."""

    def run(rows, weight, sizes, dout):
        product = lambda rows, weight: grouped_matmul(rows, weight, sizes, backend="te")  # noqa: E731
        out, pull = jax.vjp(product, rows, weight)
        return out, *pull(dout)

    return jax.jit(run)


def operands(draws, seed=0, dtype="bfloat16"):
    draw = draws(seed)
    return [jnp.asarray(draw(shape, dtype), dtype) for shape in ((R, D), (E, D, F), (R, F))]


def exact(rows, weight, sizes, dout, arithmetic):
    drows, dweight = reference.grouped_matmul_vjp(rows, weight, sizes, dout, arithmetic)
    return {"out": reference.grouped_matmul(rows, weight, sizes, arithmetic), "drows": drows, "dweight": dweight}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_te_agrees_with_reference(path, agree, draws, sizes, dtype):
    sizes = np.array(SIZES[sizes], np.int64)
    rows, weight, dout = operands(draws, dtype=dtype)
    values = with_gradients()(rows, weight, jnp.asarray(sizes, jnp.int32), dout)
    assert set(te.RAN) == {path if dtype == "bfloat16" else "V1"} and all(value.dtype == dtype for value in values)
    found = dict(zip(("out", "drows", "dweight"), values, strict=True))
    wide = [np.asarray(array, np.float64) for array in (rows, weight, dout)]
    agree(found, partial(exact, wide[0], wide[1], sizes, wide[2]), dtype)
    assert not np.asarray(found["dweight"])[sizes == 0].any(), "an empty expert's gradient is exactly zero"
    end = sizes.sum()
    assert not np.asarray(found["out"])[end:].any() and not np.asarray(found["drows"])[end:].any()


@pytest.mark.parametrize("shape", [(0, 3, 8, 16), (4, 0, 8, 16)], ids=["no_rows", "no_experts"])
def test_grouped_matmul_te_of_nothing_is_zero_and_runs_nothing(path, shape):
    r, e, d, f = shape
    given = jnp.ones((r, d), jnp.bfloat16), jnp.ones((e, d, f), jnp.bfloat16)
    out, drows, dweight = with_gradients()(*given, jnp.zeros(e, jnp.int32), jnp.ones((r, f), jnp.bfloat16))
    assert (out.shape, drows.shape, dweight.shape) == ((r, f), (r, d), (e, d, f))
    assert not any(np.asarray(value).any() for value in (out, drows, dweight)) and not te.RAN


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_grouped_matmul_te_with_poison_in_padding_is_unchanged_bit_for_bit(path, draws, poison):
    rows, weight, dout = operands(draws, 1)
    sizes, run = jnp.array([3, 0, 17, 1], jnp.int32), with_gradients()
    clean = run(rows, weight, sizes, dout)
    found = run(rows.at[21:].set(poison), weight, sizes, dout.at[21:].set(poison))
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.parametrize("expert", range(E))
@pytest.mark.parametrize("sizes", [(9, 8, 9, 9), (9, 0, 9, 0), (0, 30, 0, 4)], ids=str)
def test_grouped_matmul_te_with_nan_in_one_expert_keeps_it_there(path, draws, expert, sizes):
    rows, weight, dout = operands(draws, 2)
    out, drows, dweight = with_gradients()(rows, weight.at[expert].set(np.nan), jnp.array(sizes, jnp.int32), dout)
    mine = np.repeat(np.arange(E + 1), [*sizes, R - sum(sizes)]) == expert
    for value in map(np.asarray, (out, drows)):
        assert np.isfinite(value[~mine]).all() and np.isnan(value[mine]).all()
    assert np.isfinite(np.asarray(dweight)).all()


def test_grouped_matmul_te_with_nan_in_one_row_keeps_it_to_that_row_and_expert(path, draws):
    rows, weight, dout = operands(draws, 3)
    sizes = jnp.array([10, 10, 10, 10], jnp.int32)
    out, drows, dweight = map(np.asarray, with_gradients()(rows.at[12].set(np.nan), weight, sizes, dout))
    assert np.isnan(out[12]).all() and np.isfinite(np.delete(out, 12, 0)).all()
    assert np.isfinite(drows).all()
    assert np.isnan(dweight[1]).all() and np.isfinite(np.delete(dweight, 1, 0)).all()


def test_grouped_matmul_te_reads_the_weight_as_it_lies_and_multiplies_nothing_twice(path, install, draws, equations):
    rows, weight, dout = operands(draws)
    sizes = jnp.array(SIZES["even"], jnp.int32)
    with_gradients()(rows, weight, sizes, dout)
    assert sorted(te.RAN) == [path] * 3
    assert {call["contracting"] for call in te.CALLS} == {((1,), (1,)), ((1,), (2,)), ((0,), (0,))}
    inside = equations(lambda r, w: matmul_te.product(r, w, sizes, True), rows, weight.mT)
    assert "transpose" not in {equation.primitive.name for equation in inside}


def test_grouped_matmul_te_of_other_sizes_traces_once(path, traces, draws):
    rows, weight, dout = operands(draws, 4)
    run, seen = traces(lambda *args: with_gradients()(*args))
    for sizes in SIZES.values():
        run(rows, weight, jnp.array(sizes, jnp.int32), dout)
    assert len(seen) == 1


def test_grouped_matmul_te_under_scan_and_remat_is_the_sum_of_calls(path, draws):
    rows, weight, _ = operands(draws, 9)
    sizes = jnp.array([[9, 0, 20, 5], [0, 40, 0, 0]], jnp.int32)

    def term(rows, weight, sizes):
        return jnp.sin(grouped_matmul(rows, weight, sizes, backend="te").astype(jnp.float32)).sum()

    def scanned(rows, weight):
        body = lambda total, sizes: (total + jax.checkpoint(term)(rows, weight, sizes), None)  # noqa: E731
        return jax.lax.scan(body, jnp.float32(0), sizes)[0]

    found, single = jax.jit(jax.grad(scanned, (0, 1)))(rows, weight), jax.jit(jax.grad(term, (0, 1)))
    for grad, *parts in zip(found, *[single(rows, weight, each) for each in sizes], strict=True):
        wanted = sum(np.asarray(part, np.float64) for part in parts)
        np.testing.assert_allclose(np.asarray(grad, np.float64), wanted, rtol=2.0**-8, atol=1e-6)


def test_grouped_matmul_te_of_int64_sizes_with_64_bit_numbers_on_is_the_same_bit_for_bit(path, draws):
    rows, weight, dout = operands(draws, 10)
    wanted = with_gradients()(rows, weight, jnp.array(SIZES["padding_and_empty"], jnp.int32), dout)
    with jax.enable_x64(True):
        sizes = jnp.array(SIZES["padding_and_empty"], jnp.int64)
        assert sizes.dtype == jnp.int64
        found = with_gradients()(rows, weight, sizes, dout)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, pytest
from dataclasses import replace
from fakes import transformer_engine_jax as te
from jax.sharding import AxisType, PartitionSpec as P
from moebius.jax_frontend import grouped_matmul
from moebius.jax_frontend.matmul import BACKENDS

te.fake(pytest.MonkeyPatch(), cublaslt=131000)
BACKENDS._rows["te"] = replace(BACKENDS["te"], supports=lambda problem: None)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
sizes = jnp.array([[1, 0, 2], [0, 3, 1]], jnp.int32)

def here(rows, weight, sizes):
    return jnp.sin(grouped_matmul(rows, weight, sizes[0], backend="te").astype(jnp.float32))

def whole(rows, weight):
    return jnp.concatenate([here(rows[:4], weight, sizes[:1]), here(rows[4:], weight, sizes[1:])])

def derivatives(run, rows, weight, drows, dweight):
    scalar = jax.grad(lambda *args: (run(*args) ** 2).sum(), (0, 1))
    return jax.jvp(scalar, (rows, weight), (drows, dweight))

for dtype, path in (("bfloat16", "V2"), ("float16", "V1")):
    args = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((8, 8), (3, 8, 16)) * 2]
    wanted = jax.jit(lambda *args: derivatives(whole, *args))(*args)
    for check_vma in (True, False):
        specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": P("data"), "check_vma": check_vma}
        sharded = jax.shard_map(here, mesh=mesh, **specs)
        te.RAN.clear()
        found = jax.jit(lambda *args: derivatives(lambda rows, weight: sharded(rows, weight, sizes), *args))(*args)
        for value, exact in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            value, exact = (np.asarray(each, np.float64) for each in (value, exact))
            error = np.linalg.norm(value - exact) / np.linalg.norm(exact)
            assert error < 2.0**-7, (path, check_vma, error)
        assert set(te.RAN) == {path}
"""


def test_grouped_matmul_te_inside_shard_map_has_the_derivatives_of_the_whole_with_and_without_check_vma(run_alone):
    folders = [str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    flags = "--xla_force_host_platform_device_count=2"
    run_alone(SHARDED, XLA_FLAGS=flags, PYTHONPATH=os.pathsep.join(filter(None, folders)))


def test_grouped_matmul_te_under_vmap_is_the_loop_of_calls(path, draws):
    draw = draws(8)
    rows, weight = (jnp.asarray(draw(shape, "bfloat16"), "bfloat16") for shape in ((2, R, D), (2, E, D, F)))
    sizes, dout = jnp.array([[9, 0, 20, 5], [0, 40, 0, 0]], jnp.int32), jnp.ones((R, F), jnp.bfloat16)
    found = jax.jit(jax.vmap(with_gradients(), (0, 0, 0, None)))(rows, weight, sizes, dout)
    for i in range(2):
        wanted = with_gradients()(rows[i], weight[i], sizes[i], dout)
        jax.tree.map(lambda value, own, i=i: np.testing.assert_array_equal(value[i], own), found, wanted)


def test_grouped_matmul_te_gradient_of_gradient_is_the_loops(path, draws):
    rows, weight, _ = operands(draws, 7)
    sizes = jnp.array([9, 0, 20, 5], jnp.int32)

    def slope(rows, weight, backend):
        def total(rows):
            return jnp.sin(grouped_matmul(rows, weight, sizes, backend=backend).astype(jnp.float32)).sum()

        return (jax.grad(total)(rows).astype(jnp.float32) ** 2).sum()

    twice = jax.jit(jax.grad(slope, (0, 1)), static_argnums=2)
    for found, wanted in zip(twice(rows, weight, "te"), twice(rows, weight, "loop"), strict=True):
        found, wanted = (np.asarray(value, np.float64) for value in (found, wanted))
        assert np.linalg.norm(found - wanted) < 2.0**-7 * np.linalg.norm(wanted)


# --------------------------------------------------------------------------------------------------------- which of two
@pytest.mark.parametrize(
    "settings, name, why",
    [
        ({"cublaslt": 130801}, "V2", "stay on the device"),
        ({"cublaslt": 131000, "capability": 100}, "V2", "stay on the device"),
        ({"cublaslt": 130800}, "V1", "cuBLASLt 13.8.1, and 13.8.0 is loaded"),
        ({"cublaslt": 130100}, "V1", "cuBLASLt 13.8.1, and 13.1.0 is loaded"),
        ({"cublaslt": 131000, "capability": 80}, "V1", "compute capability 9.0, not 8.0"),
        ({"cublaslt": 131000, "built": False}, "V1", "built without V2"),
    ],
    ids=str,
)
def test_path_asks_the_loaded_library_and_says_why(install, settings, name, why):
    install(**settings)
    matmul_te.load()
    assert matmul_te.path("bfloat16").name == name and why in matmul_te.path("bfloat16").why
    assert matmul_te.path("float16") == ("V1", matmul_te.path("float16").why)
    assert f"bfloat16 takes {name}: " in matmul_te.described() and why in matmul_te.described()
    module = sys.modules[matmul_te._GEMM]
    assert module._v2_grouped_gemm_available is (name == "V2"), "the package takes what moebius reckons with"


def test_load_where_v1_cannot_be_forced_says_so(install, monkeypatch):
    install(cublaslt=130100)
    monkeypatch.delattr(sys.modules[matmul_te._GEMM], "_v2_grouped_gemm_available")
    with pytest.raises(BackendUnavailable, match=r"found: V2 .* 13\.1\.0 is loaded.*\ndo: install a newer nvidia"):
        matmul_te.load()


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"dtype": "float16", "capability": (8, 0)}, None),
        ({"dtype": "float64"}, "no float64"),
        ({"dtype": "float32"}, "float32 in TF32"),
        ({"device": "cpu", "capability": None}, "computes on CUDA, not on cpu"),
        ({"capability": (7, 5)}, "compute capability 8.0, not 7.5"),
        ({"dim": 2044}, "multiple of 16 bytes, which is 8 numbers, not D=2044, I=768"),
        ({"inter_dim": 4}, "not D=2048, I=4"),
    ],
    ids=str,
)
def test_te_says_what_it_does_not_serve(changes, words):
    said = BACKENDS["te"].supports(replace(USUAL, **changes))
    assert said is None if words is None else words in said


def test_te_is_never_chosen_by_default():
    assert BACKENDS["te"].only_when_named and BACKENDS["te"].reads_host


@pytest.mark.parametrize("version", ["2.19.0", "1.30", "2", "2.20", "2.20rc5", "2.20.1+cu13", "unknown"])
def test_grouped_matmul_te_of_an_older_package_is_refused(install, version):
    install(version=version)
    with pytest.raises(BackendUnavailable, match=rf"transformer_engine {re.escape(version)}, not 2\.20\.2 or newer"):
        grouped_matmul(*operands_of_ones(), backend="te")


@pytest.mark.parametrize("version", ["2.20.2", "2.20.2+cu13", "2.21", "2.21.0.dev0+1234abc", "3"])
def test_check_version_takes_a_newer_package(install, version):
    install(version=version)
    matmul_te.check_version()


def test_grouped_matmul_te_whose_import_fails_says_how(install, monkeypatch):
    install()
    monkeypatch.setattr(matmul_te, "load", lambda: (_ for _ in ()).throw(OSError("libnccl.so.2: cannot open")))
    with pytest.raises(BackendUnavailable, match=r"does not load: OSError: libnccl.so.2: cannot open"):
        grouped_matmul(*operands_of_ones(), backend="te")


def operands_of_ones():
    return jnp.ones((R, D), jnp.bfloat16), jnp.ones((E, D, F), jnp.bfloat16), jnp.full(E, 10, jnp.int32)
