"""The backends "te", "gmm" and "torch_mm_mxfp8" on stand-ins of their packages: the contract of the grouped matmul.

The stand-ins (tests/support/fakes) compute with PyTorch and check arguments as the packages do.
"""

from __future__ import annotations

import sys

import fakes
import numpy as np
import pytest
import torch
from fakes import grouped_gemm, torchao, transformer_engine
from fp8 import LEAST, MOST, relative_to_expected
from sides import Side, assert_correct, cached_problem, rounded

from moebius.core import BackendConfig, BackendUnavailable, Unsupported, reference
from moebius.core.precision import EXACT
from moebius.core.registry import Problem
from moebius.core.tolerance import bounds, within
from moebius.torch_frontend import GroupedExperts, grouped_matmul, matmul, matmul_mxfp8

FAKES = {"te": transformer_engine, "gmm": grouped_gemm, "torch_mm_mxfp8": torchao}
PACKAGES = {"te": "transformer_engine", "gmm": "grouped_gemm", "torch_mm_mxfp8": "torchao"}
INSTALLS = {"te": "transformer-engine[pytorch]", "gmm": "grouped_gemm", "torch_mm_mxfp8": "torchao"}
vendors = pytest.mark.parametrize("vendor", FAKES)
ROWS, N_IN, N_OUT = 13, 32, 64
SIZES = {
    "even": [4, 4, 4],
    "padding": [3, 2, 4],
    "empty_first": [0, 5, 8],
    "empty_last": [5, 8, 0],
    "one_takes_all": [0, 13, 0],
    "all_empty": [0, 0, 0],
}
HOPPER = Problem(device="cuda", dtype="bfloat16", dim=64, inter_dim=32, n_experts=4, capability=(9, 0))
BLACKWELL = Problem(device="cuda", dtype="bfloat16", dim=64, inter_dim=32, n_experts=4, capability=(10, 0))


@pytest.fixture
def registry(monkeypatch):
    """The backends, of which nothing was loaded; whatever a test makes of it is forgotten."""
    monkeypatch.setattr(matmul.BACKENDS, "_loaded", {})
    monkeypatch.setattr(matmul.BACKENDS, "_broken", {})
    fakes.forget()
    matmul._choose.cache_clear()
    yield matmul.BACKENDS
    fakes.forget()
    matmul._choose.cache_clear()


@pytest.fixture
def installed(registry, monkeypatch):
    """Installs a vendor's stand-in and lets the backend run on this CPU; the stand-in's calls."""
    monkeypatch.setattr(matmul, "_cuda", lambda *_: None)
    yield lambda vendor: FAKES[vendor].fake(monkeypatch)
    monkeypatch.undo()


def operands() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = (ROWS, N_IN), (3, N_IN, N_OUT), (ROWS, N_OUT)
    return tuple(rounded(rng.normal(size=shape), "bfloat16") for shape in shapes)


