"""What each kernel must do, as functions of where it runs and of the sizes; the oracle is float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from kernel_draws import NAN, Hidden, Rows, Where, check, exact, rounded

from moebius.core.activations import Activation
from moebius.core.kernels import plan
from moebius.core.precision import DTYPES, Arithmetic, dtype_name
from moebius.core.reference.activate import activate, activate_vjp
from moebius.torch_frontend import launch
from moebius.torch_frontend.permute import Order

# ------------------------------------------------------------------------------------------------------------ routes


def masks(where: Where, dtype: torch.dtype) -> None:
    wide = 1 << 40 if dtype is torch.int64 else 1 << 30
    ids = np.array([[0, 3], [4, 2], [-1, 1], [wide, -wide], [1, 0]] * 60)
    token_mask = np.arange(300) % 5 != 4
    given = torch.from_numpy(ids).to(where.device, dtype), torch.from_numpy(token_mask).to(where.device)
    routed = launch.mask_routes(*given, 4, 9)
    assert routed.dtype == torch.int32
    wanted = np.where((ids >= 0) & (ids < 4) & token_mask[:, None], ids, 9)
    np.testing.assert_array_equal(exact(routed), wanted)


def sorts(where: Where, tokens: int, k: int, n_experts: int, ids: int | None = None) -> None:
    ids_SK = where.ids(tokens, k, n_experts)
    if ids is not None:
        ids_SK = torch.full_like(ids_SK, ids)
    weights_SK = where.weights(tokens, k)
    weights_SK[ids_SK == n_experts] = NAN
    order = Order(*launch.sort_routes(ids_SK, weights_SK, n_experts))
    flat = exact(ids_SK).ravel()
    slots = np.argsort(flat, kind="stable")
    rows = np.empty_like(slots)
    rows[slots] = np.arange(len(slots))
    routed = flat[slots] < n_experts
    row_of_slot = np.where(flat < n_experts, rows, -1).reshape(tokens, k)
    np.testing.assert_array_equal(exact(order.slot_of_row_R), slots)
    np.testing.assert_array_equal(exact(order.row_of_slot_SK), row_of_slot)
    np.testing.assert_array_equal(exact(order.group_sizes_e), np.bincount(flat, minlength=n_experts + 1)[:n_experts])
    np.testing.assert_array_equal(exact(order.row_experts_R), flat[slots])
    np.testing.assert_array_equal(exact(order.row_weights_R), np.where(routed, exact(weights_SK).ravel()[slots], 0.0))
    assert {t.dtype for t in order} == {torch.int32, torch.float32}


def scans(where: Where) -> None:
    """scan_counts where its blocks need several steps: more than 512 of them, or as here steps of 4."""
    counts = np.random.default_rng(10).integers(0, 9, (11, plan.count_width(5)))
    scan = plan.sort_routes(1, 5)[1]
    before_BN, group_sizes_e = torch.full(counts.shape, -1), torch.full((5,), -1)
    before_BN, group_sizes_e = where.ints(before_BN), where.ints(group_sizes_e)
    scan = replace(scan, constants={**scan.constants, "ROWS": 4})
    launch.run(scan, where.ints(counts), len(counts), before_BN, group_sizes_e)
    np.testing.assert_array_equal(exact(before_BN), np.cumsum(counts, 0) - counts)
    np.testing.assert_array_equal(exact(group_sizes_e), counts.sum(0)[:5])


# -------------------------------------------------------------------------------------------------------------- rows


def gathers(where: Where, tokens: int, k: int, width: int) -> None:
    x_SD = where.drawn(tokens, width)
    slots = np.random.default_rng(3).permutation(tokens * k)
    rows_RD = launch.gather_rows(x_SD, where.ints(slots), k)
    assert torch.equal(rows_RD, x_SD[torch.from_numpy(slots).to(where.device) // k])


def scatters(where: Where, tokens: int, k: int, width: int) -> None:
    """Every other slot has a row; the rows of the others are not written."""
    x_SD = where.drawn(tokens, width)
    rows = np.random.default_rng(3).permutation(tokens * k).reshape(tokens, k)
    rows[(np.arange(tokens * k) % 2 == 1).reshape(tokens, k)] = -1
    rows_RD = launch.scatter_rows(x_SD, where.ints(rows))
    for token, slots in enumerate(rows):
        for row in slots[slots >= 0]:
            assert torch.equal(rows_RD[row], x_SD[token])


def sums_dots(where: Where, parts: int) -> None:
    dots_RB = where.drawn(7, parts).to(torch.float32)
    rows = np.array([[3, 0], [-1, 6], [1, -1]])
    sums = exact(launch.sum_dots(dots_RB, where.ints(rows)))
    wanted = np.zeros((3, 2), np.float32)
    for part in range(parts):
        wanted += np.where(rows >= 0, exact(dots_RB).astype(np.float32)[rows, part], 0)
    np.testing.assert_array_equal(sums, wanted)


def sums(
    where: Where,
    tokens: int = 7,
    k: int = 3,
    width: int = 100,
    biased: bool = False,
    weighted: bool = False,
    after: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    r = Rows.of(where, tokens, k, 4, width)
    order = r.order
    y_SD = launch.sum_slots(
        r.rows_RD,
        order.row_of_slot_SK,
        bias_eD=r.bias_eD if biased else None,
        row_experts_R=order.row_experts_R if biased else None,
        row_weights_R=order.row_weights_R if weighted else None,
        after=after,
        dtype=dtype,
    )
    assert y_SD.dtype == (dtype or where.dtype)
    end = int(order.group_sizes_e.sum())
    rows, weights = exact(r.rows_RD)[:end], exact(order.row_weights_R)[:end, None] if weighted else 1.0
    bias = exact(r.bias_eD)[exact(order.row_experts_R)[:end]] if biased else 0.0
    taken = exact(order.row_of_slot_SK)

    def run(arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        value = rows if not biased else arithmetic.store(rows + bias * (1.0 if after else weights))
        value = np.vstack([value * weights if after else value, np.zeros((1, width))])
        total = arithmetic.sum(value[taken], axis=1)
        return {"y": arithmetic.store(total, "float32" if dtype == torch.float32 else None)}

    check(where, {"y": y_SD}, run)


def sums_views(where: Where) -> None:
    """Tensors that are not contiguous, or not aligned to 16 bytes."""
    r = Rows.of(where, 7, 3, 4, 40)
    wanted = launch.sum_slots(r.rows_RD, r.order.row_of_slot_SK)
    shifted = torch.empty(r.rows_RD.numel() + 1, dtype=where.dtype, device=where.device)[1:].view_as(r.rows_RD)
    for rows_RD in (shifted.copy_(r.rows_RD), r.rows_RD.T.contiguous().T):
        assert torch.equal(launch.sum_slots(rows_RD, r.order.row_of_slot_SK.T.contiguous().T), wanted)


def fuses(where: Where, after: bool) -> None:
    """The bias, its weight and the rows' weight inside the sum round as they do one by one, bit for bit."""
    r = Rows.of(where, 40, 3, 4, 100)
    order, end = r.order, int(r.order.group_sizes_e.sum())
    y_SD = launch.sum_slots(
        r.rows_RD,
        order.row_of_slot_SK,
        bias_eD=r.bias_eD,
        row_experts_R=order.row_experts_R,
        row_weights_R=order.row_weights_R,
        after=after,
    )
    weights_R1, bias_RD = order.row_weights_R[:, None], r.bias_eD.float()[order.row_experts_R.clamp(max=3)]
    rows_RD = (r.rows_RD.float() + (bias_RD if after else bias_RD * weights_R1)).to(where.dtype)
    rows_RD = rows_RD.float() * weights_R1 if after else rows_RD
    assert torch.equal(y_SD, launch.sum_slots(rows_RD, order.row_of_slot_SK, dtype=where.dtype)) and end < len(rows_RD)


