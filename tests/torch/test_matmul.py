"""What is PyTorch's own about the grouped matmul: the operators, layouts, compilation, double backward."""

from __future__ import annotations

import pytest
import torch

from moebius.torch_frontend import grouped_matmul
from moebius.torch_frontend.matmul import _product, _weight_gradient, choose

BACKENDS = ("loop", "grouped_mm")
backends = pytest.mark.parametrize("backend", BACKENDS)
SIZES = torch.tensor([3, 0, 4], dtype=torch.int32)


def operands(dtype=torch.float32, widths=(10, 7), grad=False):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, widths[0], generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(3, *widths, generator=generator, dtype=torch.float64).to(dtype)
    return rows.requires_grad_(grad), weight.requires_grad_(grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators_pass_torchs_own_checks(dtype) -> None:
    rows, weight = operands(dtype, grad=True)
    dout = torch.randn(9, 7).to(dtype).requires_grad_()
    backend = "loop" if dtype == torch.float64 else "grouped_mm"
    torch.library.opcheck(_product, (rows, weight, SIZES, backend))
    torch.library.opcheck(_weight_gradient, (rows, dout, SIZES, backend))


def test_grouped_matmul_first_and_second_derivatives_in_float64() -> None:
    rows, weight = operands(torch.float64, grad=True)

    def run(r, w):
        return grouped_matmul(r, w, SIZES, backend="loop")

    assert torch.autograd.gradcheck(run, (rows, weight))
    assert torch.autograd.gradgradcheck(run, (rows, weight))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", [(10, 7), (16, 8)], ids=["odd", "aligned"])
def test_grouped_matmul_compiled_equals_eager(backend, dtype, widths) -> None:
    def run(r, w):
        return grouped_matmul(r, w, SIZES, backend=backend)

    def both(function):
        rows, weight = operands(dtype, widths, grad=True)
        out = function(rows, weight)
        out.backward(torch.ones_like(out))
        return out.detach(), rows.grad, weight.grad

    torch.compiler.reset()  # one code object, many cases: more than the limit of recompilations
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(both(compiled), both(run), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


LAYOUTS = {
    "strided_rows": lambda r, w: (torch.stack([r, r], 1).flatten(1)[:, : r.shape[1]], w),
    "every_other_row": lambda r, w: (torch.stack([r, r], 1).flatten(0, 1)[::2], w),
    "transposed_rows": lambda r, w: (r.T.contiguous().T, w),
    "transposed_weight": lambda r, w: (r, w.mT.contiguous().mT),
    "permuted_weight": lambda r, w: (r, w.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    "expanded_rows": lambda r, w: (r[:1].expand_as(r), w),
}


@backends
@pytest.mark.parametrize("widths", [(10, 7), (16, 8)], ids=["odd", "aligned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_matmul_of_any_layout_equals_contiguous(backend, widths, layout) -> None:
    rows, weight = operands(widths=widths)
    bent = [t.detach().requires_grad_() for t in LAYOUTS[layout](rows, weight)]
    plain = [t.detach().contiguous().requires_grad_() for t in bent]
    grads = []
    for r, w in (bent, plain):
        out = grouped_matmul(r, w, SIZES, backend=backend)
        out.sum().backward()  # an expanded gradient, stride 0
        grads.append((out.detach(), r.grad, w.grad))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@backends
def test_grouped_matmul_of_frozen_operands_skips_their_gradient(backend) -> None:
    rows, weight = operands(grad=True)
    grouped_matmul(rows.detach(), weight, SIZES, backend=backend).sum().backward()
    grouped_matmul(rows, weight.detach(), SIZES, backend=backend).sum().backward()
    assert rows.grad is not None and weight.grad is not None


def test_choose_takes_grouped_mm_unless_the_dtype_is_float64() -> None:
    assert choose(None, torch.empty(0), (4, 8, 8)).name == "grouped_mm"
    assert choose(None, torch.empty(0, dtype=torch.float64), (4, 8, 8)).name == "loop"
