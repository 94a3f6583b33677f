"""The backend "triton" on a Hopper GPU: against the reference and torch's own, at every kind of a group's end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sides import Side, rounded

from moebius.core import reference
from moebius.core.kernels import plan_grouped, plan_hopper
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within

torch = pytest.importorskip("torch")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no Hopper GPU is visible")]

SIDE = Side("torch", "triton", "cuda")
NAMES = ("out", "drows", "dweight")
# Rows of each expert, then rows of padding. A tile has 128 rows, a warpgroup's half of it and a copied block 64.
SIZES = {
    "ends": [0, 1, 63, 64, 65, 127, 128, 129, 0],
    "padding": [64, 0, 7, 500, 16],
    "one_takes_all": [0, 0, 1000, 0, 0],
    "all_empty": [0, 0, 0, 0, 0],
    "one_row": [0, 1, 0],
}
# In and out: whole tiles; less than one; tails in both; tails of one group of 8.
WIDTHS = [(256, 512), (8, 16), (200, 328), (2880, 264)]


@pytest.fixture(autouse=True, params=[False, True], ids=["wide", "few"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of both widths, whichever the number of rows would take."""
    monkeypatch.setattr(plan_hopper, "few", lambda *sizes: request.param)
    plan_grouped.product.cache_clear()


def operands(sizes: list[int], widths: tuple[int, int], dtype: str, padding: int = 0) -> list[np.ndarray]:
    rng, rows = np.random.default_rng(0), sum(sizes) + padding
    shapes = (rows, widths[0]), (len(sizes), *widths), (rows, widths[1])
    scales = 1.0, widths[0] ** -0.5, 1.0
    return [rounded(rng.normal(size=s) * scale, dtype) for s, scale in zip(shapes, scales, strict=True)]


def run(rows: Any, weight: Any, sizes: list[int], dout: Any, dtype: str, backend: str = "triton") -> list[Any]:
    r, w, d = (SIDE.array(value, dtype) for value in (rows, weight, dout))
    group_sizes = torch.tensor(sizes, dtype=torch.int32, device="cuda")
    out = SIDE.module.grouped_matmul(r.requires_grad_(), w.requires_grad_(), group_sizes, backend=backend)
    out.backward(d)
    return [out.detach(), r.grad, w.grad]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_matmul_triton_agrees_with_reference(sizes: str, widths: tuple[int, int], dtype: str) -> None:
    padding = 100 if sizes == "padding" else 0
    rows, weight, dout = operands(SIZES[sizes], widths, dtype, padding)

    def wanted(arithmetic: Any) -> dict[str, np.ndarray]:
        out = reference.grouped_matmul(rows, weight, SIZES[sizes], arithmetic)
        return dict(
            zip(NAMES, (out, *reference.grouped_matmul_vjp(rows, weight, SIZES[sizes], dout, arithmetic)), strict=True)
        )

    exact = wanted(EXACT)
    limits = bounds(wanted, exact, dtype)
    for name, value in zip(NAMES, run(rows, weight, SIZES[sizes], dout, dtype), strict=True):
        assert within(SIDE.numpy(value), exact[name], limits[name]), name


@pytest.mark.parametrize("widths", [(256, 512), (2880, 264)], ids=str)
def test_grouped_matmul_triton_has_the_bits_of_torchs_grouped_mm_and_the_same_again(widths: tuple[int, int]) -> None:
    rows, weight, dout = operands(SIZES["ends"], widths, "bfloat16")
    found, wanted, again = (
        run(rows, weight, SIZES["ends"], dout, "bfloat16", backend) for backend in ("triton", "grouped_mm", "triton")
    )
    for name, *values in zip(NAMES, found, wanted, again, strict=True):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2]), name


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("sizes", [[65, 1, 127, 0, 64, 3], [1, 1, 1, 1, 1, 1], [128, 63, 2, 64, 0, 129]], ids=str)
def test_grouped_matmul_triton_with_poison_in_one_expert_keeps_it_there(sizes: list[int], poison: float) -> None:
    rows, weight, dout = operands(sizes, (256, 328), "bfloat16", padding=70)
    clean = run(rows, weight, sizes, dout, "bfloat16")
    own = slice(sum(sizes[:2]), sum(sizes[:3]))
    for value in (rows, dout):
        value[own], value[sum(sizes) :] = poison, poison
    weight[2] = poison
    found = run(rows, weight, sizes, dout, "bfloat16")
    end = sum(sizes)
    others = [at for at in range(end) if not own.start <= at < own.stop]
    for name, here, there in zip(NAMES[:2], found, clean, strict=False):
        assert torch.equal(here[others], there[others]), name
        assert not here[end:].any(), name
    assert torch.equal(found[2][[0, 1, 3, 4, 5]], clean[2][[0, 1, 3, 4, 5]])
    assert not torch.isfinite(found[0][own]).any()


