"""The backend "tokamax" on a stand-in of its package: which kernel runs, and the contract of the grouped matmul.

test_matmul_tokamax_kernels.py asks the package itself, where it is installed.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import partial

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import tokamax
from fakes.tokamax import PRODUCT, TRANSPOSED, WEIGHT_GRADIENT
from sides import Side, assert_correct, cached_problem

from moebius.core import BackendUnavailable, Unsupported, reference
from moebius.core.registry import Problem
from moebius.jax_frontend import grouped_matmul, matmul, matmul_tokamax
from moebius.jax_frontend.matmul import BACKENDS

R = 40
SIZES = {
    "even": (10, 10, 10, 10),
    "padding_and_empty": (0, 17, 0, 16),
    "one_takes_all": (0, 40, 0, 0),
    "all_empty": (0, 0, 0, 0),
    "one_row_each": (1, 1, 1, 1),
}
# (D, F) by the family of kernels that a Hopper GPU takes for the products.
WIDTHS = {"Mosaic": (64, 128), "Triton": (6, 5)}
on_hopper = pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
HOPPER = Problem(device="cuda", dtype="bfloat16", dim=64, inter_dim=128, n_experts=4, capability=(9, 0))


@contextmanager
def stand_in(capability=(9, 0), **settings):
    """The stand-in's calls, while the default device says that it is a GPU and nothing of before was loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul.BACKENDS, "_loaded", {})
        patch.setattr(matmul.BACKENDS, "_broken", {})
        patch.setattr(matmul, "device_of", lambda rows: ("cuda", capability))
        matmul._choose.cache_clear()
        yield tokamax.fake(patch, **settings)
    fakes.forget()
    matmul._choose.cache_clear()
    jax.clear_caches()  # of functions that were traced with the stand-in


@pytest.fixture(scope="module")
def hopper():
    """The stand-in on a Hopper GPU, for tests that may share what was compiled."""
    with stand_in():
        yield


@pytest.fixture
def installed():
    """installed(capability, version=..., ...): a stand-in of which nothing is loaded or traced yet; its calls."""
    with ExitStack() as stack:
        yield lambda *args, **settings: stack.enter_context(stand_in(*args, **settings))


@jax.jit
def run(rows, weight, sizes, dout):
    out, pull = jax.vjp(lambda rows, weight: grouped_matmul(rows, weight, sizes, backend="tokamax"), rows, weight)
    return {"out": out, **dict(zip(("drows", "dweight"), pull(dout), strict=True))}


def reference_run(rows, weight, sizes, dout, arithmetic):
    drows, dweight = reference.grouped_matmul_vjp(rows, weight, sizes, dout, arithmetic)
    return {"out": reference.grouped_matmul(rows, weight, sizes, arithmetic), "drows": drows, "dweight": dweight}


# ------------------------------------------------------------------------------------------------------------- contract
@on_hopper
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_agrees_with_reference(hopper, agree, cast, draws, widths, dtype, sizes):
    draw, (d, f), group_sizes = draws(0), widths, np.array(SIZES[sizes])
    arrays = draw((R, d), dtype), draw((4, d, f), dtype), draw((R, f), dtype)
    rows, weight, dout = cast(dtype, *arrays)
    found = run(rows, weight, jnp.asarray(group_sizes, jnp.int32), dout)
    assert all(value.dtype == dtype for value in found.values())
    agree(found, partial(reference_run, *arrays[:2], group_sizes, arrays[2]), dtype)
    end = group_sizes.sum()
    assert not np.asarray(found["out"])[end:].any() and not np.asarray(found["drows"])[end:].any()
    assert not np.asarray(found["dweight"])[group_sizes == 0].any(), "an empty expert's gradient is exactly zero"


