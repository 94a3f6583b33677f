"""Rows and back: order, state and derivatives."""

from __future__ import annotations

import torch

from moebius.torch_frontend import Local, Sent, permute, unpermute


def sent() -> Sent:
    x = torch.arange(12.0, dtype=torch.float64).view(6, 2).requires_grad_()
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]])
    weights = torch.arange(1.0, 13.0, dtype=torch.float64).view(6, 2).requires_grad_()
    mask = torch.tensor([True, True, True, True, True, False])
    return Local().dispatch(x, weights, ids, mask, 4)[0]


def test_permute_sorts_by_expert_then_token_then_slot() -> None:
    rows, weights, sizes, experts, state = permute(sent(), 4)
    assert sizes.tolist() == [3, 2, 3, 2] and sizes.dtype == torch.int32
    assert state.slot_of_row_R.tolist() == [0, 7, 8, 1, 2, 3, 4, 9, 5, 6, 10, 11]
    assert state.row_of_slot_SK.tolist() == [[0, 3], [4, 5], [6, 8], [9, 1], [2, 7], [-1, -1]]
    assert experts.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert weights.tolist() == [1, 8, 9, 2, 3, 4, 5, 10, 6, 7, 0, 0]
    assert torch.equal(rows[:, 0], 2.0 * (state.slot_of_row_R // 2))


def test_unpermute_of_permute_sums_each_tokens_slots() -> None:
    s = sent()
    permuted = permute(s, 4)
    summed = unpermute(permuted.rows_RD, permuted.state)
    assert torch.equal(summed[:5], 2 * s.x_SD[:5]) and not summed[5].any()
    ones = torch.ones_like(permuted.rows_RD)
    weighted = unpermute(ones, permuted.state, permuted.row_weights_R)
    assert weighted[:, 0].tolist() == [3, 7, 11, 15, 19, 0]


def test_permute_and_unpermute_have_first_and_second_derivatives() -> None:
    s = sent()

    def there_and_back(x, weights):
        rows, row_weights, _, _, state = permute(Sent(x, weights, s.ids_SK), 4)
        return unpermute(rows**2, state, row_weights)

    assert torch.autograd.gradcheck(there_and_back, (s.x_SD, s.weights_SK))
    assert torch.autograd.gradgradcheck(there_and_back, (s.x_SD, s.weights_SK))


def test_permute_gradient_in_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    ids, weights = torch.zeros(1, 3, dtype=torch.int32), torch.ones(1, 3)
    rows = permute(Sent(x, weights, ids), 1).rows_RD
    # 256 + 1 + 1 is 258 in one rounding; added one at a time in bfloat16 each 1 would be lost.
    rows.backward(torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16))
    assert x.grad.item() == 258


def test_sort_of_transposed_ids_has_the_layout_that_a_compiler_is_told() -> None:
    ids = torch.tensor([[0, 1, 2], [1, 2, 0]], dtype=torch.int32).T
    assert not ids.is_contiguous()
    torch.library.opcheck(torch.ops.moebius.sort_routes, (ids, torch.ones(3, 2), 3))
