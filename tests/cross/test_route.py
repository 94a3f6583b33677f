"""Routing in both frontends: every rule against the reference, and the same experts for the same logits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sides import Side, rounded

from moebius.core import DTypeError, MoEConfig, ShapeError, reference
from moebius.core.precision import EXACT
from moebius.core.routing import SCORE_FUNCTIONS
from moebius.core.tolerance import bounds, within

FRONTENDS = (Side("torch", "loop"), Side("jax", "loop"))
frontends = pytest.mark.parametrize("side", FRONTENDS, ids=lambda side: side.framework)
RULES = {name: {"score_func": name} for name in SCORE_FUNCTIONS}
RULES["softmax_before_topk"] = {"score_func": "softmax", "softmax_before_topk": True}
RULES["sigmoid_biased_weights"] = {"score_func": "sigmoid", "router_weight_uses_score_correction_bias": True}
rules = pytest.mark.parametrize("rule", RULES)


def config(rule: str, *, groups: int = 4, norm: bool = True, dtype: str = "float32") -> MoEConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rules that ignore groups say so
        return MoEConfig(
            n_routed_experts=8,
            n_activated_experts=3,
            dim=4,
            moe_inter_dim=4,
            n_expert_groups=groups,
            n_limited_groups=min(groups, 2),
            norm_topk_prob=norm,
            route_scale=2.5,
            dtype=dtype,
            **RULES[rule],
        )


def logits_and_bias(seed: int = 0, tokens: int = 17) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rounded(rng.normal(size=(tokens, 8)) * 2, "float32"), rounded(rng.normal(size=8) * 0.3, "float32")


def run(side: Side, c: MoEConfig, logits: np.ndarray, bias: np.ndarray | None):
    b = None if bias is None else side.array(bias, "float32")
    return side.module.route(side.array(logits, "float32"), c, correction_bias_E=b)


def weights_and_gradient(side: Side, c: MoEConfig, logits, bias, dweights, dscores) -> dict[str, np.ndarray]:
    b = None if bias is None else side.array(bias, "float32")
    dw, ds = side.array(dweights, "float32"), side.array(dscores, "float32")
    x = side.array(logits, "float32")
    if side.framework == "torch":
        routing = side.module.route(x.requires_grad_(), c, correction_bias_E=b)
        ((routing.weights_TK * dw).sum() + (routing.scores_TE * ds).sum()).backward()
        return {"weights": side.numpy(routing.weights_TK), "dlogits": side.numpy(x.grad)}
    import jax

    (weights, _), pullback = jax.vjp(lambda x: side.module.route(x, c, correction_bias_E=b)[::2], x)
    return {"weights": side.numpy(weights), "dlogits": side.numpy(pullback((dw, ds))[0])}


@frontends
@rules
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_route_of_every_rule_agrees_with_reference(
    side: Side, rule: str, norm: bool, groups: int, with_bias: bool
) -> None:
    c, (logits, bias) = config(rule, groups=groups, norm=norm), logits_and_bias()
    bias = bias if with_bias else None
    rng = np.random.default_rng(5)
    dweights, dscores = rounded(rng.normal(size=(17, 3)), "float32"), rounded(rng.normal(size=(17, 8)), "float32")

    def wanted(arithmetic):
        routing = reference.route(logits, c, correction_bias_E=bias, ids_TK=ids, arithmetic=arithmetic)
        dlogits = reference.route_vjp(logits, c, ids, dweights, dscores, correction_bias_E=bias, arithmetic=arithmetic)
        return {"weights": routing.weights_TK, "dlogits": dlogits}

    ids = reference.route(logits, c, correction_bias_E=bias).ids_TK
    routing = run(side, c, logits, bias)
    assert str(routing.ids_TK.dtype).endswith("int32") and str(routing.weights_TK.dtype).endswith("float32")
    np.testing.assert_array_equal(side.numpy(routing.ids_TK), ids)
    exact = wanted(EXACT)
    limits = bounds(wanted, exact, "float32")
    for name, value in weights_and_gradient(side, c, logits, bias, dweights, dscores).items():
        assert within(value, exact[name], limits[name]), name


@frontends
@rules
def test_route_with_forced_ids_weighs_them_by_live_scores(side: Side, rule: str) -> None:
    c, (logits, bias) = config(rule), logits_and_bias(1)
    ids = np.tile([[6, 0, 3]], (17, 1))
    forced = side.module.route(
        side.array(logits, "float32"),
        c,
        correction_bias_E=side.array(bias, "float32"),
        ids_TK=side.array(ids, "int32"),
    )
    wanted = reference.route(logits, c, correction_bias_E=bias, ids_TK=ids)
    np.testing.assert_array_equal(side.numpy(forced.ids_TK), ids)
    np.testing.assert_allclose(side.numpy(forced.weights_TK), wanted.weights_TK, rtol=1e-5)


@frontends
@rules
def test_route_of_tied_logits_takes_the_lowest_ids(side: Side, rule: str) -> None:
    routing = run(side, config(rule, groups=1), np.zeros((2, 8)), None)
    assert side.numpy(routing.ids_TK).tolist() == [[0, 1, 2]] * 2


@frontends
def test_route_ranks_minus_zero_as_zero_and_nan_last(side: Side) -> None:
    logits = np.array([[-0.0, 0.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0], [np.nan, 1, 2, 3, 4, 5, 6, -np.nan]])
    routing = run(side, config("softmax", groups=1), logits, None)
    assert side.numpy(routing.ids_TK).tolist() == [[0, 1, 2], [6, 5, 4]]


# Multiples of 1/4 in a narrow range: many ties.
coarse = st.lists(st.lists(st.integers(-6, 6), min_size=8, max_size=8), min_size=6, max_size=6)


@rules
@given(levels=coarse, bias_levels=st.lists(st.integers(-2, 2), min_size=8, max_size=8), with_bias=st.booleans())
def test_route_of_equal_logits_is_equal_in_both_frontends(rule, levels, bias_levels, with_bias) -> None:
    logits = np.array(levels) / 4
    bias = np.array(bias_levels) / 4 if with_bias else None
    c = config(rule)
    ids = [side.numpy(run(side, c, logits, bias).ids_TK) for side in FRONTENDS]
    np.testing.assert_array_equal(ids[0], ids[1])


@rules
def test_route_of_scores_apart_by_more_than_rounding_is_equal_in_both_frontends(rule: str) -> None:
    logits, bias = logits_and_bias(7, tokens=4000)
    c = config(rule)
    torch, jax = (side.numpy(run(side, c, logits, bias).ids_TK) for side in FRONTENDS)
    differ = (np.sort(torch) != np.sort(jax)).any(-1)
    # A row may differ where the reference's order hangs on less than the rounding of a score, which is below 2.
    for t in np.flatnonzero(differ):
        score = 1 / (1 + np.exp(-logits[t])) if "sigmoid" in rule else np.sqrt(np.logaddexp(0, logits[t]))
        choice = score + bias
        moved = sorted(set(torch[t]) ^ set(jax[t]))
        assert np.ptp(choice[moved]) < 16 * 2**-24, (t, moved)
    assert differ.mean() < 1e-2


@frontends
def test_route_of_a_score_that_underflows_has_a_finite_gradient(side: Side) -> None:
    logits = np.tile(np.array([[-200.0, 1.0, 2.0, 3.0, 4.0, -300.0, 0.0, 5.0]]), (2, 1))
    found = weights_and_gradient(side, config("sqrtsoftplus"), logits, None, np.ones((2, 3)), np.ones((2, 8)))
    assert np.isfinite(found["dlogits"]).all() and (found["dlogits"][:, [0, 5]] == 0).all()


@frontends
def test_route_of_softmax_with_groups_chooses_by_logits_where_scores_underflow(side: Side) -> None:
    """All scores but one are 0: by scores the second group would be kept, not the fourth."""
    logits = np.array([[-3000.0, 0.0, -1000.0, -1000.0, -1000.0, -1000.0, -900.0, -2000.0]])
    routing = run(side, config("softmax_with_groups", norm=False), logits, None)
    assert side.numpy(routing.ids_TK).tolist() == [[1, 6, 7]]
    assert side.numpy(routing.weights_TK).tolist() == [[2.5, 0.0, 0.0]]


BAD_LOGITS = {"width": (3, 5), "one_expert": (3, 1), "flat": (8,)}


@frontends
@pytest.mark.parametrize("shape", BAD_LOGITS.values(), ids=BAD_LOGITS)
def test_route_of_logits_that_do_not_fit_says_what_does(side: Side, shape) -> None:
    with pytest.raises(ShapeError, match=r"asked: logits of shape \[tokens, 8\]\nfound: .+\ndo: .+"):
        side.module.route(side.array(np.zeros(shape), "float32"), config("softmax"))
    with pytest.raises(DTypeError, match="logits of a dtype among"):
        side.module.route(side.array(np.zeros((3, 8)), "int32"), config("softmax"))


@frontends
def test_expert_load_counts_a_token_once_and_masked_tokens_never(side: Side) -> None:
    ids = np.array([[0, 0], [1, -1], [2, 9], [3, 1]])
    mask = np.array([True, True, True, False])
    load = side.module.expert_load(side.array(ids, "int32"), side.array(mask), 4)
    assert side.numpy(load).tolist() == [1, 1, 1, 0]


@frontends
def test_aux_loss_of_masked_tokens_alone_is_zero_and_finite(side: Side) -> None:
    c, (logits, _) = config("softmax_before_topk"), logits_and_bias()
    mask = side.array(np.zeros(17, bool))
    routing = run(side, c, np.where(np.arange(8) == 0, np.nan, logits), None)
    load = side.module.expert_load(routing.ids_TK, mask, 8)
    assert side.numpy(side.module.aux_loss(routing.scores_TE, load, mask, 3)) == 0
