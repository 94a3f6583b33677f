"""The documented steps round the grouped matmul: bias by counts, permutation, and the two products."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.core import ACTIVATIONS, MoEError, ShapeError, reference
from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within
from moebius.torch_frontend import automodel
from moebius.torch_frontend.automodel import _apply_bias, _permute_tokens_for_grouped_mm, _torch_mm_experts_fwd

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_vectors.json").read_text())


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# ----------------------------------------------------------------------------------------------------------- the bias
def test_apply_bias_of_none_is_the_value_itself() -> None:
    value = drawn(4, 3)
    assert _apply_bias(value, None, torch.tensor([2, 2])) is value
    assert _apply_bias(value, None, [9], torch.ones(4, 1)) is value


@pytest.mark.parametrize("counts", [[2, 2], torch.tensor([2, 2]), torch.tensor([2, 2], dtype=torch.int32)], ids=str)
def test_apply_bias_of_a_list_adds_each_experts_bias_to_its_rows(counts) -> None:
    value = torch.zeros(4, 3, requires_grad=True)
    bias = [torch.full((3,), 1.0, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)]
    out = _apply_bias(value, bias, counts)
    assert out[:, 0].tolist() == [1, 1, 2, 2]
    out.sum().backward()
    assert torch.equal(value.grad, torch.ones(4, 3))
    assert all(torch.equal(each.grad, torch.full((3,), 2.0)) for each in bias)


def test_apply_bias_with_weights_adds_the_weighted_bias() -> None:
    value, bias = drawn(5, 3).requires_grad_(), drawn(2, 3, seed=1).requires_grad_()
    probs = drawn(5, 1, seed=2).requires_grad_()
    counts, experts = [3, 2], [0, 0, 0, 1, 1]
    out = _apply_bias(value, bias, counts, probs)
    torch.testing.assert_close(out, value + bias[experts] * probs)
    dout = drawn(5, 3, seed=3)
    out.backward(dout)
    torch.testing.assert_close(value.grad, dout)
    torch.testing.assert_close(probs.grad, (bias[experts] * dout).sum(-1, keepdim=True))
    wanted = torch.stack([(dout * probs)[:3].sum(0), (dout * probs)[3:].sum(0)])
    torch.testing.assert_close(bias.grad, wanted)
    assert probs.grad.shape == (5, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_apply_bias_and_its_gradients_agree_with_reference(weighted: bool, dtype: torch.dtype) -> None:
    counts = [3, 0, 9, 1]
    value, bias, dout = (drawn(rows, 6, seed=seed, dtype=dtype) for seed, rows in enumerate((13, 4, 13)))
    probs = drawn(13, 1, seed=5, dtype=torch.promote_types(dtype, torch.float32)) if weighted else None
    leaves = [t.requires_grad_() for t in (value, bias, probs) if t is not None]
    out = _apply_bias(value, bias, counts, probs)
    out.backward(dout)
    exact_value, exact_bias, exact_dout = (t.detach().double().numpy() for t in (value, bias, dout))
    exact_probs = None if probs is None else probs[:, 0].detach().double().numpy()

    def run(arithmetic):
        dbias, dprobs = reference.add_bias_vjp(exact_bias, np.array(counts), exact_dout, exact_probs, arithmetic)
        out = reference.add_bias(exact_value, exact_bias, np.array(counts), exact_probs, arithmetic)
        return {"out": out, "dbias": dbias} | ({"dprobs": dprobs} if weighted else {})

    exact = run(EXACT)
    limits = bounds(run, exact, dtype)
    found = {"out": out, "dbias": bias.grad} | ({"dprobs": probs.grad[:, 0]} if weighted else {})
    assert torch.equal(value.grad, dout) and out.dtype == dtype
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    for name, tensor in found.items():
        assert within(tensor.detach().double().numpy(), exact[name], limits[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_apply_bias_in_16_bits_rounds_once_and_keeps_every_dtype(dtype: torch.dtype) -> None:
    value, bias = drawn(300, 7, dtype=dtype).requires_grad_(), drawn(3, 7, seed=1, dtype=dtype).requires_grad_()
    probs = drawn(300, 1, seed=2).requires_grad_()
    out = _apply_bias(value, bias, [100, 0, 200], probs)
    experts = torch.tensor([0] * 100 + [2] * 200)
    exact = value.float() + bias.float()[experts] * probs
    assert torch.equal(out, exact.to(dtype))
    out.backward(torch.ones_like(out))
    assert (value.grad.dtype, bias.grad.dtype, probs.grad.dtype) == (dtype, dtype, torch.float32)


def test_apply_bias_of_a_frozen_bias_still_gives_the_weights_a_gradient() -> None:
    value, bias, probs = drawn(4, 3), drawn(2, 3, seed=1), drawn(4, 1, seed=2).requires_grad_()
    _apply_bias(value, bias, [1, 3], probs).sum().backward()
    assert bias.grad is None
    torch.testing.assert_close(probs.grad[:, 0], bias[[0, 1, 1, 1]].sum(-1))


def test_apply_bias_of_any_rank_equals_flat_rows_and_skips_experts_without_rows() -> None:
    value, probs = drawn(2, 3, 4), drawn(6, 1, seed=2)
    bias, flat = drawn(4, 4, seed=1).requires_grad_(), drawn(4, 4, seed=1).requires_grad_()
    out = _apply_bias(value, bias, [0, 5, 0, 1], probs)
    wanted = _apply_bias(value.view(6, 4), flat, [0, 5, 0, 1], probs)
    assert torch.equal(out, wanted.view(2, 3, 4))
    for each in (out, wanted):
        each.square().sum().backward()
    assert torch.equal(bias.grad, flat.grad)
    assert not bias.grad[0].any() and not bias.grad[2].any() and bias.grad[1].all()
    transposed = drawn(3, 2, 4).transpose(0, 1)
    assert torch.equal(_apply_bias(transposed, bias, [6, 0, 0, 0]), transposed + bias[0])
    assert torch.equal(_apply_bias(value[0, 0], bias, [0, 0, 1, 0]), value[0, 0] + bias[2])


def test_apply_bias_of_no_rows_gives_no_rows_and_zero_gradients() -> None:
    value, bias, probs = (t.requires_grad_() for t in (torch.ones(0, 3), drawn(2, 3), torch.ones(0, 1)))
    out = _apply_bias(value, bias, [0, 0], probs)
    out.sum().backward()
    assert out.shape == (0, 3) and torch.equal(bias.grad, torch.zeros(2, 3)) and probs.grad.shape == (0, 1)


def test_apply_bias_of_weights_that_broadcast_equals_the_column_written_out() -> None:
    value, bias = drawn(4, 3), drawn(2, 3, seed=1)
    wanted = _apply_bias(value, bias, [1, 3], torch.full((4, 1), 0.5))
    for probs in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        assert torch.equal(_apply_bias(value, bias, [1, 3], probs), wanted)


@pytest.mark.parametrize(
    ("value", "bias", "probs"),
    [
        (torch.float32, torch.float64, None),
        (torch.float32, torch.float32, torch.float64),
        (torch.bfloat16, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_apply_bias_of_mixed_dtypes_promotes_all_of_them_and_rounds_once(value, bias, probs) -> None:
    dtypes = [dtype for dtype in (value, bias, probs) if dtype is not None]
    a, b = drawn(50, 3, dtype=value), drawn(2, 3, seed=1, dtype=bias)
    p = None if probs is None else drawn(50, 1, seed=2, dtype=probs)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    rows = b.to(wide).repeat_interleave(torch.tensor([20, 30]), 0)
    wanted = (a.to(wide) + (rows if p is None else rows * p.to(wide))).to(value)
    assert torch.equal(_apply_bias(a, b, [20, 30], p), wanted)


def test_apply_bias_gradient_is_the_rounded_float64_sum() -> None:
    rows, width = 4096, 3
    dout = torch.full((rows, width), 0.9999)
    dout[1::2] *= -1.0
    dout[::2] += drawn(rows // 2, width) * 1e-3
    bias = torch.zeros(2, width, requires_grad=True)
    _apply_bias(torch.zeros(rows, width), bias, [rows - 7, 7]).backward(dout)
    wanted = torch.stack([dout[:-7].double().sum(0), dout[-7:].double().sum(0)]).float()
    assert torch.equal(bias.grad, wanted)


def test_apply_bias_gradient_in_bfloat16_is_the_rounded_float64_sum() -> None:
    dout, probs = drawn(4096, 40, dtype=torch.bfloat16), torch.rand(4096, 1, generator=torch.Generator().manual_seed(3))
    for weights in (None, probs):
        bias = torch.zeros(3, 40, dtype=torch.bfloat16, requires_grad=True)
        _apply_bias(torch.zeros_like(dout), bias, [0, 4096, 0], weights).backward(dout)
        terms = dout.double() if weights is None else dout.double() * weights.double()
        assert torch.equal(bias.grad[1], terms.sum(0).bfloat16()) and not bias.grad[[0, 2]].any()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_apply_bias_has_first_and_second_derivatives(weighted: bool) -> None:
    value, bias = (drawn(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 2), (3, 2)))
    probs = (drawn(5, 1, seed=4, dtype=torch.float64).requires_grad_(),) if weighted else ()

    def run(value, bias, *probs):
        return _apply_bias(value, bias, [2, 0, 3], *probs)

    assert torch.autograd.gradcheck(run, (value, bias, *probs))
    assert torch.autograd.gradgradcheck(run, (value, bias, *probs))


def test_apply_bias_takes_a_transposed_gradient() -> None:
    value, dout = torch.zeros(6, 4, requires_grad=True), drawn(4, 6)
    grads = []
    for each in (dout.T, dout.T.contiguous()):
        bias = torch.zeros(2, 4, requires_grad=True)
        _apply_bias(value, bias, [4, 2]).backward(each)
        grads.append(bias.grad)
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("counts", [torch.tensor([3, 0, 6]), [3, 0, 6]], ids=["tensor", "list"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_apply_bias_compiled_in_one_graph_equals_eager(weighted: bool, counts) -> None:
    def run(value, bias, probs):
        return _apply_bias(value, bias, counts, probs)

    torch.compiler.reset()
    results = []
    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        value, bias = drawn(9, 4, dtype=torch.bfloat16), drawn(3, 4, seed=1, dtype=torch.bfloat16)
        probs = drawn(9, 1, seed=2) if weighted else None
        leaves = [t.requires_grad_() for t in (value, bias, probs) if t is not None]
        out = call(value, bias, probs)
        out.backward(drawn(9, 4, seed=3, dtype=torch.bfloat16))
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_apply_bias_is_a_plain_function() -> None:
    assert type(_apply_bias).__name__ == "function" and not hasattr(_apply_bias, "_torchdynamo_orig_callable")


def test_apply_bias_leaves_its_inputs_alone() -> None:
    given = drawn(4, 3), drawn(2, 3, seed=1), torch.tensor([1, 3]), drawn(4, 1, seed=2)
    before = [t.clone() for t in given]
    _apply_bias(*given)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.parametrize("counts", [[2, 1], [2, 3], [5, -1], [4], [4, 0, 0]], ids=str)
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_apply_bias_of_counts_that_do_not_sum_to_the_rows_is_refused(kind, counts: list[int]) -> None:
    with pytest.raises(ShapeError, match=r"(?s)asked: 2 counts.* the 4 rows.*found: tokens_per_expert \[\d"):
        _apply_bias(torch.zeros(4, 3), torch.zeros(2, 3), kind(counts))


def test_apply_bias_of_shapes_that_do_not_fit_is_refused() -> None:
    value = torch.zeros(4, 3)
    with pytest.raises(ShapeError, match=r"\(2, 4\) and \(4, 3\)"):
        _apply_bias(value, torch.zeros(2, 4), [2, 2])
    for shape in ((4,), (3, 1), (4, 3), (2, 2, 1)):
        with pytest.raises(ShapeError, match=r"asked: permuted_probs of shape \[4, 1\]"):
            _apply_bias(value, torch.zeros(2, 3), [2, 2], torch.ones(shape))


# ---------------------------------------------------------------------------------------------------- the permutation
def test_permute_tokens_of_the_original_gives_the_published_rows() -> None:
    experts, wanted = PUBLISHED["experts"], PUBLISHED["permute"]
    indices = torch.tensor(experts["ids"])
    recipe = experts["recipes"]["weights"]
    n = torch.arange(indices.numel(), dtype=torch.float64)
    weights = (recipe["offset"] + recipe["scale"] * torch.sin(recipe["seed"] + 1.37 * n)).float().view(indices.shape)
    mask = torch.tensor(experts["token_mask"])
    held = wanted["n_experts"], wanted["first_expert"]
    tokens, slots, probs, sizes, offs = _permute_tokens_for_grouped_mm(
        indices, weights, mask, *held, return_slot_ids=True
    )
    assert (tokens.tolist(), slots.tolist()) == (wanted["tokens"], wanted["slots"])
    assert (sizes.tolist(), offs.tolist()) == (wanted["sizes"], wanted["ends"])
    torch.testing.assert_close(probs, torch.tensor(wanted["weights"]), rtol=0, atol=1e-7)


def test_permute_tokens_returns_four_things_and_their_dtypes() -> None:
    indices, weights = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32), torch.ones(2, 2, dtype=torch.bfloat16)
    found = _permute_tokens_for_grouped_mm(indices, weights, torch.ones(2, dtype=torch.bool), 3, 0)
    assert [value.dtype for value in found] == [torch.int64, torch.float32, torch.int64, torch.int32]
    assert [tuple(value.shape) for value in found] == [(4,), (4,), (3,), (3,)]
    assert torch.equal(found[3].long(), found[2].cumsum(0))


def test_permute_tokens_sorts_one_tokens_slots_by_expert_and_keeps_duplicates() -> None:
    mask = torch.tensor([True])
    tokens, slots, probs, _, _ = _permute_tokens_for_grouped_mm(
        torch.tensor([[1, 0]]), torch.tensor([[0.7, 0.3]]), mask, 2, 0, return_slot_ids=True
    )
    assert (tokens.tolist(), slots.tolist()) == ([0, 0], [1, 0])
    torch.testing.assert_close(probs, torch.tensor([0.3, 0.7]))
    twice = _permute_tokens_for_grouped_mm(torch.tensor([[1, 1]]), torch.tensor([[0.7, 0.3]]), mask, 2, 0)
    assert twice[0].tolist() == [0, 0] and twice[2].tolist() == [0, 2]
    torch.testing.assert_close(twice[1], torch.tensor([0.7, 0.3]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_permute_tokens_keeps_this_ranks_experts_of_valid_tokens(dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 4], [5, 7], [-1, 8], [6, 99], [4, 5]], dtype=dtype)
    weights = torch.arange(10.0).view(5, 2)
    weights[4] = float("nan")
    mask = torch.tensor([True, True, True, True, False])
    tokens, probs, sizes, offs = _permute_tokens_for_grouped_mm(indices, weights, mask, 4, 4)
    assert tokens.tolist() == [0, 1, 3, 1] and probs.tolist() == [1, 2, 6, 3]
    assert sizes.tolist() == [1, 1, 1, 1] and offs.tolist() == [1, 2, 3, 4]
    assert indices[4].tolist() == [4, 5]  # the caller's, untouched


@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (3, 2), (3, 0)])
def test_permute_tokens_without_a_local_route_gives_no_rows(tokens: int, k: int) -> None:
    indices, weights = torch.zeros(tokens, k, dtype=torch.int64), torch.ones(tokens, k)
    found = _permute_tokens_for_grouped_mm(indices, weights, torch.ones(tokens, dtype=torch.bool), 2, 6)
    assert found[0].shape == found[1].shape == (0,)
    assert found[2].tolist() == [0, 0] and found[3].tolist() == [0, 0]


def test_permute_tokens_passes_gradients_to_the_weights() -> None:
    weights = torch.tensor([[0.7, 0.3], [0.5, 0.5]], requires_grad=True)
    indices, mask = torch.tensor([[1, 0], [1, 9]]), torch.tensor([True, True])
    _, probs, _, _ = _permute_tokens_for_grouped_mm(indices, weights, mask, 2, 0)
    probs.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert weights.grad.tolist() == [[2, 1], [3, 0]]


# ---------------------------------------------------------------------------------------------------- the two products
def products(dtype: torch.dtype, grad: bool = False):
    hidden = drawn(9, 16, dtype=dtype)
    up, down = drawn(3, 16, 16, seed=1, dtype=dtype) / 4, drawn(3, 8, 16, seed=2, dtype=dtype) / 3
    probs = torch.rand(9, 1, generator=torch.Generator().manual_seed(3))
    return [t.requires_grad_(grad) for t in (hidden, up, down, probs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu"])
def test_torch_mm_experts_fwd_and_its_gradients_agree_with_reference(activation: str, dtype: torch.dtype) -> None:
    row, sizes = ACTIVATIONS[activation], np.array([4, 0, 5])
    function = {"swiglu": automodel.weighted_bias_swiglu_impl, "quick_geglu": automodel.quick_geglu_deepep}[activation]
    hidden, up, down, probs = products(dtype, grad=True)
    out = _torch_mm_experts_fwd(hidden, up, down, torch.tensor(sizes), probs, function)
    dout = drawn(9, 16, seed=4, dtype=dtype)
    out.backward(dout)
    assert out.dtype == dtype and probs.grad.dtype == torch.float32
    x, w1, w2, p, g = (t.detach().double().numpy() for t in (hidden, up, down, probs[:, 0], dout))

    def run(arithmetic):
        first = reference.grouped_matmul(x, w1, sizes, arithmetic)
        act = reference.activate(first, p, row, arithmetic)
        dact, dw2 = reference.grouped_matmul_vjp(act, w2, sizes, g, arithmetic)
        dfirst, dp = reference.activate_vjp(first, p, row, dact, arithmetic)
        dx, dw1 = reference.grouped_matmul_vjp(x, w1, sizes, dfirst, arithmetic)
        y = reference.grouped_matmul(act, w2, sizes, arithmetic)
        return {"y": y, "dx": dx, "dprobs": dp, "dup": dw1, "ddown": dw2}

    exact = run(EXACT)
    limits = bounds(run, exact, dtype)
    found = {"y": out, "dx": hidden.grad, "dprobs": probs.grad[:, 0], "dup": up.grad, "ddown": down.grad}
    for name, value in found.items():
        assert within(value.detach().double().numpy(), exact[name], limits[name]), name


def test_torch_mm_experts_fwd_takes_weights_of_another_dtype_and_rows_past_the_last_expert() -> None:
    hidden, up, down, probs = products(torch.bfloat16)
    swiglu = automodel.weighted_bias_swiglu_impl
    sizes = torch.tensor([4, 0, 3])
    wanted = _torch_mm_experts_fwd(hidden[:7], up, down, sizes, probs[:7], swiglu)
    hidden[7:] = float("nan")
    found = _torch_mm_experts_fwd(hidden, up.float(), down.float(), sizes, probs, swiglu)
    assert torch.equal(found[:7], wanted) and not found[7:].any()


def test_torch_mm_experts_fwd_calls_the_activation_that_it_is_given() -> None:
    hidden, up, down, probs = products(torch.float32)
    sizes = torch.tensor([4, 0, 5])
    found = _torch_mm_experts_fwd(hidden, up, down, sizes, probs, lambda h, p: h[:, :8] * p)
    torch.testing.assert_close(found, _torch_mm_experts_fwd(hidden, up[..., :8], down, sizes, probs, torch.mul))


def test_torch_mm_experts_fwd_in_mxfp8_is_refused_where_there_is_none() -> None:
    hidden, up, down, probs = products(torch.bfloat16)
    with pytest.raises(MoEError, match="torch_mm_mxfp8"):
        _torch_mm_experts_fwd(
            hidden, up, down, torch.tensor([4, 0, 5]), probs, automodel.weighted_bias_swiglu_impl, use_mxfp8=True
        )