@on_hopper
@pytest.mark.parametrize("n_rows", [1, 7, 131])
def test_grouped_matmul_of_any_number_of_rows_agrees_with_reference(hopper, agree, cast, draws, widths, n_rows):
    """Fewer than a block, and no multiple of the 8 that Mosaic takes."""
    draw, (d, f), sizes = draws(1), widths, np.array([0, n_rows // 3, n_rows - n_rows // 3])
    arrays = draw((n_rows, d), "bfloat16"), draw((3, d, f), "bfloat16"), draw((n_rows, f), "bfloat16")
    rows, weight, dout = cast("bfloat16", *arrays)
    found = run(rows, weight, jnp.asarray(sizes, jnp.int32), dout)
    agree(found, partial(reference_run, *arrays[:2], sizes, arrays[2]), "bfloat16")


@on_hopper
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_grouped_matmul_with_poison_in_padding_is_unchanged_bit_for_bit(hopper, draws, widths, poison):
    draw, (d, f), sizes = draws(2), widths, jnp.array([3, 0, 17, 1], jnp.int32)
    rows, weight, dout = draw((R, d)), draw((4, d, f)), draw((R, f))
    clean = run(*map(jnp.bfloat16, (rows, weight)), sizes, jnp.bfloat16(dout))
    rows[21:], dout[21:] = poison, poison
    found = run(*map(jnp.bfloat16, (rows, weight)), sizes, jnp.bfloat16(dout))
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@on_hopper
def test_grouped_matmul_with_nan_in_one_expert_leaves_the_others_alone(hopper, draws, widths):
    draw, (d, f), sizes = draws(3), widths, jnp.array([5, 7, 11, 0], jnp.int32)
    rows, weight, dout = draw((R, d)), draw((4, d, f)), draw((R, f))
    clean = run(*map(jnp.bfloat16, (rows, weight)), sizes, jnp.bfloat16(dout))
    weight[1], rows[5:12], dout[5:12], weight[3] = np.nan, np.nan, np.nan, np.inf
    found = run(*map(jnp.bfloat16, (rows, weight)), sizes, jnp.bfloat16(dout))
    others = {"out": [*range(5), *range(12, R)], "drows": [*range(5), *range(12, R)], "dweight": [0, 2, 3]}
    for name, kept in others.items():
        np.testing.assert_array_equal(found[name][np.array(kept)], clean[name][np.array(kept)], err_msg=name)
    assert np.isnan(np.asarray(found["dweight"][1], np.float32)).all()


@on_hopper
@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=["no_rows", "no_experts"])
def test_grouped_matmul_of_nothing_is_zero_and_asks_no_kernel(installed, widths, shape):
    calls, (n_rows, e), (d, f) = installed(), shape, widths
    args = jnp.ones((n_rows, d), jnp.bfloat16), jnp.ones((e, d, f), jnp.bfloat16), jnp.zeros(e, jnp.int32)
    found = run(*args, jnp.ones((n_rows, f), jnp.bfloat16))
    assert found["out"].shape == (n_rows, f) and not any(value.any() for value in found.values())
    assert not calls


def test_experts_agree_with_reference(installed):
    calls = installed()
    problem = cached_problem(dim=64, inter=64, dtype="bfloat16", expert_bias=True)
    assert_correct(Side("jax", "tokamax"), problem)
    assert {call["family"] for call in calls} == {"Mosaic", "Triton"}


# -------------------------------------------------------------------------------------------------------------- choices
MOSAIC = {"block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 4, "split_k": 1} | {
    "persistent": True,
    "grid_minor_dim": 1,
    "grid_tile_width": 8,
}
GRADIENT = {"block_m": 128, "block_n": 256, "block_k": 32, "split_k": 1, "num_warps": 8, "num_stages": 5}
SAFE = {"block_m": 128, "block_n": 128, "block_k": 32, "split_k": 1, "num_warps": 4, "num_stages": 4}
SINGLE = {"block_m": 64, "block_n": 64, "block_k": 32, "split_k": 1, "num_warps": 4, "num_stages": 3}
# capability, dtype, D, F -> family and configuration of the products, configuration of the weight gradient.
TABLE = {
    "bfloat16 on Hopper": ((9, 0), "bfloat16", 128, 192, ("Mosaic", MOSAIC), GRADIENT),
    "float16 on Hopper": ((9, 0), "float16", 64, 64, ("Mosaic", MOSAIC), GRADIENT),
    "an odd input width": ((9, 0), "bfloat16", 96, 128, ("Triton", SAFE), GRADIENT),
    "an odd output width": ((9, 0), "bfloat16", 128, 96, ("Triton", SAFE), GRADIENT),
    "float32 on Hopper": ((9, 0), "float32", 128, 192, ("Triton", SINGLE), SINGLE),
    "bfloat16 on Ampere": ((8, 0), "bfloat16", 128, 192, ("Triton", SAFE), SAFE),
    "bfloat16 on Blackwell": ((10, 0), "bfloat16", 128, 192, ("Triton", SAFE), SAFE),
    "float32 on Blackwell": ((12, 0), "float32", 128, 192, ("Triton", SINGLE), SINGLE),
}


@pytest.mark.parametrize("case", TABLE)
def test_grouped_matmul_takes_the_kernel_of_the_table(installed, case):
    capability, dtype, d, f, product, gradient = TABLE[case]
    calls = installed(capability)
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((16, d), (2, d, f), (16, f))]
    jax.eval_shape(run, *shapes[:2], jax.ShapeDtypeStruct((2,), "int32"), shapes[2])
    found = {call["dims"]: (call["family"], call["config"]) for call in calls}
    assert found == {PRODUCT: product, TRANSPOSED: product, WEIGHT_GRADIENT: ("Triton", gradient)}
    assert {call["dtype"] for call in calls} == {dtype}
    assert {call["precision"] for call in calls} == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize(
    "n_rows, family, given",
    [(1, "Mosaic", 128), (128, "Mosaic", 128), (131, "Mosaic", 136), (136, "Mosaic", 136), (131, "Triton", 131)],
)
def test_product_pads_rows_for_mosaic_alone_and_no_more_than_needed(installed, n_rows, family, given):
    calls, (d, f) = installed(), WIDTHS[family]
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((n_rows, d), (2, d, f))]
    out = jax.eval_shape(matmul_tokamax.product, *shapes, jax.ShapeDtypeStruct((2,), "int32"))
    assert out.shape == (n_rows, f) and [call["shapes"][0] for call in calls] == [(given, d)]


