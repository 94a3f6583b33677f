"""The router's losses in both frontends: values and gradients against the reference, padding, what does not fit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sides import Side, rounded

from moebius.core import ROUTING_RULES, DTypeError, MoEConfig, ShapeError, reference
from moebius.core.precision import EXACT
from moebius.core.reference.route import top_k
from moebius.core.tolerance import bounds, within

frontends = pytest.mark.parametrize("side", (Side("torch", "loop"), Side("jax", "loop")), ids=lambda s: s.framework)
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
T, E, K = 12, 8, 3
RULES = {name: {"score_func": name} for name in ROUTING_RULES} | {
    "softmax_before_topk": {"score_func": "softmax", "softmax_before_topk": True},
    "sigmoid_biased_weights": {"score_func": "sigmoid", "router_weight_uses_score_correction_bias": True},
}
# Three sequences of four: one whole, one with padding, one of padding alone.
MASK = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0], bool)


def config(rule: str = "softmax", **more) -> MoEConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rules that ignore groups say so
        return MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=4, moe_inter_dim=4, **RULES[rule], **more)


def drawn(dtype: str, seed: int = 0) -> np.ndarray:
    return rounded(np.random.default_rng(seed).normal(size=(T, E)) * 2, dtype)


def value_and_gradient(side: Side, loss, logits: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Of `loss(logits)`, a function of this side's arrays."""
    with side.context(dtype):
        x = side.array(logits, dtype)
        if side.framework == "torch":
            value = loss(x.requires_grad_())
            value.backward()
            return {"loss": side.numpy(value), "dlogits": side.numpy(x.grad)}
        import jax

        value, gradient = jax.jit(jax.value_and_grad(loss))(x)
        return {"loss": side.numpy(value), "dlogits": side.numpy(gradient)}


def agree(found, wanted, dtype: str) -> None:
    exact = wanted(EXACT)
    limits = bounds(wanted, exact, dtype)
    for name, value in found.items():
        assert within(value, exact[name], limits[name]), (name, value, exact[name], limits[name])


@frontends
@dtypes
def test_z_loss_agrees_with_reference(side: Side, dtype: str) -> None:
    logits = drawn(dtype)

    def wanted(arithmetic):
        loss = reference.z_loss(logits, MASK, arithmetic)
        return {"loss": np.asarray(loss), "dlogits": reference.z_loss_vjp(logits, MASK, 1.0, arithmetic)}

    mask = side.array(MASK)
    found = value_and_gradient(side, lambda x: side.module.z_loss(x, mask), logits, dtype)
    agree(found, wanted, dtype)


@frontends
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ranked", [False, True], ids=["", "ranked"])
def test_seq_aux_loss_of_every_rule_agrees_with_reference(side: Side, rule: str, ranked: bool) -> None:
    """In float64, where nothing is left to a tolerance; once with the best experts told."""
    made, logits = config(rule, n_expert_groups=4, n_limited_groups=2), drawn("float64")
    best = np.random.default_rng(1).permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :K] if ranked else None

    def wanted(arithmetic):
        settings = {"n_sequences": 3, "best_TK": top_k(logits, K) if best is None else best, "arithmetic": arithmetic}
        loss = reference.seq_aux_loss(logits, MASK, made, **settings)
        return {"loss": np.asarray(loss), "dlogits": reference.seq_aux_loss_vjp(logits, MASK, made, 1.0, **settings)}

    mask, told = side.array(MASK), None if best is None else side.array(best, "int32")
    loss = lambda x: side.module.seq_aux_loss(x, mask, made, n_sequences=3, best_TK=told)  # noqa: E731
    agree(value_and_gradient(side, loss, logits, "float64"), wanted, "float64")


@frontends
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_of_short_logits_are_computed_promoted(side: Side, dtype: str) -> None:
    logits, mask = drawn(dtype), side.array(MASK)
    x, made = side.array(logits, dtype), config("sigmoid")
    for loss, wanted in (
        (side.module.z_loss(x, mask), reference.z_loss(logits, MASK)),
        (side.module.seq_aux_loss(x, mask, made), reference.seq_aux_loss(logits, MASK, made)),
    ):
        assert str(loss.dtype).endswith("float32") and loss.shape == ()
        np.testing.assert_allclose(side.numpy(loss), wanted, rtol=1e-5)


@frontends
def test_losses_neither_read_padding_nor_give_it_a_gradient(side: Side) -> None:
    clean, mask = drawn("float32"), side.array(MASK)
    poisoned = np.where(MASK[:, None], clean, np.nan)
    for loss in (
        lambda x: side.module.z_loss(x, mask),
        lambda x: side.module.seq_aux_loss(x, mask, config("sigmoid"), n_sequences=3),
    ):
        wanted, found = (value_and_gradient(side, loss, x, "float32") for x in (clean, poisoned))
        np.testing.assert_array_equal(found["loss"], wanted["loss"])
        np.testing.assert_array_equal(found["dlogits"], wanted["dlogits"])
        assert not found["dlogits"][~MASK].any() and found["dlogits"][MASK].any()


@frontends
@pytest.mark.parametrize("tokens", [0, T])
def test_losses_without_a_valid_token_are_zero(side: Side, tokens: int) -> None:
    logits, mask = side.array(np.zeros((tokens, E)), "float32"), side.array(np.zeros(tokens, bool))
    assert side.numpy(side.module.z_loss(logits, mask)) == 0
    assert side.numpy(side.module.seq_aux_loss(logits, mask, config(), n_sequences=3)) == 0


@frontends
@pytest.mark.parametrize("n_sequences", [0, -1, 5, 13])
def test_seq_aux_loss_of_sequences_that_do_not_divide_the_tokens_is_refused(side: Side, n_sequences: int) -> None:
    logits, mask = side.array(drawn("float32"), "float32"), side.array(MASK)
    with pytest.raises(ShapeError, match=rf"asked: {n_sequences} sequences .+\nfound: 12 tokens\ndo: .+"):
        side.module.seq_aux_loss(logits, mask, config(), n_sequences=n_sequences)


@frontends
def test_seq_aux_loss_of_logits_that_do_not_fit_says_what_does(side: Side) -> None:
    mask = side.array(MASK)
    with pytest.raises(ShapeError, match="logits of shape"):
        side.module.seq_aux_loss(side.array(np.zeros((T, 5)), "float32"), mask, config())
    with pytest.raises(DTypeError, match="logits of a dtype among"):
        side.module.seq_aux_loss(side.array(np.zeros((T, E)), "int32"), mask, config())
