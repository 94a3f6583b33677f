"""Cases of the portable grouped products: one list for CUDA and for Triton's interpreter; see kernel_cases.py.

Every operand lies amid NaN and every output amid a number of its own, so that a read or a write beyond them shows.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from kernel_draws import NAN, Where, check, exact
from torch import Tensor

from moebius.core import reference
from moebius.core.kernels import plan_portable as plan
from moebius.core.kernels.interpreter import mend
from moebius.core.precision import Arithmetic, dtype_name
from moebius.torch_frontend import launch

MARK = 7.0  # what outputs hold before
_BESIDE = 4096  # elements on either side


def amid(value: Tensor, filling: float) -> Tensor:
    """`value`, contiguous, with `filling` in the memory before and behind it."""
    whole = torch.full((value.numel() + 2 * _BESIDE,), filling, dtype=value.dtype, device=value.device)
    inner = whole[_BESIDE:-_BESIDE].view(value.shape)
    inner.copy_(value)
    return inner


def kept(value: Tensor) -> bool:
    """Whether the memory round an output of `amid` is as it was."""
    whole = value.as_strided((value.numel() + 2 * _BESIDE,), (1,), value.storage_offset() - _BESIDE)
    return bool((whole[:_BESIDE] == MARK).all() and (whole[-_BESIDE:] == MARK).all())


def capability(where: Where) -> tuple[int, int]:
    return torch.cuda.get_device_capability() if where.device == "cuda" else (8, 0)


def list_tiles(where: Where, sizes: list[int], n_rows: int, height: int) -> tuple[Tensor, Tensor]:
    """(tiles, starts)."""
    tiles_Q4 = where.ints(np.full((1 + plan.tiles(n_rows, len(sizes), height), 4), -1))
    starts_e = where.ints([-1] * (len(sizes) + 1))
    launch.run(plan.list_tiles(len(sizes), height), where.ints(sizes), tiles_Q4, starts_e)
    return tiles_Q4, starts_e


def product(
    where: Where, rows_RD: Tensor, weight: Tensor, tiles_Q4: Tensor, *, transposed: bool = False, height: int = 16
) -> Tensor:
    """[R, F]; rows without a tile hold MARK."""
    n_rows, width_in, width_out = *rows_RD.shape, weight.shape[1 if transposed else 2]
    out_RF = amid(rows_RD.new_full((n_rows, width_out), MARK), MARK)
    options: Any = {"height": height, "dtype": dtype_name(where.dtype), "capability": capability(where)}
    launched = plan.product(n_rows, len(weight), width_in, width_out, transposed, **options)
    launch.run(launched, rows_RD, weight, tiles_Q4, out_RF)
    assert kept(out_RF)
    return out_RF


def weight_gradient(where: Where, rows_RD: Tensor, dout_RF: Tensor, starts_e: Tensor) -> Tensor:
    """[e, D, F]."""
    e, D, F = len(starts_e) - 1, rows_RD.shape[1], dout_RF.shape[1]
    dweight_eDF = amid(rows_RD.new_full((e, D, F), NAN), MARK)
    launched = plan.weight_gradient(e, D, F, dtype=dtype_name(where.dtype), capability=capability(where))
    launch.run(launched, rows_RD, dout_RF, starts_e, dweight_eDF)
    assert kept(dweight_eDF)
    return dweight_eDF


def operands(where: Where, sizes: list[int], widths: tuple[int, int], padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, weight, dout) amid NaN, and NaN in the padding."""
    end, (D, F) = sum(sizes), widths
    rows_RD, dout_RF = where.drawn(end + padding, D), where.drawn(end + padding, F, seed=2)
    weight_eDF = where.drawn(len(sizes), D, F, seed=1, scale=D**-0.5)
    rows_RD[end:], dout_RF[end:] = NAN, NAN
    return amid(rows_RD, NAN), amid(weight_eDF, NAN), amid(dout_RF, NAN)


# ------------------------------------------------------------------------------------------------------------ checks