def test_product_outside_jit_is_traced_once(installed):
    calls = installed()
    args = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    for sizes in ((8, 0), (3, 4), (0, 0)):
        matmul_tokamax.product(*args, jnp.array(sizes, jnp.int32))
    assert len(calls) == 1


def test_grouped_matmul_with_64_bit_numbers_on_gives_the_kernels_int32_sizes(installed):
    calls, shapes = installed(), ((8, 64), (2, 64, 64), (8, 64))
    rows, weight, dout = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes)
    with jax.enable_x64(True):
        jax.eval_shape(run, rows, weight, jax.ShapeDtypeStruct((2,), "int64"), dout)  # the stand-in refuses others
    assert {call["dims"] for call in calls} == {PRODUCT, TRANSPOSED, WEIGHT_GRADIENT}


def test_grouped_matmul_of_float32_is_not_rounded_to_tf32(installed):
    """One ulp of float32 is lost in TF32, which has ten bits."""
    installed()
    rows, weight = jnp.full((8, 8), 1 + 2**-20, jnp.float32), jnp.eye(8, dtype=jnp.float32)[None]
    found = run(rows, weight, jnp.array([8], jnp.int32), rows)
    np.testing.assert_array_equal(found["out"], rows)
    np.testing.assert_array_equal(found["drows"], rows)
    np.testing.assert_allclose(found["dweight"], 8 * (1 + 2**-19), rtol=2**-22)


@on_hopper
def test_grouped_matmul_inside_shard_map_varies_as_its_operands(installed, draws, widths):
    """check_vma is on: what a gradient is summed over follows from what it varies over."""
    installed()
    draw, (d, f), sizes = draws(4), widths, jnp.array([20, 0, 15], jnp.int32)
    rows, weight, dout = jnp.bfloat16(draw((R, d))), jnp.bfloat16(draw((3, d, f))), jnp.bfloat16(draw((R, f)))
    mesh, spec = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec
    specs = {"out": spec("x"), "drows": spec("x"), "dweight": spec()}
    inner = jax.shard_map(run, mesh=mesh, in_specs=(spec("x"), spec(), spec(), spec("x")), out_specs=specs)
    found, wanted = jax.jit(inner)(rows, weight, sizes, dout), run(rows, weight, sizes, dout)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# ------------------------------------------------------------------------------------------------------ rows and errors
def test_choose_none_on_a_gpu_takes_tokamax_and_on_a_cpu_the_loop(installed):
    installed()
    assert BACKENDS.choose(None, HOPPER).name == "tokamax"
    cpu = Problem(device="cpu", dtype="bfloat16", dim=64, inter_dim=128, n_experts=4)
    assert BACKENDS.choose(None, cpu).name == "loop"


