"""The computed bounds hold for correct runs and catch wrong ones.

A correct run is simulated in NumPy: every rounding that a frontend makes, made for real.
"""

from dataclasses import replace

import numpy as np
import pytest

from moebius.core import MoEConfig, layout, reference, tolerance
from moebius.core.precision import DTYPES, EXACT, Arithmetic
from moebius.core.tolerance import Bound, bounds, relative_error, within

LOW = ("float32", "bfloat16", "float16")


def rounded(value, dtype):
    """`value` rounded to the nearest number of `dtype`, ties to even, as float64."""
    if dtype != "bfloat16":
        return np.asarray(value, np.float64).astype(dtype).astype(np.float64)
    bits = np.asarray(value, np.float64).astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


class Rounding(Arithmetic):
    """A run in `dtype` with float32 accumulation."""

    def __init__(self, dtype):
        self.dtype = dtype

    def dot(self, a, b):
        return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.float64)

    def sum(self, value, axis=None, keepdims=False):
        return value.astype(np.float32).sum(axis=axis, keepdims=keepdims).astype(np.float64)

    def curve(self, value):
        return rounded(value, "float32")

    def store(self, value, dtype=None):
        return rounded(value, dtype or self.dtype)


class Experts:
    """One problem whose inputs are exact in `dtype`."""

    def __init__(self, dtype, seed=0, tokens=24, **settings):
        rng = np.random.default_rng(seed)
        settings = {"expert_bias": True, "activation_limit": 1.0, "dtype": dtype} | settings
        self.dtype = dtype
        self.config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=12, **settings)
        self.parameters = {
            row.name: rounded(rng.normal(size=row.shape) * (0.5 if row.zeros else row.shape[1] ** -0.5), dtype)
            for row in layout.experts(self.config)
        }
        self.x, self.dy = (rounded(rng.normal(size=(tokens, 16)), dtype) for _ in range(2))
        self.weights = rounded(rng.random((tokens, 2)) + 0.1, dtype)
        self.ids = np.argsort(rng.random((tokens, 4)), axis=-1)[:, :2]
        self.mask = rng.random(tokens) < 0.9

    def run(self, arithmetic=EXACT, **changes):
        given = {"weights": self.weights, "parameters": self.parameters, "config": self.config} | changes
        parameters, config = given["parameters"], given["config"]
        trace = reference.experts(self.x, self.mask, given["weights"], self.ids, parameters, config, arithmetic)
        dx, dweights, grads = reference.experts_vjp(trace, parameters, config, self.dy, arithmetic)
        return {"y": trace.y_TD, "dx": dx, "dweights": dweights, **grads}

    def verdict(self, found):
        """{tensor: inside its bounds}."""
        exact = self.run()
        limits = bounds(self.run, exact, self.dtype)
        return {name: within(found[name], exact[name], limits[name]) for name in exact}


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("name", ["swiglu", "swigluoai", "quick_geglu", "geglu", "relu2"])
@pytest.mark.parametrize("dtype", LOW)
def test_within_of_a_correct_run_is_true_for_every_tensor(dtype, name, after):
    for seed in range(3):
        problem = Experts(dtype, seed, expert_activation=name, apply_router_weight_after_down=after)
        assert all(problem.verdict(problem.run(Rounding(dtype))).values()), seed


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens", [0, 1])
def test_within_of_a_correct_run_of_few_tokens_is_true(tokens, dtype):
    for seed in range(5):
        problem = Experts(dtype, seed, tokens=tokens)
        assert all(problem.verdict(problem.run(Rounding(dtype))).values()), seed


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("settings", [{"score_func": "sigmoid"}, {"softmax_before_topk": True}], ids=str)
def test_within_of_a_correct_gate_is_true(settings, dtype):
    rng = np.random.default_rng(0)
    config = MoEConfig(
        n_routed_experts=8, n_activated_experts=3, dim=16, moe_inter_dim=8, norm_topk_prob=True, **settings
    )
    x, weight = rounded(rng.normal(size=(20, 16)), dtype), rounded(rng.normal(size=(8, 16)) / 4, dtype)
    dweights, mask = rounded(rng.normal(size=(20, 3)), dtype), np.ones(20, bool)
    ids = reference.gate(x, {"weight": weight}, config)[1].ids_TK

    def run(arithmetic):
        logits, routing = reference.gate(x, {"weight": weight}, config, ids_TK=ids, arithmetic=arithmetic)
        dx, grads = reference.gate_vjp(x, logits, ids, {"weight": weight}, config, dweights, arithmetic=arithmetic)
        loss = reference.aux_loss(routing.scores_TE, reference.expert_load(ids, mask, 8), mask, 3, arithmetic)
        return {"weights": routing.weights_TK, "dx": dx, "loss": np.asarray(loss), **grads}

    exact = run(EXACT)
    found, limits = run(Rounding(dtype)), bounds(run, exact, dtype)
    assert all(within(found[name], exact[name], limits[name]) for name in exact)


@pytest.mark.parametrize("dtype", LOW)
def test_bounds_of_a_problem_are_near_the_roundoff(dtype):
    problem = Experts(dtype, expert_activation="swiglu")
    for name, limit in bounds(problem.run, problem.run(), dtype).items():
        assert DTYPES[dtype][0] / 10 < limit.relative() < 100 * DTYPES[dtype][0], name