def multiplies(
    where: Where,
    sizes: list[int],
    widths: tuple[int, int],
    transposed: bool = False,
    height: int = 16,
    padding: int = 5,
) -> None:
    """The rows of each expert times its matrix; what lies in the padding's rows of the output stays."""
    rows_RD, weight_eDF, _ = operands(where, sizes, widths, padding)
    end, weight = sum(sizes), exact(weight_eDF)
    if transposed:
        weight_eDF = amid(weight_eDF.mT.contiguous(), NAN)
    tiles_Q4, _ = list_tiles(where, sizes, len(rows_RD), height)
    out_RF = product(where, rows_RD, weight_eDF, tiles_Q4, transposed=transposed, height=height)
    assert (out_RF[end:] == MARK).all()

    def run(arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        return {"out": reference.grouped_matmul(exact(rows_RD)[:end], weight, np.array(sizes), arithmetic)}

    check(where, {"out": out_RF[:end]}, run)


def differentiates(where: Where, sizes: list[int], widths: tuple[int, int], padding: int = 5) -> None:
    """rows^T @ dout of each expert; zeros for one without rows."""
    rows_RD, weight_eDF, dout_RF = operands(where, sizes, widths, padding)
    _, starts_e = list_tiles(where, sizes, len(rows_RD), 16)
    dweight_eDF = weight_gradient(where, rows_RD, dout_RF, starts_e)
    rows, dout = (exact(value)[: sum(sizes)] for value in (rows_RD, dout_RF))

    def run(arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        _, dweight = reference.grouped_matmul_vjp(rows, exact(weight_eDF), np.array(sizes), dout, arithmetic)
        return {"dweight": dweight}

    check(where, {"dweight": dweight_eDF}, run)


def contains(where: Where, sizes: list[int], poison: float, widths: tuple[int, int] = (33, 70)) -> None:
    """inf or NaN in one expert's rows and matrix changes no bit of another's, and stays where it is."""
    rows_RD, weight_eDF, dout_RF = operands(where, sizes, widths, 3)
    tiles_Q4, starts_e = list_tiles(where, sizes, len(rows_RD), 16)
    clean = product(where, rows_RD, weight_eDF, tiles_Q4), weight_gradient(where, rows_RD, dout_RF, starts_e)
    own = slice(sum(sizes[:1]), sum(sizes[:2]))
    rows_RD[own], dout_RF[own], weight_eDF[1] = poison, poison, poison
    found = product(where, rows_RD, weight_eDF, tiles_Q4), weight_gradient(where, rows_RD, dout_RF, starts_e)
    others = [row for row in range(len(rows_RD)) if not own.start <= row < own.stop]
    assert torch.equal(found[0][others], clean[0][others])
    assert torch.equal(found[1][[0, *range(2, len(sizes))]], clean[1][[0, *range(2, len(sizes))]])
    assert not found[0][own].isfinite().any() and not found[1][1].isfinite().any()


def reaches_far(where: Where) -> None:
    """Rows, matrices and outputs that begin more than 2^31 elements into their tensors; the rest is not touched."""
    D, F, far = 64, 16, 2**31 // 16 + 1000
    rows = where.drawn(20, D)
    rows_RD, out_RF = vast(where, far + 20, D), vast(where, far + 20, F)
    rows_RD[far:] = rows
    weight_eDF = vast(where, 2**31 // (D * F) + 2, D, F)
    weight_eDF[-1] = where.drawn(D, F, seed=1)
    tiles_Q4 = where.ints(
        [[2, 0, 0, 0], [len(weight_eDF) - 1, far, far + 20, 0], [len(weight_eDF) - 1, far + 16, far + 20, 0]]
    )
    options: Any = {"height": 16, "dtype": dtype_name(where.dtype), "capability": capability(where)}
    launch.run(plan.product(32, 1, D, F, False, **options), rows_RD, weight_eDF, tiles_Q4, out_RF)

    def run(arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        out, dweight = arithmetic.dot(exact(rows), exact(weight_eDF[-1])), arithmetic.dot(exact(rows).T, exact(rows))
        return {"out": arithmetic.store(out), "dweight": arithmetic.store(dweight)}

    starts_e = where.ints([far, far + 20])
    check(where, {"out": out_RF[far:], "dweight": weight_gradient(where, rows_RD, rows_RD, starts_e)[0]}, run)


def vast(where: Where, *shape: int) -> Tensor:
    """Memory that costs nothing where it is not touched, on a CPU."""
    if where.device == "cuda":
        return torch.zeros(shape, dtype=where.dtype, device="cuda")
    return torch.from_numpy(np.zeros(shape, str(where.dtype).removeprefix("torch.")))


# ------------------------------------------------------------------------------------------------------------- cases

ENDS = [0, 1, 15, 16, 17, 0]  # with tiles of 16 rows
BLOCKS = [0, 1, 31, 32, 33, 63, 64, 65, 0]  # with blocks of 32 or 64 rows
SIZES = {
    "rows all in one expert": [0, 0, 70, 0],
    "rows of no expert": [0, 0, 0],
    "one row": [0, 1, 0],
    "one expert": [20],
}
# Less than a tile each way; tails in both, with whole vectors; odd, either the longer.
WIDTHS = [(8, 16), (200, 328), (33, 70), (70, 33), (1, 1)]

CASES: dict[str, Callable[[Where], None]] = {
    **{f"product {w}": partial(multiplies, sizes=ENDS, widths=w) for w in WIDTHS},
    **{f"product transposed {w}": partial(multiplies, sizes=ENDS, widths=w, transposed=True) for w in WIDTHS},
    **{f"weight gradient {w}": partial(differentiates, sizes=BLOCKS, widths=w) for w in WIDTHS},
    **{f"product of {name}": partial(multiplies, sizes=sizes, widths=(40, 24)) for name, sizes in SIZES.items()},
    **{
        f"weight gradient of {name}": partial(differentiates, sizes=sizes, widths=(40, 24))
        for name, sizes in SIZES.items()
    },
    **{
        f"product of tiles of {h} rows": partial(multiplies, sizes=[1, h - 1, 0, h, h + 1], widths=(40, 24), height=h)
        for h in (32, 64)
    },
    "product without padding": partial(multiplies, sizes=ENDS, widths=(40, 24), padding=0),
    "product of more padding than rows": partial(multiplies, sizes=[3, 0, 1], widths=(40, 24), padding=100),
    "product of more experts than rows": partial(multiplies, sizes=[0] * 50 + [1] + [0] * 13, widths=(8, 8)),
    "product over groups of tiles": partial(multiplies, sizes=[16 * 17, 16 * 15 + 1, 5], widths=(8, 40)),
    "NaN in one expert": partial(contains, sizes=[17, 5, 1, 0, 16], poison=NAN),
    "inf in one expert": partial(contains, sizes=[1, 1, 1, 0, 1], poison=float("inf")),
    "more than 2^31 elements": reaches_far,
}


def pairs(*dtypes: str) -> list[tuple[str, str]]:
    """(case, dtype); what only addresses decide, in 16 bits alone."""
    return [(name, dtype) for dtype in dtypes for name in CASES if name != "more than 2^31 elements" or "16" in dtype]


def main(dtypes: list[str]) -> None:
    mend()
    outcomes: dict[str, str | None] = {}
    for name, dtype in pairs(*dtypes):
        try:
            CASES[name](Where("cpu", getattr(torch, dtype)))
            outcomes[f"{name} {dtype}"] = None
        except Exception:
            outcomes[f"{name} {dtype}"] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:])
