"""What the routed experts must do in both frontends, with every backend: output and every gradient.

The oracle is the float64 reference, the tolerance its computed bound.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import DTYPES, SIDES, Problem, Side, assert_correct, cached_problem, problem

from moebius.core.activations import CONFIG_ACTIVATIONS
from moebius.core.precision import DTYPES as ROUNDOFF

sides = pytest.mark.parametrize("side", SIDES, ids=str)


def _case(name: str, **settings: object) -> Problem:
    """The base problem, bent into the named situation."""
    base = cached_problem(expert_bias=True, **settings)
    if (name, base) not in _CASES:
        _CASES[name, base] = _SITUATIONS[name](base)
    return _CASES[name, base]


def _one_expert(p: Problem) -> Problem:
    ids = np.full_like(p.ids, -1)
    ids[:, 0] = 2
    return p.but(ids=ids)


def _odd_ids(p: Problem) -> Problem:
    ids = p.ids.copy()
    ids[0], ids[1], ids[2, 1], ids[3, 0] = -1, [4, 1], 2**31 - 1, -7
    return p.but(ids=ids, token_mask=np.ones_like(p.token_mask))


def _duplicates(p: Problem) -> Problem:
    ids = p.ids.copy()
    ids[:, 1] = ids[:, 0]
    return p.but(ids=ids)


def _cut(p: Problem, tokens: int) -> Problem:
    return p.but(
        x=p.x[:tokens],
        token_mask=np.ones(tokens, bool),
        weights=p.weights[:tokens],
        ids=p.ids[:tokens],
        dy=p.dy[:tokens],
    )


_SITUATIONS = {
    "base": lambda p: p,
    "no_token": lambda p: _cut(p, 0),
    "one_token": lambda p: _cut(p, 1),
    "all_masked": lambda p: p.but(token_mask=np.zeros_like(p.token_mask)),
    "none_masked": lambda p: p.but(token_mask=np.ones_like(p.token_mask)),
    "all_to_one_expert": _one_expert,
    "empty_experts": lambda p: p.but(ids=np.where(p.ids == 1, 3, p.ids)),
    "duplicate_ids": _duplicates,
    "ids_out_of_range": _odd_ids,
    "zero_weights": lambda p: p.but(weights=np.where(p.weights > 0.5, 0.0, p.weights)),
    "negative_weights": lambda p: p.but(weights=-p.weights),
}
_CASES: dict[tuple[str, Problem], Problem] = {}


@sides
@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("situation", _SITUATIONS)
def test_experts_in_a_situation_agree_with_reference(side: Side, situation: str, after: bool) -> None:
    assert_correct(side, _case(situation, apply_router_weight_after_down=after))


def _combinations():
    """PyTorch: every activation x dtype x backend with biases, and without in float32.

    JAX compiles each for a second. There every activation meets bfloat16 with biases, float32 without, float64 and
    float16 by turns, and ragged_dot.
    """
    for place, activation in enumerate([*CONFIG_ACTIVATIONS, "swiglu_clamped"]):
        turn = ("float64", "float16")[place % 2]
        for side in SIDES:
            with_bias = {"jax-loop": ("bfloat16", turn), "jax-ragged_dot": ("float32",)}.get(str(side), DTYPES)
            for dtype in filter(side.serves, with_bias):
                yield pytest.param(side, activation, True, dtype, id=f"{side}-{activation}-{dtype}-bias")
            if side.backend != "ragged_dot":
                yield pytest.param(side, activation, False, "float32", id=f"{side}-{activation}-float32-plain")


@pytest.mark.parametrize("side, activation, bias, dtype", list(_combinations()))
def test_experts_of_every_activation_agree_with_reference(side: Side, activation: str, bias: bool, dtype: str) -> None:
    clamped = {"swiglu_limit": 0.5} if activation == "swiglu_clamped" else {}
    name = "swiglu" if clamped else activation
    assert_correct(side, cached_problem(expert_activation=name, expert_bias=bias, dtype=dtype, **clamped))


@sides
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_weighted_after_down_in_16_bit_agree_with_reference(side: Side, dtype: str) -> None:
    assert_correct(side, cached_problem(expert_bias=True, dtype=dtype, apply_router_weight_after_down=True))


@sides
@pytest.mark.parametrize("k", [1, 4])
def test_experts_with_k_at_its_ends_agree_with_reference(side: Side, k: int) -> None:
    assert_correct(side, cached_problem(k=k, expert_bias=True))


@sides
@pytest.mark.parametrize("sizes", [(7, 5, 3, 3), (5, 9, 11, 1), (1, 1, 1, 1)], ids=str)
def test_experts_of_widths_off_every_alignment_agree_with_reference(side: Side, sizes: tuple[int, ...]) -> None:
    tokens, dim, inter, n_experts = sizes
    p = cached_problem(
        tokens=tokens, dim=dim, inter=inter, n_experts=n_experts, k=1, dtype="bfloat16", expert_bias=True
    )
    assert_correct(side, p)


@sides
def test_experts_with_float32_parameters_and_bfloat16_tokens_round_like_bfloat16(side: Side) -> None:
    p = cached_problem(expert_bias=True, dtype="bfloat16").but(param_dtype="float32")
    assert_correct(side, p)


@sides
def test_experts_with_bfloat16_weights_return_their_gradient_in_bfloat16(side: Side) -> None:
    p = cached_problem(dtype="bfloat16", seed=3)
    p = p.but(weights=np.round(p.weights * 64) / 64, weights_dtype="bfloat16")
    assert_correct(side, p)


@sides
def test_experts_of_an_unused_expert_give_zero_gradients_not_none(side: Side) -> None:
    found = side.experts(_case("empty_experts"))
    for name in ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"):
        assert (found[name][1] == 0).all(), name


@sides
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_experts_with_poison_in_a_masked_token_are_unchanged_bit_for_bit(side: Side, poison: float) -> None:
    clean = cached_problem(expert_bias=True, seed=1)
    mask = clean.token_mask.copy()
    mask[3] = False
    clean = clean.but(token_mask=mask)
    x, weights, dy = clean.x.copy(), clean.weights.copy(), clean.dy.copy()
    x[3], weights[3], dy[3] = poison, poison, poison
    found, wanted = side.experts(clean.but(x=x, weights=weights, dy=dy)), side.experts(clean)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def _poisoned_expert(side: Side) -> tuple[Problem, dict[str, np.ndarray]]:
    p = cached_problem(seed=2)
    p = p.but(token_mask=np.ones_like(p.token_mask))
    parameters = {name: value.copy() for name, value in p.parameters.items()}
    for value in parameters.values():
        value[1] = np.nan
    return p, side.experts(p.but(parameters=parameters))


@pytest.mark.parametrize(
    "side",
    [
        pytest.param(
            s,
            marks=pytest.mark.xfail(reason="lax.ragged_dot multiplies every row by every expert", strict=True)
            if s.backend == "ragged_dot"
            else (),
        )
        for s in SIDES
    ],
    ids=str,
)
def test_experts_with_nan_in_one_expert_keep_it_to_that_expert(side: Side) -> None:
    p, found = _poisoned_expert(side)
    touched = (p.ids == 1).any(-1)
    assert touched.any() and not touched.all()
    assert np.isnan(found["y"][touched]).all() and np.isfinite(found["y"][~touched]).all()
    assert np.isfinite(found["dx"][~touched]).all()
    for name in p.parameters:
        assert np.isfinite(np.delete(found[name], 1, axis=0)).all(), name


@sides
@pytest.mark.parametrize("seed", range(3))
def test_experts_repeated_give_the_same_bits(side: Side, seed: int) -> None:
    p = cached_problem(expert_bias=True, dtype="bfloat16", seed=seed)
    first, second = side.experts(p), side.experts(p)
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


# Few shapes, because each new one compiles in JAX; many routings.
@st.composite
def routings(draw: st.DrawFn) -> tuple[dict[str, object], np.ndarray, np.ndarray]:
    shape = draw(st.sampled_from([(5, 3, 2, "float32"), (9, 4, 3, "bfloat16"), (6, 1, 1, "float32")]))
    tokens, n_experts, k, dtype = shape
    ids = draw(st.lists(st.lists(st.integers(-1, n_experts), min_size=k, max_size=k), min_size=tokens, max_size=tokens))
    mask = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    sizes = {"tokens": tokens, "n_experts": n_experts, "k": k, "dtype": dtype}
    return sizes, np.array(ids), np.array(mask)


@sides
@settings(max_examples=25)
@given(routing=routings(), seed=st.integers(0, 3))
def test_experts_of_any_routing_agree_with_reference(side: Side, routing, seed: int) -> None:
    sizes, ids, mask = routing
    p = problem(**sizes, dim=8, inter=6, seed=seed, expert_bias=True)
    assert_correct(side, p.but(ids=ids, token_mask=mask))


def test_bounds_are_near_the_rounding_of_the_dtype() -> None:
    """A bound that is far above the dtype's roundoff would let everything pass."""
    from sides import expected

    for dtype in ("float32", "bfloat16", "float16"):
        p = cached_problem(expert_activation="swiglu", dtype=dtype)
        _, limits = expected(p)
        for name, bound in limits.items():
            assert bound.relative() < 100 * ROUNDOFF[dtype][0], (dtype, name)
