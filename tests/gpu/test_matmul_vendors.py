"""The backends "te", "gmm" and "torch_mm_mxfp8" on an NVIDIA GPU, each where its package is installed."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fp8 import LEAST, MOST, relative_to_expected
from sides import Side, assert_correct, cached_problem, rounded

from moebius.core import BackendUnavailable, Unsupported, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

torch = pytest.importorskip("torch")
# The packages warn when they are imported, of each other and of themselves.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible"),
    pytest.mark.filterwarnings("ignore"),
]
PACKAGES = {"te": "transformer_engine.pytorch", "gmm": "grouped_gemm"}
vendors = pytest.mark.parametrize("vendor", PACKAGES)
ROWS, N_IN, N_OUT = 1000, 256, 384
SIZES = {
    "uneven": [1, 127, 300, 0, 572],
    "padding": [64, 0, 7, 500, 16],
    "multiples": [16, 160, 0, 320, 504],
    "one_takes_all": [0, 0, 1000, 0, 0],
    "all_empty": [0, 0, 0, 0, 0],
}


@pytest.fixture(autouse=True)
def package(request: Any) -> None:
    """Skip where the package of the test's vendor is not installed; "te" where the test names none."""
    callspec = getattr(request.node, "callspec", SimpleNamespace(params={}))
    vendor = callspec.params.get("vendor", "te")
    if vendor in PACKAGES:
        pytest.importorskip(PACKAGES[vendor])


def operands(n_in: int = N_IN, n_out: int = N_OUT, dtype: str = "bfloat16") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = (ROWS, n_in), (5, n_in, n_out), (ROWS, n_out)
    scales = 1.0, n_in**-0.5, 1.0
    return tuple(rounded(rng.normal(size=s) * scale, dtype) for s, scale in zip(shapes, scales, strict=True))


