"""The noise model: its values are the reference's, its variances what correct runs show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

# isort: split
import problems

from moebius.compare.judge import judge
from moebius.compare.noise import Model, Noisy
from moebius.compare.noise.layer import accumulated
from moebius.compare.noise.noisy import rounding
from moebius.compare.sides.answer import Desk
from moebius.compare.verdict import THEORY
from moebius.core import reference
from moebius.core.stages import GRADIENT

SIXTEEN = ("bfloat16", "float16")


@pytest.fixture
def desk():
    with Desk() as desk:
        yield desk


def reference_of(p, ids_TK):
    """Every tensor of core.reference for these experts, under the names of the walk."""
    mask_T, parameters = np.ones(p.tokens, bool), {name: p.exact(name) for name in p.parameters}
    trace = reference.moe(p.x_TD, mask_T, parameters, p.config, ids_TK=ids_TK, correction_bias_E=p.correction_bias)
    dx_TD, grads = reference.moe_vjp(
        trace, p.x_TD, mask_T, parameters, p.config, p.dy_TD, correction_bias_E=p.correction_bias
    )
    e = trace.experts
    found = {
        "logits": trace.logits_TE,
        "weights": trace.routing.weights_TK,
        "latent": trace.latent_TD,
        "rows": e.permuted.rows_RD,
        "up": e.hidden_RU,
        "activation": e.act_RI,
        "down": e.out_RD,
        "combine": e.y_TD,
        "shared": trace.shared_TD,
        "output": trace.y_TD,
        "grad.x": dx_TD,
    }
    return found | {GRADIENT + name: value for name, value in grads.items()}


@pytest.mark.parametrize("name", problems.CONFIGS)
def test_walk_of_a_layer_repeats_the_reference_value_by_value(name):
    p = problems.problem(name, tokens=16)
    ids_TK = np.sort(reference.route(p.x_TD @ p.exact("gate.weight").T, p.config).ids_TK.astype(np.int64), axis=-1)
    due, seen = reference_of(p, ids_TK), set()
    for expected in accumulated(p, ids_TK):
        seen.add(expected.name)
        if expected.name in due:
            value = due[expected.name][expected.index]
            scale = np.abs(value).max(initial=0.0)
            np.testing.assert_allclose(expected.due.value, value, rtol=1e-10, atol=1e-12 * scale, err_msg=expected.name)
    assert {GRADIENT + parameter for parameter in p.parameters} | {"output", "grad.x"} <= seen


@pytest.mark.parametrize("name", problems.CONFIGS)
@pytest.mark.parametrize("dtype", (*SIXTEEN, "float32"))
def test_z_of_a_correct_layer_is_the_theory_in_16_bits_and_below_it_in_float32(name, dtype, desk):
    found = [judge(p, {"torch": problems.answer(p, "torch", desk)}) for p in four_seeds(name, dtype)]
    assert [layer.verdict for layer in found] == ["pass"] * 4, [layer.faults for layer in found]
    for row, (n, z_rms, z_max) in pool(found, "torch", "whole").items():
        assert z_rms < (0.6 if dtype == "float32" else THEORY + 0.06 + 2 / np.sqrt(n)), row
        assert z_max < 6.5, row
    step = pool(found, "torch", "step")
    for row, (n, z_rms, z_max) in step.items():
        assert z_rms < THEORY + 0.04 + 2 / np.sqrt(n), row
        assert z_max < 5, row
    for row in ("activation", "grad.up", "grad.experts.down_projs") if dtype in SIXTEEN else ():
        zeros = 0.3 if name == "latent" else 0.03  # relu2 gives zeros, which nothing moves
        assert abs(step[row][1] - THEORY) < zeros, row


@pytest.mark.parametrize("dtype", (*SIXTEEN, "float32"))
def test_z_of_the_flax_layer_is_the_same_and_its_pair_with_torch_lower(dtype, desk):
    found = [
        judge(p, {side: problems.answer(p, side, desk) for side in ("torch", "flax")})
        for p in four_seeds("gpt_oss", dtype)
    ]
    assert [layer.verdict for layer in found] == ["pass"] * 4, found[0].faults
    whole = {column: pool(found, column, "whole") for column in ("torch", "flax", "torch~flax")}
    for row in whole["torch"]:
        limit = 0.6 if dtype == "float32" else THEORY + 0.1
        assert whole["flax"][row][1] < limit and whole["torch~flax"][row][1] < limit, row


def four_seeds(name, dtype):
    return [problems.problem(name, dtype, seed) for seed in range(4)]


def pool(layers, column, kind):
    """row -> (elements, z_rms, z_max) over several runs."""
    found = {}
    for row in layers[0].rows:
        scores = [getattr(layer.row(row.name), kind)[column] for layer in layers]
        n = sum(score.n for score in scores)
        z_rms = np.sqrt(sum(score.n * score.z_rms**2 for score in scores) / n)
        found[row.name] = n, float(z_rms), max(score.z_max for score in scores)
    return found


@pytest.mark.parametrize("dtype", (*SIXTEEN, "float32"))
def test_rounding_of_log_uniform_values_has_the_theoretical_z(dtype):
    exact = 2.0 ** np.random.default_rng(0).uniform(-8, 8, 200_000)
    stored = torch.from_numpy(exact).to(getattr(torch, dtype)).double().numpy()
    z = (stored - exact) / np.sqrt(rounding(exact, dtype))
    assert abs(np.sqrt((z**2).mean()) - THEORY) < 0.005
    assert np.abs(z).max() <= np.sqrt(3) * 1.001


def test_rounding_of_subnormal_float16_is_half_their_distance():
    exact = np.random.default_rng(0).uniform(0, 1e-6, 100_000)
    stored = torch.from_numpy(exact).half().double().numpy()
    z = (stored - exact) / np.sqrt(rounding(exact, "float16"))
    assert 0.9 < np.sqrt((z**2).mean()) < 1.1


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["terms that average out", "terms that add up"])
@pytest.mark.parametrize("length", [64, 2048])
def test_dot_summed_one_by_one_in_float32_stays_within_its_deviation(length, shift):
    rng = np.random.default_rng(0)
    a = (rng.normal(size=(40, length)) + shift).astype(np.float32)
    b = (rng.normal(size=(length, 40)) + shift).astype(np.float32)
    found = np.zeros((40, 40), np.float32)
    for k in range(length):  # the longest chain of roundings that any backend may have
        found = found + a[:, k : k + 1] * b[k : k + 1]
    due = Model.of("float32").dot(Noisy(a.astype(np.float64)), Noisy(b.astype(np.float64)))
    z = (found - due.value) / np.sqrt(due.variance)
    assert 0.1 < np.sqrt((z**2).mean()) < 1.0
    assert np.abs(z).max() < 4


def test_a_common_error_of_a_row_is_carried_whole_through_a_sum():
    model, rng = Model.of("float32"), np.random.default_rng(0)
    value, weight = rng.uniform(1, 2, (3, 500)), rng.uniform(1, 2, (500, 4))
    common = np.full(3, 1e-6)
    out = model.dot(Noisy(value, None, common), Noisy(weight))
    np.testing.assert_allclose(out.variance, 1e-6 * (value @ weight) ** 2, rtol=1e-3)
    lost = model.dot(Noisy(value, Noisy(value, None, common).variance), Noisy(weight))
    assert (lost.variance < 0.01 * out.variance).all()


def test_noise_of_routing_weights_matches_perturbed_logits():
    p, rng = problems.problem("geglu"), np.random.default_rng(1)
    logits = rng.normal(size=(32, 16))
    ids = reference.route(logits, p.config).ids_TK
    from moebius.compare.noise import route

    due = route.weights(Model.of("float64"), Noisy(logits, np.full(logits.shape, 1e-8)), ids, p.config, None)
    draws = [
        reference.route(logits + 1e-4 * rng.normal(size=logits.shape), p.config, ids_TK=ids).weights_TK
        for _ in range(400)
    ]
    np.testing.assert_allclose(np.std(draws, axis=0), np.sqrt(due.variance), rtol=0.25)


def test_noise_of_the_logits_gradient_matches_perturbed_logits_and_gradients():
    p, rng = problems.problem("geglu"), np.random.default_rng(1)
    logits, dweights = rng.normal(size=(8, 16)), rng.normal(size=(8, 4))
    ids = reference.route(logits, p.config).ids_TK
    from moebius.compare.noise import route

    noisy = Noisy(logits, np.full(logits.shape, 1e-8)), Noisy(dweights, np.full(dweights.shape, 1e-8))
    due = route.logits_gradient(Model.of("float64"), noisy[0], ids, p.config, noisy[1], None)
    draws = [
        reference.route_vjp(
            logits + 1e-4 * rng.normal(size=logits.shape), p.config, ids, dweights + 1e-4 * rng.normal(size=ids.shape)
        )
        for _ in range(800)
    ]
    chosen = np.take_along_axis(np.std(draws, axis=0), ids.astype(np.int64), axis=-1)
    np.testing.assert_allclose(
        chosen, np.take_along_axis(np.sqrt(due.variance), ids.astype(np.int64), axis=-1), rtol=0.2
    )


def gained(gain, dtype="float32", name="swiglu", **changes):
    """A problem with parameters so many times larger than those of unit gain."""
    p = problems.problem(name, dtype, n_routed_experts=8, dim=64, moe_inter_dim=48, **changes)
    return replace(p, parameters={key: value * gain for key, value in p.parameters.items()})


@pytest.mark.parametrize("changes", [{}, {"softmax_before_topk": True}], ids=str)
def test_a_correct_layer_of_large_logits_passes(changes, desk):
    """Rounding exp's argument counts in the gradient as in the weights: here logits reach 40."""
    p = gained(1.5, **changes)
    p = replace(p, parameters={**p.parameters, "gate.weight": p.parameters["gate.weight"] * 8})
    layer = judge(p, {"torch": problems.answer(p, "torch", desk)})
    assert layer.verdict == "pass", layer.faults


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_correct_layer_whose_sigmoid_vanishes_passes(dtype, desk):
    """Below -88 exp overflows in float32 and the sigmoid is zero; the reference's is not."""
    p = gained(1.0, dtype)
    p = replace(
        p, parameters={**p.parameters, "experts.gate_and_up_projs": p.parameters["experts.gate_and_up_projs"] * 40}
    )
    answer = problems.answer(p, "torch", desk)
    assert answer.tensors["up"].min() < -100
    layer = judge(p, {"torch": answer})
    assert {row.name: row.verdict for row in layer.rows if row.name in ("activation", "grad.up")} == {
        "activation": "pass",
        "grad.up": "pass",
    }


@pytest.mark.parametrize("shift", [-0.5, -0.6, 0.5])
def test_a_correct_layer_of_weights_that_cancel_against_the_bias_passes(shift, desk):
    p = problems.problem(
        "swiglu",
        score_func="sigmoid",
        router_weight_uses_score_correction_bias=True,
        force_e_score_correction_bias=True,
    )
    p = replace(p, correction_bias_E=torch.full((16,), shift))
    layer = judge(p, {"torch": problems.answer(p, "torch", desk)})
    assert layer.verdict == "pass", layer.faults
