"""What is Transformer Engine's own about the grouped matmul, on a stand-in: layouts without a copy, TF32, FP8."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from fakes import transformer_engine as te
from fp8 import LEAST, MOST, relative_to_expected
from torch import Tensor

from moebius.core import Unsupported
from moebius.torch_frontend import matmul_loop, matmul_te, matmul_te_fp8

D, F = 32, 48
SIZES = {
    "uneven": [3, 17, 5],
    "padding": [16, 0, 4],
    "multiples": [16, 0, 9 + 7],
    "one_takes_all": [0, 40, 0],
}
RECIPES = (te.Float8CurrentScaling, te.Float8BlockScaling, te.MXFP8BlockScaling)
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda kind: kind.__name__)


@pytest.fixture
def calls(monkeypatch):
    """Transformer Engine's stand-in, on a GPU that takes every recipe; the GEMM's calls."""
    on(monkeypatch, (10, 0))
    return te.fake(monkeypatch)


def on(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.fixture
def precision():
    """Sets PyTorch's switch of float32 products on CUDA; afterwards it is as it was."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield lambda value: setattr(switch, "fp32_precision", value)
    switch.fp32_precision = before


def operands(dtype: torch.dtype = torch.bfloat16, n_in: int = D, n_out: int = F) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, of which some are past the end and hold poison; matrices; the gradient of the product."""
    generator = torch.Generator().manual_seed(0)
    shapes = (41, n_in), (3, n_in, n_out), (41, n_out)
    rows, weight, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    rows[-1], dout[-1] = torch.nan, torch.inf
    return rows, weight, dout


def prepared(sizes: list[int], recipe: te.Recipe | None = None):
    group_sizes = torch.tensor(sizes, dtype=torch.int32)
    return matmul_te.prepare(group_sizes) if recipe is None else matmul_te_fp8.prepare(group_sizes, recipe)


# ------------------------------------------------------------------------------------------------------- high precision
def test_products_copy_no_matrix_and_write_one_output(calls) -> None:
    rows, weight, dout = operands()
    splits = prepared([3, 0, 5])
    out, drows = matmul_te.product(rows, weight, splits), matmul_te.product(dout, weight.mT, splits)
    assert [call["layout"] for call in calls] == ["NN", "TN"]
    for call, whole in zip(calls, (out, drows), strict=True):
        assert [matrix.data_ptr() for matrix in call["A"]] == [weight[0].data_ptr(), weight[2].data_ptr()]
        assert [part.data_ptr() for part in call["out"]] == [whole.data_ptr()]
        assert call["splits"] == [3, 5]


def test_weight_gradient_writes_one_stack_and_zeroes_what_has_no_rows(calls) -> None:
    rows, _, dout = operands()
    dweight = matmul_te.weight_gradient(rows, dout, prepared([3, 0, 5]))
    (call,) = calls
    assert call["layout"] == "NT" and dweight.shape == (3, D, F) and dweight.is_contiguous()
    assert [part.data_ptr() for part in call["out"]] == [dweight[0].data_ptr(), dweight[2].data_ptr()]
    assert (dweight[1] == 0).all()


def test_no_rows_at_all_launch_nothing(calls) -> None:
    rows, weight, dout = operands()
    splits = prepared([0, 0, 0])
    assert matmul_te.product(rows, weight, splits).shape == (41, F)
    assert (matmul_te.weight_gradient(rows, dout, splits) == 0).all() and not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernels_of_other_dtypes_equal_loop(calls, precision, dtype) -> None:
    precision("tf32")
    rows, weight, dout = operands(dtype)
    splits, sizes = prepared([3, 0, 30]), [3, 0, 30]
    limit = {"rtol": float(torch.finfo(dtype).eps) * 8, "atol": float(torch.finfo(dtype).eps) * 8}
    for found, wanted in (
        (matmul_te.product(rows, weight, splits)[:33], matmul_loop.product(rows, weight, sizes)[:33]),
        (matmul_te.product(dout, weight.mT, splits)[:33], matmul_loop.product(dout, weight.mT, sizes)[:33]),
        (matmul_te.weight_gradient(rows, dout, splits), matmul_loop.weight_gradient(rows, dout, sizes)),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, **limit)


@pytest.mark.parametrize("asked", ["none", "ieee"])
def test_float32_where_torch_allows_no_tf32_is_refused(calls, precision, asked: str) -> None:
    precision(asked)
    rows, weight, dout = operands(torch.float32)
    for call in (
        lambda: matmul_te.product(rows, weight, prepared([3, 0, 5])),
        lambda: matmul_te.weight_gradient(rows, dout, prepared([3, 0, 5])),
    ):
        with pytest.raises(Unsupported, match=r"in float32\nfound: .* TF32.*\ndo: torch.set_float32_matmul_precision"):
            call()
    assert not calls


# ------------------------------------------------------------------------------------------------------------------ FP8
def wanted_fp8(tensor: Tensor, recipe: te.Recipe, operand: str, *, columnwise: bool) -> Tensor:
    """What the recipe makes of one expert's operand, by the stand-in's quantizer, each parameter by hand."""
    dtype = recipe.fp8_format.value[operand == "grad_output"]
    quantizer = te.Quantizer(recipe.kind, dtype, recipe.kind == "float8_block_scaling" and operand == "weight")
    if recipe.kind == "float8_current_scaling":
        name = {"input": "fwd_inp", "weight": "fwd_weight", "grad_output": "bwd_grad"}[operand]
        params = getattr(recipe, f"fp8_quant_{name}")
        quantizer.force_pow_2_scales, quantizer.amax_epsilon = params.power_2_scale, params.amax_epsilon
    return quantizer.values(tensor, columnwise=columnwise)


@recipes
@pytest.mark.parametrize("sizes", SIZES)
def test_fp8_kernels_multiply_what_the_recipe_makes_of_each_expert(calls, recipe, sizes: str) -> None:
    rows, weight, dout = operands(n_in=32, n_out=64)
    made, padded = recipe(), prepared(SIZES[sizes], recipe())
    out = matmul_te_fp8.product(rows, weight, padded)
    drows = matmul_te_fp8.product(dout, weight.mT, padded)
    dweight = matmul_te_fp8.weight_gradient(rows, dout, padded)
    assert [call["layout"] for call in calls] == ["NN", "TN", "NT"]
    end = 0
    for expert, size in enumerate(SIZES[sizes]):
        part, end = slice(end, end + size), end + size
        if not size:
            assert (dweight[expert] == 0).all()
            continue
        along = wanted_fp8(rows[part], made, "input", columnwise=False)
        down = wanted_fp8(weight[expert], made, "weight", columnwise=True)
        torch.testing.assert_close(out[part], (along @ down).bfloat16())
        along = wanted_fp8(dout[part], made, "grad_output", columnwise=False)
        down = wanted_fp8(weight[expert], made, "weight", columnwise=False)
        torch.testing.assert_close(drows[part], (along @ down.T).bfloat16())
        left = wanted_fp8(rows[part], made, "input", columnwise=True)
        right = wanted_fp8(dout[part], made, "grad_output", columnwise=True)
        torch.testing.assert_close(dweight[expert], (left.T @ right).bfloat16())


@recipes
def test_fp8_kernels_stay_near_float64_as_the_formats_allow(calls, recipe) -> None:
    rows, weight, dout = operands(n_in=256, n_out=128)
    made, padded = recipe(), prepared([3, 0, 37], recipe())
    forward, backward = made.fp8_format.value
    for name, found, left, right, second in (
        ("out", matmul_te_fp8.product(rows, weight, padded)[:3], rows[:3], weight[0], forward),
        ("drows", matmul_te_fp8.product(dout, weight.mT, padded)[:3], weight[0], dout[:3].T, backward),
        ("dweight", matmul_te_fp8.weight_gradient(rows, dout, padded)[2], rows[3:40].T, dout[3:40], backward),
    ):
        found = found.T if name == "drows" else found
        error = relative_to_expected(found, left, right, (forward, second))
        assert LEAST < error < MOST, name


@pytest.mark.parametrize("recipe, multiple", [(te.Float8CurrentScaling, 16), (te.MXFP8BlockScaling, 32)])
def test_fp8_pads_each_experts_rows_to_what_the_recipe_takes(calls, recipe, multiple: int) -> None:
    rows, weight, _ = operands(n_out=64)
    matmul_te_fp8.product(rows, weight, prepared([1, 0, 33], recipe()))
    assert calls[0]["splits"] == [multiple, {16: 48, 32: 64}[multiple]]
    assert [len(part.rowwise) for part in calls[0]["B"]] == calls[0]["splits"]
    assert (calls[0]["B"][0].rowwise[1:] == 0).all()


def test_fp8_of_sizes_that_need_no_padding_copies_no_row(calls) -> None:
    padded = prepared([16, 0, 16], te.Float8CurrentScaling())
    assert padded.places_N is None
    rows, weight, _ = operands()
    out = matmul_te_fp8.product(rows, weight, padded)
    assert calls[0]["out"][0].data_ptr() == out.data_ptr()


def test_fp8_adds_as_the_recipe_says_or_as_the_package_does_where_it_says_nothing(calls) -> None:
    rows, weight, dout = operands(n_out=64)
    current = te.Float8CurrentScaling(
        fp8_gemm_fprop=te.MMParams(True), fp8_gemm_dgrad=te.MMParams(False), fp8_gemm_wgrad=te.MMParams(False)
    )
    for recipe in (current, te.MXFP8BlockScaling()):
        padded = prepared([16, 0, 16], recipe)
        matmul_te_fp8.product(rows, weight, padded)
        matmul_te_fp8.product(dout, weight.mT, padded)
        matmul_te_fp8.weight_gradient(rows, dout, padded)
    assert [call["accurate"] for call in calls] == [True, False, False, False, True, True]


def test_fp8_with_gradients_in_high_precision_quantises_the_forward_pass_alone(calls) -> None:
    rows, weight, dout = operands()
    recipe = te.Float8CurrentScaling(backward_override="high_precision")
    padded, splits = prepared([3, 0, 5], recipe), prepared([3, 0, 5])
    matmul_te_fp8.product(rows, weight, padded)
    assert isinstance(calls[0]["A"][0], te.Quantised)
    drows = matmul_te_fp8.product(dout, weight.mT, padded)
    dweight = matmul_te_fp8.weight_gradient(rows, dout, padded)
    torch.testing.assert_close(drows[:8], matmul_te.product(dout, weight.mT, splits)[:8], rtol=0, atol=0)
    torch.testing.assert_close(dweight, matmul_te.weight_gradient(rows, dout, splits), rtol=0, atol=0)


@recipes
def test_fp8_of_no_rows_launches_nothing(calls, recipe) -> None:
    rows, weight, dout = operands(n_out=64)
    padded = prepared([0, 0, 0], recipe())
    assert matmul_te_fp8.product(rows, weight, padded).shape == (41, 64)
    assert (matmul_te_fp8.weight_gradient(rows, dout, padded) == 0).all() and not calls


REFUSED = {
    "delayed": (te.DelayedScaling, {}, "keeps a history of maxima"),
    "nvfp4": (te.NVFP4BlockScaling, {}, "4-bit"),
    "custom": (te.CustomRecipe, {}, "operand to operand"),
    "unknown": (te.NewRecipe, {}, "a kind that this version does not know"),
    "mxfp8 on Hopper": (te.MXFP8BlockScaling, {"capability": (9, 0)}, "capability 9.0; it needs 10.0"),
    "blocks on Ada": (te.Float8BlockScaling, {"capability": (8, 9)}, "capability 8.9; it needs 9.0"),
    "current on Ampere": (te.Float8CurrentScaling, {"capability": (8, 0)}, "capability 8.0; it needs 8.9"),
    "widths of 16": (te.Float8CurrentScaling, {"n_out": 24}, r"matrices \[32, 24\]; it takes multiples of 16"),
    "widths of 16 on the other side": (te.Float8CurrentScaling, {"n_in": 24}, r"matrices \[24, 64\]"),
    "widths of 32": (te.MXFP8BlockScaling, {"n_out": 48}, r"matrices \[32, 48\]; it takes multiples of 32"),
    "dequantized": (te.Float8CurrentScaling, {"backward_override": "dequantized"}, "backward_override='dequantized'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fp8_that_cannot_be_served_says_why(calls, monkeypatch, case: str) -> None:
    kind, changes, said = REFUSED[case]
    on(monkeypatch, changes.get("capability", (10, 0)))
    recipe = kind(backward_override=changes.get("backward_override"))
    rows, weight, _ = operands(n_in=changes.get("n_in", D), n_out=changes.get("n_out", 64))
    with pytest.raises(Unsupported, match=rf"with the recipe {kind.__name__}\nfound: .*{said}.*\ndo: ."):
        matmul_te_fp8.product(rows, weight, prepared([3, 0, 5], recipe))
    assert not calls


def test_asked_is_the_recipe_of_the_autocast_that_is_open(calls) -> None:
    recipe = te.Float8CurrentScaling()
    assert matmul_te_fp8.asked() == ""
    with te.autocast(recipe):
        key = matmul_te_fp8.asked()
    assert matmul_te_fp8.recipe_of(key) is recipe and matmul_te_fp8.asked() == ""


def test_asked_tells_recipes_apart(calls) -> None:
    keys = []
    for recipe in (te.Float8CurrentScaling(), te.Float8BlockScaling(), te.Float8CurrentScaling(te.Format.E4M3)):
        with te.autocast(recipe):
            keys.append(matmul_te_fp8.asked())
    assert len(set(keys)) == 3


def test_asked_without_the_package_is_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if "transformer_engine" not in k})
    assert matmul_te_fp8.asked() == ""


@pytest.mark.parametrize("kind", matmul_te_fp8.RULES)
def test_rule_of_a_recipe_is_that_of_its_kind(kind: str) -> None:
    recipe = SimpleNamespace(**{name: (lambda name=name: name == kind) for name in matmul_te_fp8.RULES})
    assert matmul_te_fp8.rule_of(recipe) is matmul_te_fp8.RULES[kind]