def test_bounds_of_float64_are_near_its_roundoff():
    problem = Experts("float64", expert_activation="swiglu")
    assert all(limit.relative() < 1e-14 for limit in bounds(problem.run, problem.run(), "float64").values())


def test_bounds_repeated_are_the_same():
    problem = Experts("bfloat16")
    assert bounds(problem.run, problem.run(), "bfloat16") == bounds(problem.run, problem.run(), "bfloat16")


# ------------------------------------------------------------------------------------------- what must not pass


def wrong_weight(problem):
    weights = problem.weights.copy()
    weights[np.flatnonzero(problem.mask)[0], 0] *= 1.05
    return {"weights": weights}


def wrong_matrix(problem, share):
    parameters = {name: value.copy() for name, value in problem.parameters.items()}
    parameters["down_projs"][1] *= 1 + share
    return {"parameters": parameters}


def swapped(problem):
    parameters = dict(problem.parameters)
    for name in ("gate_and_up_projs", "gate_up_proj_bias"):
        parameters[name] = np.concatenate(np.split(parameters[name], 2, axis=-1)[::-1], axis=-1)
    return {"parameters": parameters}


def other_layout(problem):
    return {"config": replace(problem.config, expert_activation="quick_geglu")}


def free_of_clamps(problem):
    return {"config": replace(problem.config, activation_limit=0.0)}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("mistake", [swapped, other_layout, free_of_clamps])
def test_within_of_a_wrong_meaning_is_false_in_every_dtype(mistake, dtype):
    problem = Experts(dtype, expert_activation="swigluoai")
    verdict = problem.verdict(problem.run(Rounding(dtype), **mistake(problem)))
    assert not verdict["y"] and not verdict["dx"] and not verdict["down_projs"]


@pytest.mark.parametrize("dtype", LOW)
def test_within_of_an_unweighted_down_bias_is_false_in_every_dtype(dtype):
    """The original once added K times the bias instead of its weighted sum."""
    problem = Experts(dtype)
    found = problem.run(Rounding(dtype))
    bias = problem.parameters["down_proj_bias"]
    missing = np.where(problem.mask[:, None, None], (1 - problem.weights[..., None]) * bias[problem.ids], 0.0)
    assert not problem.verdict(found | {"y": found["y"] + missing.sum(1)})["y"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_within_of_one_routing_weight_off_by_five_percent_is_false(dtype):
    problem = Experts(dtype)
    assert not problem.verdict(problem.run(Rounding(dtype), **wrong_weight(problem)))["y"]


# bfloat16 rounds by up to 0.4 % at each of six steps, so that 5 % in a quarter of the rows is near its bound.
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.05), ("float16", 0.05), ("bfloat16", 0.1)])
def test_within_of_one_expert_off_by_a_share_is_false(dtype, share):
    problem = Experts(dtype)
    verdict = problem.verdict(problem.run(Rounding(dtype), **wrong_matrix(problem, share)))
    assert not verdict["y"] and not verdict["gate_and_up_projs"]


@pytest.mark.parametrize("dtype", LOW)
def test_within_of_one_element_off_is_false_by_the_largest_bound(dtype):
    problem = Experts(dtype)
    exact = problem.run()
    limit = bounds(problem.run, exact, dtype)["y"]
    wrong = exact["y"].copy()
    wrong[0, 0] += 1.5 * limit.largest
    assert not within(wrong, exact["y"], limit)


# ----------------------------------------------------------------------------------------------------------- numbers

LIMIT = Bound(norm=1.0, largest=0.5, scale=2.0)


@pytest.mark.parametrize(
    ("value", "inside"),
    [
        ([0.5, 0.5], True),
        ([0.6, 0.0], False),  # largest
        ([0.5] * 5, False),  # norm
        ([np.nan, 0.0], False),
        ([np.inf, 0.0], False),
        ([], True),
    ],
    ids=str,
)
def test_within_asks_for_both_bounds(value, inside):
    assert within(np.array(value), np.zeros(len(value)), LIMIT) is inside


@pytest.mark.parametrize(
    ("value", "exact", "error"),
    [
        ([1.0, 1.0], [1.0, 1.0], 0.0),
        ([1.1, 0.0], [1.0, 0.0], 0.1),
        ([0.0], [0.0], 0.0),
        ([1e-30], [0.0], np.inf),
        ([np.nan], [1.0], np.inf),
        ([], [], 0.0),
    ],
    ids=str,
)
def test_relative_error_is_of_the_norms(value, exact, error):
    assert relative_error(np.array(value), np.array(exact)) == pytest.approx(error)


def test_bound_relative_to_nothing_is_infinite_unless_zero():
    assert LIMIT.relative() == 0.5
    assert Bound(norm=1.0, largest=1.0, scale=0.0).relative() == np.inf
    assert Bound(norm=0.0, largest=0.0, scale=0.0).relative() == 0.0


def test_bounds_of_more_samples_and_a_factor_scale():
    problem = Experts("float32")
    exact = problem.run()
    once = bounds(problem.run, exact, "float32", factor=1.0)
    assert bounds(problem.run, exact, "float32")["y"].norm == pytest.approx(tolerance.FACTOR * once["y"].norm)