def test_grouped_matmul_triton_takes_operands_that_start_between_16_bytes() -> None:
    rows, weight, dout = operands([70, 30], (64, 72), "bfloat16")
    wanted = run(rows, weight, [70, 30], dout, "bfloat16")
    flat = torch.empty(rows.size + 1, dtype=torch.bfloat16, device="cuda")
    shifted = flat[1:].view(rows.shape)
    shifted.copy_(SIDE.array(rows, "bfloat16"))
    sizes = torch.tensor([70, 30], dtype=torch.int32, device="cuda")
    w = SIDE.array(weight, "bfloat16")
    found = SIDE.module.grouped_matmul(shifted, w, sizes, backend="triton")
    assert torch.equal(found, wanted[0])
    mirrored = w.mT.contiguous().mT  # read where it lies, in the other orientation
    assert torch.equal(SIDE.module.grouped_matmul(shifted, mirrored, sizes, backend="triton"), wanted[0])


def test_grouped_matmul_triton_leaves_the_users_allocator_alone() -> None:
    import triton
    from triton.runtime._allocation import _allocator

    def own(size: int, alignment: int, stream: int | None) -> Any:
        raise AssertionError("the user's allocator was asked")

    before = _allocator.get()
    triton.set_allocator(own)
    try:
        run(*operands([70, 30], (64, 72), "bfloat16")[:2], [70, 30], np.ones((100, 72)), "bfloat16")
        assert _allocator.get() is own
    finally:
        triton.set_allocator(before)


def test_grouped_matmul_triton_in_a_captured_graph_reads_group_sizes_of_each_replay() -> None:
    rows, weight, _ = operands([70, 30, 28], (256, 512), "bfloat16")
    r, w = SIDE.array(rows, "bfloat16"), SIDE.array(weight, "bfloat16")
    sizes = torch.tensor([70, 30, 28], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        SIDE.module.grouped_matmul(r, w, sizes, backend="triton")  # compiled before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = SIDE.module.grouped_matmul(r, w, sizes, backend="triton")
        for other in ([70, 30, 28], [0, 128, 0], [1, 2, 3]):
            sizes.copy_(torch.tensor(other))
            r.copy_(torch.randn_like(r))
            graph.replay()
            assert torch.equal(out, SIDE.module.grouped_matmul(r, w, sizes, backend="grouped_mm"))


def test_grouped_matmul_triton_of_more_than_2_31_elements() -> None:
    """In rows, in the output and, in one matrix after the other, in the weights."""
    n, e = 2**31 // 2048 + 4096, 1030
    rows = torch.zeros(n, 2048, dtype=torch.bfloat16, device="cuda")
    rows[-300:] = torch.randn(300, 2048, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(e, 2048, 1032, dtype=torch.bfloat16, device="cuda")
    weight[-1] = torch.randn(2048, 1032, dtype=torch.bfloat16, device="cuda") / 45
    sizes = torch.zeros(e, dtype=torch.int32, device="cuda")
    sizes[0], sizes[-1] = n - 300, 300
    with torch.no_grad():
        out = SIDE.module.grouped_matmul(rows, weight, sizes, backend="triton")
    assert torch.allclose(out[-300:], rows[-300:] @ weight[-1], rtol=2e-2, atol=1e-2)
    assert not out[: n - 300].any()