# ------------------------------------------------------------------------------------------------------- activations


def activates(
    where: Where, activation: Activation, rows: int = 9, inter: int = 50, biased: bool = False, weighted: bool = True
) -> None:
    h = Hidden.of(where, activation, rows, inter)
    weights_R = h.weights_R if weighted else None
    act_RI = launch.activate_rows(h.hidden_RU, weights_R, activation, **h.options(biased))
    assert act_RI.dtype == where.dtype
    weights = exact(h.head(h.weights_R)) if weighted else None

    def run(arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        return {"act": activate(h.stored(arithmetic, biased), weights, activation, arithmetic)}

    check(where, {"act": h.head(act_RI)}, run)


def differentiates(
    where: Where,
    activation: Activation,
    rows: int = 9,
    inter: int = 50,
    biased: bool = False,
    weighted: bool = True,
    in_place: bool = False,
) -> None:
    h = Hidden.of(where, activation, rows, inter)
    given = h.hidden_RU.clone()
    dhidden_RU, drow_weights_R = launch.activate_rows_backward(
        h.dact_RI, given, h.weights_R if weighted else None, activation, **h.options(biased), in_place=in_place
    )
    assert (dhidden_RU.data_ptr() == given.data_ptr()) == in_place
    assert in_place or torch.equal(given.nan_to_num(), h.hidden_RU.nan_to_num())
    weights, dact = exact(h.head(h.weights_R)) if weighted else None, exact(h.head(h.dact_RI))

    def run(arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        dhidden, dweights = activate_vjp(h.stored(arithmetic, biased), weights, activation, dact, arithmetic)
        return {"dhidden": dhidden, "dweights": dweights}

    found = {"dhidden": h.head(dhidden_RU)}
    assert dhidden_RU.dtype == where.dtype and (drow_weights_R is None) == (not weighted)
    if drow_weights_R is not None:
        assert drow_weights_R.dtype == torch.float32
        found["dweights"] = h.head(drow_weights_R)
    check(where, found, run)


def extremes(where: Where, activation: Activation) -> None:
    """Far out, at the limits and next to them: nothing becomes NaN, and the left tail keeps its digits."""
    u, tiny = DTYPES[dtype_name(where.dtype)]
    largest = torch.finfo(where.dtype).max
    sizes = np.array([0.0, 1e-4, 1.0, 6.0, 7.0, 7.0625, 20.0, 60.0, 80.0, 100.0, 1e3, 6e4, 1e20, 2e38])
    gate = np.concatenate([-sizes, sizes])
    gate = gate[np.abs(gate) <= largest]
    up = np.resize([1.0, 7.0, -7.0, 7.0625, -7.0625], len(gate))
    pair = [gate, up] if activation.gated else [gate]
    hidden = np.stack(pair, -1).ravel() if activation.interleaved else np.concatenate(pair)
    hidden_1U = torch.from_numpy(hidden)[None].to(where.dtype).to(where.device)
    ones = torch.ones(1, len(gate), dtype=where.dtype, device=where.device)
    act = launch.activate_rows(hidden_1U, None, activation)
    dhidden, _ = launch.activate_rows_backward(ones, hidden_1U, None, activation)
    with np.errstate(all="ignore"):
        wanted = activate(exact(hidden_1U), None, activation)
        dwanted, _ = activate_vjp(exact(hidden_1U), None, activation, np.ones((1, len(gate))))
    # exp(x) as a power of 2 loses |x| roundings in float32; 1 + tanh of the reference loses the left tail in float64.
    gelu = activation.curve == "gelu_tanh"
    relative = u + 2.0**-24 * 4 * (8 + 2 * np.minimum(np.abs(gate), 104.0) ** (3 if gelu else 1))
    slack = 4 * tiny + 2.0**-48 * gelu
    for found, right, width in ((act, wanted, 1), (dhidden, dwanted, len(hidden) // len(gate))):
        allowed = np.repeat(relative, width) if activation.interleaved else np.tile(relative, width)
        right = np.where(np.isnan(right), exact(found), right)  # the reference's own inf * 0
        right = np.where(np.abs(right) > largest, np.copysign(np.inf, right), right)
        with np.errstate(invalid="ignore"):  # inf - inf, which the equality below takes
            close = np.abs(exact(found) - right) <= allowed * np.abs(right) + slack
        assert (close | (exact(found) == right)).all(), (exact(found), right)


def adds_bias_first(where: Where, activation: Activation) -> None:
    """A bias inside the kernel gives the bits of a bias added before it."""
    h = Hidden.of(where, activation, 40, 50)
    hidden_RU, dact_RI, weights_R, experts_R = (h.head(t) for t in (h.hidden_RU, h.dact_RI, h.weights_R, h.experts_R))
    added_RU = (hidden_RU.float() + h.bias_eU.float()[experts_R]).to(where.dtype)
    options = {"bias_eU": h.bias_eU, "row_experts_R": experts_R}
    inside = launch.activate_rows(hidden_RU, weights_R, activation, **options)
    assert torch.equal(inside, launch.activate_rows(added_RU, weights_R, activation))
    inside = launch.activate_rows_backward(dact_RI, hidden_RU, weights_R, activation, **options)
    before = launch.activate_rows_backward(dact_RI, added_RU, weights_R, activation)
    assert all(torch.equal(a, b) for a, b in zip(inside, before, strict=True))


def keeps_nan(where: Where, activation: Activation) -> None:
    hidden_RU = where.drawn(4, activation.up_width(8))
    hidden_RU[1] = NAN
    act_RI = launch.activate_rows(hidden_RU, where.weights(4), activation)
    dact_RI = where.drawn(4, 8)
    dhidden_RU, drow_weights_R = launch.activate_rows_backward(dact_RI, hidden_RU, where.weights(4), activation)
    for tensor in (act_RI, dhidden_RU, drow_weights_R):
        lost = tensor.isnan().flatten(1).all(1) if tensor.ndim > 1 else tensor.isnan()
        assert lost.tolist() == [False, True, False, False]


# -------------------------------------------------------------------------------------------------------------- bias


def sums_rows(
    where: Where, sizes: list[int], tail: int = 5, width: int = 100, weighted: bool = False, dtype: Any = None
) -> None:
    end = sum(sizes)
    values_RF, weights_R = where.drawn(end + tail, width), where.weights(end + tail)
    values_RF[end:], weights_R[end:] = NAN, NAN
    sums_eF = launch.sum_rows(values_RF, where.ints(sizes), weights_R if weighted else None, dtype=dtype)
    values = exact(values_RF)[:end]
    if weighted:
        values = (values.astype(np.float32) * exact(weights_R)[:end, None].astype(np.float32)).astype(np.float64)
    wanted = [values[stop - size : stop].sum(0) for size, stop in zip(sizes, np.cumsum(sizes), strict=True)]
    assert sums_eF.dtype == (dtype or where.dtype)
    np.testing.assert_array_equal(exact(sums_eF), rounded(np.stack(wanted), sums_eF.dtype))


def sums_rows_rounds_once(where: Where) -> None:
    """1 + half a unit + a little more: rounded to float32 first, the little is lost and the half goes to even."""
    half = DTYPES[dtype_name(where.dtype)][0]
    little = max(2.0**-40, DTYPES[dtype_name(where.dtype)][1])
    column = torch.tensor([1.0, half, little], dtype=torch.float64)
    values_RF = torch.stack([column, -column, column * torch.tensor([1.0, 3.0, -1.0])], 1).to(where.dtype)
    sums_eF = launch.sum_rows(values_RF.to(where.device), where.ints([3]), None)
    assert exact(sums_eF).tolist() == [[1 + 2 * half, -1 - 2 * half, 1 + 2 * half]]


def dots(where: Where, rows: int = 9, width: int = 100) -> None:
    experts = np.sort(np.random.default_rng(9).integers(0, 4, rows))
    values_RF, bias_eF = where.drawn(rows, width), where.drawn(3, width, seed=1)
    values_RF[where.ints(experts) == 3] = NAN
    dots_R = launch.dot_rows(values_RF, bias_eF, where.ints(experts))
    values = np.where((experts < 3)[:, None], exact(values_RF), 0.0)
    bias = exact(bias_eF)[np.minimum(experts, 2)]

    def run(arithmetic: Arithmetic) -> dict[str, np.ndarray]:
        return {"dots": arithmetic.sum(values * bias, axis=1)}

    assert dots_R.dtype == torch.float32 and (exact(dots_R)[experts == 3] == 0.0).all()
    check(where, {"dots": dots_R}, run)