def test_choose_none_where_tokamax_does_not_load_takes_the_loop_and_tells(installed):
    installed(version="0.0.12")
    assert BACKENDS.choose(None, HOPPER).name == "loop"
    assert "tokamax 0.0.12" in dict(BACKENDS.explain(HOPPER))["tokamax"]


REFUSED = {
    "on a CPU": ({"device": "cpu", "capability": None}, "on CUDA, not on cpu"),
    "on a TPU": ({"device": "tpu", "capability": None}, "on CUDA, not on tpu"),
    "an old GPU": ({"capability": (7, 5)}, "compute capability 8.0, not 7.5"),
    "float64": ({"dtype": "float64"}, "no float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_choose_of_what_it_cannot_serve_says_why(installed, case):
    changes, said = REFUSED[case]
    installed()
    assert BACKENDS.choose("tokamax", HOPPER).name == "tokamax"
    fields = {name: getattr(HOPPER, name) for name in Problem.__slots__}
    with pytest.raises(Unsupported, match=said):
        BACKENDS.choose("tokamax", Problem(**{**fields, **changes}))


def test_choose_without_its_packages_names_them_and_their_install(installed, monkeypatch):
    installed()
    monkeypatch.setattr("moebius.core.registry.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable) as caught:
        BACKENDS.choose("tokamax", HOPPER)
    assert "not installed: tokamax, jax_triton, triton" in caught.value.found
    assert all(words in caught.value.do for words in ("'tokamax>=0.0.17'", "jax-triton", "3.12"))


@pytest.mark.parametrize("version", ["0.0.12", "0.0.16"])
def test_choose_of_an_old_tokamax_says_what_it_gets_wrong(installed, version):
    installed(version=version)
    with pytest.raises(BackendUnavailable) as caught:
        BACKENDS.choose("tokamax", HOPPER)
    assert f"tokamax {version}, whose Triton kernels give wrong weight gradients" in caught.value.found
    assert "0.0.17 or newer" in caught.value.found and "tokamax>=0.0.17" in caught.value.do


@pytest.mark.parametrize("found", ["0.3.1", "0.4.0"])
def test_choose_of_an_old_jax_triton_is_refused(installed, found):
    installed(jax_triton_version=found)
    with pytest.raises(BackendUnavailable) as caught:
        BACKENDS.choose("tokamax", HOPPER)
    assert f"jax-triton {found}, which" in caught.value.found and "not 0.4.1 or newer" in caught.value.found


@pytest.mark.parametrize("settings", [{"version": "0.0.16"}, {"jax_triton_version": "0.4.0"}], ids=str)
def test_load_of_old_packages_is_refused_before_anything_is_imported_or_changed(installed, settings):
    installed(**settings)
    with pytest.raises(BackendUnavailable, match="or newer"):
        matmul_tokamax.load()
    assert not sys.modules.keys() & {"triton", "tokamax", "jax_triton"}


@pytest.mark.parametrize("version", ["0.0.17", "0.0.18", "0.1.0", "0.1", "1.0.0.dev20261101", "0.0.18rc1"])
def test_choose_of_a_newer_tokamax_is_not_refused(installed, version):
    installed(version=version)
    assert BACKENDS.choose("tokamax", HOPPER).name == "tokamax"


@pytest.mark.parametrize("error", [ImportError("No module named 'xprof'"), RuntimeError("flags were not parsed")])
def test_choose_of_a_tokamax_that_does_not_import_gives_the_reason(installed, monkeypatch, error):
    installed()

    def breaks(module):
        raise error

    monkeypatch.setitem(sys.meta_path[0].bodies, "tokamax", breaks)
    with pytest.raises(BackendUnavailable, match="does not load") as caught:
        BACKENDS.choose("tokamax", HOPPER)
    assert str(error) in caught.value.found


def test_choose_after_jax_triton_lost_its_nvidia_half_says_so(installed):
    installed()
    import jax_triton.triton_lib

    assert jax_triton.triton_lib.tf32 == 0
    with pytest.raises(BackendUnavailable, match="jax_triton was imported first, and replaced its NVIDIA"):
        BACKENDS.choose("tokamax", HOPPER)