def run(vendor: str, rows, weight, sizes, dout, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    side = Side("torch", vendor, "cuda")
    r, w, d = (side.array(value, dtype) for value in (rows, weight, dout))
    group_sizes = torch.tensor(sizes, dtype=torch.int32, device="cuda")
    out = side.module.grouped_matmul(r.requires_grad_(), w.requires_grad_(), group_sizes, backend=vendor)
    out.backward(d)
    return {name: side.numpy(value) for name, value in (("out", out), ("drows", r.grad), ("dweight", w.grad))}


def assert_near_reference(found: dict[str, np.ndarray], rows, weight, sizes, dout, dtype: str) -> None:
    def wanted(arithmetic: Any) -> dict[str, np.ndarray]:
        drows, dweight = reference.grouped_matmul_vjp(rows, weight, sizes, dout, arithmetic)
        out = reference.grouped_matmul(rows, weight, sizes, arithmetic)
        return {"out": out, "drows": drows, "dweight": dweight}

    exact = wanted(EXACT)
    limits = bounds(wanted, exact, dtype)
    for name, value in found.items():
        assert within(value, exact[name], limits[name]), name


# -------------------------------------------------------------------------------------------------------- 16-bit dtypes
@vendors
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_on_a_gpu_agrees_with_reference(vendor: str, sizes: str) -> None:
    rows, weight, dout = operands()
    found = run(vendor, rows, weight, SIZES[sizes], dout)
    assert_near_reference(found, rows, weight, SIZES[sizes], dout, "bfloat16")


@vendors
def test_grouped_matmul_on_a_gpu_of_odd_widths_agrees_with_reference(vendor: str) -> None:
    rows, weight, dout = operands(n_in=33, n_out=51)
    found = run(vendor, rows, weight, SIZES["uneven"], dout)
    assert_near_reference(found, rows, weight, SIZES["uneven"], dout, "bfloat16")


def test_te_on_a_gpu_in_float16_agrees_with_reference() -> None:
    rows, weight, dout = operands(dtype="float16")
    found = run("te", rows, weight, SIZES["padding"], dout, "float16")
    assert_near_reference(found, rows, weight, SIZES["padding"], dout, "float16")


def test_te_on_a_gpu_in_float32_waits_for_the_switch_of_tf32() -> None:
    rows, weight, dout = operands(dtype="float32")
    with pytest.raises(Unsupported, match="TF32"):
        run("te", rows, weight, SIZES["padding"], dout, "float32")
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    try:
        found = run("te", rows, weight, SIZES["padding"], dout, "float32")
    finally:
        switch.fp32_precision = before
    # Factors of TF32's 11 bits: about as far off as results of float16's 11 bits.
    assert_near_reference(found, rows, weight, SIZES["padding"], dout, "float16")


@vendors
def test_grouped_matmul_on_a_gpu_past_the_last_group_reads_nothing(vendor: str) -> None:
    rows, weight, dout = operands()
    clean = run(vendor, rows, weight, SIZES["padding"], dout)
    end = sum(SIZES["padding"])
    rows[end:], dout[end:] = np.nan, np.inf
    found = run(vendor, rows, weight, SIZES["padding"], dout)
    assert (found["out"][end:] == 0).all() and (found["drows"][end:] == 0).all()
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@vendors
def test_grouped_matmul_on_a_gpu_of_no_rows_keeps_its_shape(vendor: str) -> None:
    _, weight, _ = operands()
    found = run(vendor, np.ones((0, N_IN)), weight, SIZES["all_empty"], np.ones((0, N_OUT)))
    assert found["out"].shape == (0, N_OUT) and (found["dweight"] == 0).all()


@vendors
def test_grouped_matmul_on_a_stream_of_the_caller_equals_the_default_stream(vendor: str) -> None:
    rows, weight, dout = operands()
    wanted = run(vendor, rows, weight, SIZES["uneven"], dout)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = run(vendor, rows, weight, SIZES["uneven"], dout)
    stream.synchronize()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@vendors
def test_experts_on_a_gpu_agree_with_reference(vendor: str) -> None:
    problem = cached_problem(tokens=200, dim=64, inter=32, n_experts=8, k=2, dtype="bfloat16", expert_bias=True)
    assert_correct(Side("torch", vendor, "cuda"), problem)


@vendors
@pytest.mark.parametrize("transposed", [False, True])
def test_products_on_a_gpu_copy_no_matrix(vendor: str, transposed: bool) -> None:
    from moebius.torch_frontend.matmul import kernels

    weight = torch.randn(16, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    rows = torch.randn(64, 1024, dtype=torch.bfloat16, device="cuda")
    backend = kernels(vendor, rows, weight.shape)
    prepared = backend.prepare(torch.full((16,), 4, dtype=torch.int32, device="cuda"))
    weight = weight.mT if transposed else weight
    backend.product(rows, weight, prepared)  # workspaces
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backend.product(rows, weight, prepared)
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes // 16


# ------------------------------------------------------------------------------------------------------------------ FP8
RECIPES = ("Float8CurrentScaling", "Float8BlockScaling")


def recipe_of(name: str) -> Any:
    return getattr(importlib.import_module("transformer_engine.common.recipe"), name)()


def fp8(recipe: Any, rows: Any, weight: Any, sizes: list[int], dout: Any) -> dict[str, Any]:
    """The three products of tensors on the GPU."""
    from moebius.torch_frontend import matmul_te_fp8 as backend

    padded = backend.prepare(torch.tensor(sizes, dtype=torch.int32, device="cuda"), recipe)
    return {
        "out": backend.product(rows, weight, padded),
        "drows": backend.product(dout, weight.mT, padded),
        "dweight": backend.weight_gradient(rows, dout, padded),
    }


def formats_of(recipe: Any) -> tuple[Any, Any]:
    """Dtypes of the forward and of the backward pass."""
    hybrid = recipe.fp8_format.name == "HYBRID"
    return torch.float8_e4m3fn, torch.float8_e5m2 if hybrid else torch.float8_e4m3fn


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sizes", ["uneven", "padding", "multiples", "one_takes_all"])
def test_fp8_on_a_gpu_is_as_far_from_float64_as_its_formats_say(recipe: str, sizes: str) -> None:
    rows, weight, dout = (Side("torch", "te", "cuda").array(value, "bfloat16") for value in operands())
    end = sum(SIZES[sizes])
    rows[end:], dout[end:] = torch.nan, torch.inf
    made = recipe_of(recipe)
    found = fp8(made, rows, weight, SIZES[sizes], dout)
    forward, backward = formats_of(made)
    start = 0
    for expert, size in enumerate(SIZES[sizes]):
        part, start = slice(start, start + size), start + size
        if not size:
            assert (found["dweight"][expert] == 0).all()
            continue
        errors = {
            "out": relative_to_expected(found["out"][part], rows[part], weight[expert], (forward, forward)),
            "drows": relative_to_expected(found["drows"][part], dout[part], weight[expert].T, (backward, forward)),
            "dweight": relative_to_expected(found["dweight"][expert], rows[part].T, dout[part], (forward, backward)),
        }
        assert all(LEAST < error < MOST for error in errors.values()), (expert, errors)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_on_a_gpu_of_no_rows_is_zero(recipe: str) -> None:
    rows, weight, dout = (Side("torch", "te", "cuda").array(value, "bfloat16") for value in operands())
    found = fp8(recipe_of(recipe), rows, weight, SIZES["all_empty"], dout)
    assert found["out"].shape == (ROWS, N_OUT) and (found["dweight"] == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_on_a_gpu_twice_is_the_same_bit_for_bit(recipe: str) -> None:
    rows, weight, dout = (Side("torch", "te", "cuda").array(value, "bfloat16") for value in operands())
    first, second = (fp8(recipe_of(recipe), rows, weight, SIZES["uneven"], dout) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_asked_on_a_gpu_is_the_recipe_of_the_autocast() -> None:
    import transformer_engine.pytorch as te

    from moebius.torch_frontend import matmul_te_fp8

    for name in RECIPES:
        recipe = recipe_of(name)
        with te.autocast(enabled=True, recipe=recipe):
            key = matmul_te_fp8.asked()
        assert matmul_te_fp8.recipe_of(key) is recipe and matmul_te_fp8.asked() == ""
        with te.autocast(enabled=False, recipe=recipe):
            assert matmul_te_fp8.asked() == ""


@pytest.mark.parametrize(
    "recipe, said",
    [
        ("DelayedScaling", "history of maxima"),
        ("NVFP4BlockScaling", "4-bit"),
        ("MXFP8BlockScaling", "it needs 10.0"),
    ],
)
def test_fp8_on_a_gpu_of_a_recipe_that_is_not_served_says_why(recipe: str, said: str) -> None:
    if recipe == "MXFP8BlockScaling" and torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this GPU has MXFP8")
    rows, weight, dout = (Side("torch", "te", "cuda").array(value, "bfloat16") for value in operands())
    with pytest.raises(Unsupported, match=said):
        fp8(recipe_of(recipe), rows, weight, SIZES["uneven"], dout)


def test_fp8_on_a_gpu_of_odd_widths_is_refused() -> None:
    values = operands(n_in=40)
    rows, weight, dout = (Side("torch", "te", "cuda").array(value, "bfloat16") for value in values)
    with pytest.raises(Unsupported, match=r"matrices \[40, 384\]; it takes multiples of 16"):
        fp8(recipe_of("Float8CurrentScaling"), rows, weight, SIZES["uneven"], dout)


def test_mxfp8_of_torchao_on_a_gpu_below_10_is_refused() -> None:
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this GPU has MXFP8")
    rows, weight, dout = operands()
    with pytest.raises(
        (Unsupported, BackendUnavailable), match=r"compute capability 10\.0, not|not installed: torchao"
    ):
        run("torch_mm_mxfp8", rows, weight, SIZES["uneven"], dout)