def run(vendor: str, rows, weight, sizes, dout, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    side = Side("torch", vendor)
    r, w, d = (side.array(value, dtype) for value in (rows, weight, dout))
    out = grouped_matmul(r.requires_grad_(), w.requires_grad_(), torch.tensor(sizes, dtype=torch.int32), backend=vendor)
    out.backward(d)
    return {name: side.numpy(value) for name, value in (("out", out), ("drows", r.grad), ("dweight", w.grad))}


@vendors
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_agrees_with_reference(installed, vendor: str, sizes: str) -> None:
    installed(vendor)
    rows, weight, dout = operands()

    def wanted(arithmetic):
        drows, dweight = reference.grouped_matmul_vjp(rows, weight, SIZES[sizes], dout, arithmetic)
        out = reference.grouped_matmul(rows, weight, SIZES[sizes], arithmetic)
        return {"out": out, "drows": drows, "dweight": dweight}

    exact = wanted(EXACT)
    limits = bounds(wanted, exact, "bfloat16")
    for name, value in run(vendor, rows, weight, SIZES[sizes], dout).items():
        assert within(value, exact[name], limits[name]), name


@vendors
def test_grouped_matmul_past_the_last_group_is_exactly_zero_and_reads_nothing(installed, vendor: str) -> None:
    installed(vendor)
    rows, weight, dout = operands()
    clean = run(vendor, rows, weight, [3, 0, 4], dout)
    rows[7:], dout[7:] = np.nan, np.inf
    found = run(vendor, rows, weight, [3, 0, 4], dout)
    assert (found["out"][7:] == 0).all() and (found["drows"][7:] == 0).all()
    for name, value in clean.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@vendors
def test_grouped_matmul_of_no_rows_keeps_its_shape(installed, vendor: str) -> None:
    installed(vendor)
    _, weight, _ = operands()
    found = run(vendor, np.ones((0, N_IN)), weight, [0, 0, 0], np.ones((0, N_OUT)))
    assert found["out"].shape == (0, N_OUT) and (found["dweight"] == 0).all()


LAYOUTS = {
    "strided_rows": lambda r, w: (torch.stack([r, r], 1).flatten(1)[:, : r.shape[1]], w),
    "transposed_rows": lambda r, w: (r.T.contiguous().T, w),
    "transposed_weight": lambda r, w: (r, w.mT.contiguous().mT),
    "permuted_weight": lambda r, w: (r, w.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    "expanded_rows": lambda r, w: (r[:1].expand_as(r), w),
}


@vendors
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_matmul_of_any_layout_equals_contiguous(installed, vendor: str, layout: str) -> None:
    installed(vendor)
    rows, weight, _ = (Side("torch", vendor).array(value, "bfloat16") for value in operands())
    bent = [t.detach().requires_grad_() for t in LAYOUTS[layout](rows, weight)]
    plain = [t.detach().contiguous().requires_grad_() for t in bent]
    results = []
    for r, w in (bent, plain):
        out = grouped_matmul(r, w, torch.tensor([3, 0, 4], dtype=torch.int32), backend=vendor)
        out.sum().backward()  # an expanded gradient, stride 0
        results.append((out.detach(), r.grad, w.grad))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@vendors
def test_experts_agree_with_reference(installed, vendor: str) -> None:
    calls = installed(vendor)
    problem = cached_problem(dim=32, inter=32, dtype="bfloat16", expert_bias=True)
    assert_correct(Side("torch", vendor), problem)
    assert calls


# ------------------------------------------------------------------------------------------------------ rows and errors
@vendors
def test_choose_a_vendor_whose_package_is_missing_names_it_and_its_install(registry, monkeypatch, vendor: str) -> None:
    monkeypatch.setattr("moebius.core.registry.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable) as caught:
        registry.choose(vendor, BLACKWELL)
    assert PACKAGES[vendor] in caught.value.found and INSTALLS[vendor] in caught.value.do


@vendors
def test_choose_a_vendor_whose_package_does_not_load_gives_the_reason(registry, monkeypatch, vendor: str) -> None:
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == PACKAGES[vendor]:
                raise OSError("libvendor.so.13: cannot open shared object file")

    monkeypatch.setattr("moebius.core.registry.find_spec", lambda name: object())
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGES[vendor]]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendUnavailable) as caught:
        registry.choose(vendor, BLACKWELL)
    assert "OSError: libvendor.so.13" in caught.value.found and INSTALLS[vendor] in caught.value.do


REFUSED = {
    "te on a CPU": ("te", {"device": "cpu", "capability": None}, "on CUDA, not on cpu"),
    "te of old": ("te", {"capability": (7, 5)}, "compute capability 8.0, not 7.5"),
    "te in float64": ("te", {"dtype": "float64"}, "no float64"),
    "gmm on a CPU": ("gmm", {"device": "cpu", "capability": None}, "on CUDA, not on cpu"),
    "gmm in float16": ("gmm", {"dtype": "float16"}, "bfloat16, not float16"),
    "mxfp8 on Hopper": ("torch_mm_mxfp8", {"capability": (9, 0)}, "compute capability 10.0, not 9.0"),
    "mxfp8 on a CPU": ("torch_mm_mxfp8", {"device": "cpu", "capability": None}, "on CUDA, not on cpu"),
    "mxfp8 in float16": ("torch_mm_mxfp8", {"dtype": "float16"}, "bfloat16, not float16"),
    "mxfp8 of odd widths": ("torch_mm_mxfp8", {"inter_dim": 48}, "multiples of 32, not D=64, I=48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_choose_a_vendor_that_cannot_serve_says_why(registry, monkeypatch, case: str) -> None:
    vendor, changes, said = REFUSED[case]
    FAKES[vendor].fake(monkeypatch)
    assert registry.choose(vendor, BLACKWELL).name == vendor
    fields = {name: getattr(BLACKWELL, name) for name in Problem.__slots__}
    with pytest.raises(Unsupported, match=said):
        registry.choose(vendor, Problem(**{**fields, **changes}))


@vendors
def test_choose_none_takes_no_vendor(registry, monkeypatch, vendor: str) -> None:
    FAKES[vendor].fake(monkeypatch)
    assert registry.choose(None, HOPPER).name == "grouped_mm"


@vendors
def test_choose_a_vendor_for_the_meta_device_is_left_open(registry, monkeypatch, vendor: str) -> None:
    FAKES[vendor].fake(monkeypatch)
    meta = Problem(device="meta", dtype="bfloat16", dim=64, inter_dim=32, n_experts=4)
    assert registry.choose(vendor, meta).name == vendor


def test_choose_te_of_an_old_version_names_both(registry, monkeypatch) -> None:
    transformer_engine.fake(monkeypatch, version="2.9.0")
    with pytest.raises(BackendUnavailable, match=r"transformer_engine 2\.9\.0, not 2\.20 or newer"):
        registry.choose("te", HOPPER)


def test_gmm_reads_a_transposed_weight_as_it_lies(installed) -> None:
    calls = installed("gmm")
    weight = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    rows, sizes = torch.randn(4, 64, dtype=torch.bfloat16), torch.tensor([4, 0], dtype=torch.int32)
    grouped_matmul(rows, weight.mT, sizes, backend="gmm")
    assert calls[0]["trans_b"] and calls[0]["b"].data_ptr() == weight.data_ptr()


def test_mxfp8_of_a_width_that_is_no_multiple_of_32_is_refused(installed) -> None:
    installed("torch_mm_mxfp8")
    ends = torch.tensor([2], dtype=torch.int32)
    with pytest.raises(Unsupported, match=r"found: matrices \[32, 48\]\ndo: widths that are multiples of 32"):
        matmul_mxfp8.product(torch.zeros(2, 32), torch.zeros(1, 32, 48), ends)


# ---------------------------------------------------------------------------------- Transformer Engine's autocast
@pytest.fixture
def on_hopper(installed, monkeypatch):
    """Transformer Engine's stand-in on a Hopper GPU; the GEMM's calls."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return installed("te")


@pytest.mark.parametrize("recipe", [transformer_engine.Float8CurrentScaling, transformer_engine.Float8BlockScaling])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul_in_an_autocast_quantises_its_gradients_after_it(on_hopper, recipe, transposed: bool) -> None:
    rows, weight, dout = (Side("torch", "te").array(value, "bfloat16") for value in operands())
    rows.requires_grad_()
    weight = (weight.mT.contiguous().mT if transposed else weight).requires_grad_()
    with transformer_engine.autocast(recipe()):
        out = grouped_matmul(rows, weight, torch.tensor([3, 0, 9], dtype=torch.int32), backend="te")
    out.backward(dout)
    assert [call["layout"] for call in on_hopper] == ["NN", "TN", "NT"]
    f, b = recipe().fp8_format.value
    r, w, part = rows.detach(), weight.detach()[2], slice(3, 12)
    assert LEAST < relative_to_expected(out[part], r[part], w, (f, f)) < MOST
    assert LEAST < relative_to_expected(rows.grad[part], dout[part], w.T, (b, f)) < MOST
    assert LEAST < relative_to_expected(weight.grad[2], r[part].T, dout[part], (f, b)) < MOST
    assert (out[12:] == 0).all() and (weight.grad[1] == 0).all()


def test_grouped_matmul_in_an_autocast_that_is_not_served_says_why_and_other_backends_take_no_notice(on_hopper) -> None:
    rows, weight, _ = (Side("torch", "te").array(value, "bfloat16") for value in operands())
    sizes = torch.tensor([3, 0, 9], dtype=torch.int32)
    with transformer_engine.autocast(transformer_engine.DelayedScaling()):
        grouped_matmul(rows, weight, sizes, backend="loop")
        with pytest.raises(Unsupported, match="DelayedScaling\nfound: it keeps a history"):
            grouped_matmul(rows, weight, sizes, backend="te")
    assert not on_hopper


@pytest.mark.parametrize("double_backward", [False, True])
def test_experts_in_an_autocast_quantise_all_six_products(on_hopper, double_backward: bool) -> None:
    problem = cached_problem(dim=32, inter=32, dtype="bfloat16")
    layer = GroupedExperts(problem.config, BackendConfig(experts="te", double_backward=double_backward))
    x = torch.randn(12, 32, dtype=torch.bfloat16, requires_grad=True)
    with transformer_engine.autocast(transformer_engine.Float8CurrentScaling()):
        y = layer(x, *(torch.from_numpy(value) for value in (problem.token_mask, problem.weights, problem.ids)))
    y.sum().backward()
    assert sorted(call["layout"] for call in on_hopper) == ["NN", "NN", "NT", "NT", "TN", "TN"]
    assert all(isinstance(call["A"][0], transformer_engine.Quantised) for call in on_hopper)
