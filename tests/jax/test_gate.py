"""The gate as an NNX module: precision, what it records, and what transformations carry out of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moebius.core import ConfigError, DTypeError, MoEConfig, reference
from moebius.core.vectors import compute, load
from moebius.jax_frontend import FakeBalancedGate, Gate, set_aux_loss_scale
from moebius.jax_frontend.weights import CorrectionBias

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 16, "moe_inter_dim": 4, "dtype": "float32"}
BALANCED = MoEConfig(**SIZES, score_func="sigmoid", gate_bias_update_factor=0.1)
WITH_LOSS = MoEConfig(**SIZES, aux_loss_coeff=0.5, softmax_before_topk=True)


@pytest.fixture(scope="module")
def gate_of(build):
    """gate_of(config, ...): a new gate."""
    return partial(build, Gate)


def tokens(dtype="float32", n=10):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, 16)), dtype), jnp.arange(n) != 3


@pytest.mark.parametrize("case", [case for case in load() if case.kind == "gate"][::4], ids=lambda case: case.name)
def test_gate_agrees_with_the_golden_vectors(gate_of, agree, case):
    gate = gate_of(case.config)
    for name, value in case.parameters.items():
        getattr(gate, name)[...] = jnp.float32(value)
    if "correction_bias" in case.inputs:
        gate.e_score_correction_bias[...] = jnp.float32(case.inputs["correction_bias"])
    gate.track_load = True
    graph, parameters, rest = nnx.split(gate, nnx.Param, ...)
    x, dweights = jnp.float32(case.inputs["x"]), jnp.float32(case.inputs["dweights"])
    mask = jnp.asarray(case.inputs["token_mask"])

    @jax.jit
    def run(parameters, x):
        def call(parameters, x):
            module = nnx.merge(graph, parameters, rest, copy=True)
            weights, ids, _ = module(x, mask, n_sequences=int(case.inputs.get("n_sequences", 1)))
            return weights, (ids, module.last_load[...])

        weights, pull, recorded = jax.vjp(call, parameters, x, has_aux=True)
        return weights, recorded, pull(dweights)

    weights, (ids, last_load), (grads, dx) = run(parameters, x)
    np.testing.assert_array_equal(ids, case.outputs["ids"])
    np.testing.assert_array_equal(last_load, case.outputs["load"])
    found = {f"d{path[-1]}": leaf[...] for path, leaf in nnx.to_flat_state(grads)} | {"weights": weights, "dx": dx}
    agree(found, lambda arithmetic: {name: compute(case, arithmetic)[name] for name in found}, "float32")


@pytest.mark.parametrize("precision", [None, "float32"])
@pytest.mark.parametrize("fp32", [False, True])
def test_gate_returns_weights_in_x_dtype_unless_told_float32(gate_of, precision, fp32):
    gate = gate_of(MoEConfig(**SIZES, router_weights_fp32=fp32), precision)
    weights, indices, loss = jax.eval_shape(gate, *tokens("bfloat16"))
    assert weights.dtype == (jnp.float32 if fp32 else jnp.bfloat16)
    assert indices.dtype == jnp.int32 and loss is None


def test_gate_precision_decides_where_bfloat16_logits_round(gate_of):
    config = MoEConfig(**SIZES, router_weights_fp32=True)
    coarse, fine = gate_of(config), gate_of(config, "float32")
    x, mask = tokens("bfloat16")
    exact = reference.gate(np.asarray(x, np.float64), {"weight": np.asarray(fine.weight[...], np.float64)}, config)[1]
    error = [np.abs(np.asarray(gate(x, mask)[0]) - exact.weights_TK).max() for gate in (fine, coarse)]
    assert error[0] < 1e-6 < error[1]


def test_gate_stores_the_router_apart_and_its_correction_bias_in_float32(gate_of):
    gate = gate_of(MoEConfig(**{**SIZES, "dtype": "bfloat16"}, gate_dtype="float32"))
    assert gate.weight.dtype == jnp.float32
    gate = gate_of(BALANCED, param_dtype="bfloat16")
    assert gate.weight.dtype == jnp.bfloat16 and gate.e_score_correction_bias.dtype == jnp.float32


def test_gate_keeps_sharding_metadata_without_a_mesh(gate_of):
    gate = gate_of(WITH_LOSS, kernel_metadata={"out_sharding": ("expert", None)})
    spec = nnx.get_partition_spec(nnx.state(gate, nnx.Param))["weight"].get_value()
    assert spec == jax.sharding.PartitionSpec("expert", None)
    np.testing.assert_array_equal(gate(*tokens())[0], gate_of(WITH_LOSS)(*tokens())[0])


@pytest.mark.parametrize("kind", [Gate, FakeBalancedGate])
def test_gates_take_numpys_float64_without_a_warning_where_jax_has_none(gate_of, kind):
    gate, (x, mask) = gate_of(WITH_LOSS) if kind is Gate else kind(WITH_LOSS, noise=0.5), tokens()
    weights, ids, _ = gate(np.asarray(x, np.float64), np.asarray(mask))
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(ids, gate(x, mask)[1])


def test_gate_state_is_no_parameter(gate_of):
    gate = gate_of(BALANCED)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(gate, nnx.Param))] == [("weight",)]
    assert [path for path, _ in nnx.to_flat_state(nnx.state(gate, CorrectionBias))] == [("e_score_correction_bias",)]
    assert gate_of(MoEConfig(**SIZES)).e_score_correction_bias is None


def test_gate_accumulates_the_load_in_training_and_train_and_eval_switch_it(gate_of):
    gate = gate_of(BALANCED)
    x, mask = tokens()
    gate(x, mask), gate(x, mask)
    assert gate.last_load[...].sum() == 18 and gate.cumulative_load[...].sum() == 36
    gate.eval()
    gate(x, mask)
    assert gate.deterministic and gate.cumulative_load[...].sum() == 36
    gate.train()
    gate(x, mask)
    assert gate.cumulative_load[...].sum() == 54


@pytest.mark.parametrize("jitted", [False, True])
def test_update_bias_moves_the_bias_and_clears_the_load_also_under_nnx_jit(gate_of, jitted):
    gate = gate_of(BALANCED)
    x, mask = tokens()
    gate(x, mask)
    load = np.asarray(gate.cumulative_load[...])
    update = nnx.jit(Gate.update_bias) if jitted else Gate.update_bias
    update(gate)
    wanted = reference.updated_correction_bias(np.zeros(8), load, 0.1)
    np.testing.assert_allclose(gate.e_score_correction_bias[...], wanted, rtol=1e-6)
    assert not gate.cumulative_load[...].any()
    update(gate)  # no load: balanced
    np.testing.assert_allclose(gate.e_score_correction_bias[...], wanted, rtol=1e-6)


def test_update_bias_without_a_factor_says_so(gate_of):
    with pytest.raises(ConfigError, match="gate_bias_update_factor=0"):
        gate_of(MoEConfig(**SIZES, score_func="sigmoid", force_e_score_correction_bias=True)).update_bias()


def test_gate_records_under_nnx_jit_and_without_a_second_trace(gate_of):
    gate, seen = gate_of(BALANCED), []

    @nnx.jit
    def run(gate, x, mask):
        seen.append(None)
        return gate(x, mask)[1]

    x, mask = tokens()
    for _ in range(3):
        ids = run(gate, x, mask)
    assert len(seen) == 1 and gate.cumulative_load[...].sum() == 54
    wanted = reference.expert_load(np.asarray(ids), np.asarray(mask), 8)
    np.testing.assert_array_equal(gate.last_load[...], wanted)


def test_gate_that_records_nothing_can_be_closed_over_by_jit(gate_of):
    x, mask = tokens()
    for gate in (gate_of(MoEConfig(**SIZES)), gate_of(BALANCED), gate_of(WITH_LOSS)):
        gate.eval()
        jax.jit(lambda x, gate=gate: gate(x, mask)[0])(x)
        assert not gate.last_load[...].any()


def test_gate_tracks_the_load_in_eval_when_asked(gate_of):
    gate = gate_of(MoEConfig(**SIZES))
    gate.eval()
    gate.track_load = True
    gate(*tokens())
    assert gate.last_load[...].sum() == 18 and not gate.cumulative_load[...].any()


def test_gate_aux_loss_reaches_the_weight_through_weights_that_nobody_uses(gate_of):
    gate, (x, mask) = gate_of(WITH_LOSS), tokens()

    @nnx.jit
    def gradients(gate):
        attached = nnx.grad(lambda gate: (gate(x, mask)[0] * 0).sum())(gate)
        alone = nnx.grad(lambda gate: 0.5 * gate(x, mask)[2])(gate)
        return attached.weight[...], alone.weight[...]

    attached, alone = gradients(gate)
    # The lone loss has its own gradient on top of nothing attached: weights are not part of it.
    np.testing.assert_allclose(attached, alone, rtol=1e-5, atol=1e-8)
    assert np.abs(alone).max() > 0
    _, ids, loss = gate(x, mask)
    scores = jax.nn.softmax(x @ gate.weight[...].T)
    load = reference.expert_load(np.asarray(ids), np.asarray(mask), 8)
    np.testing.assert_allclose(loss, reference.aux_loss(np.asarray(scores), load, np.asarray(mask), 2), rtol=1e-5)
    assert gate.last_aux_loss[...] == loss and loss.dtype == jnp.float32
    gate.eval()
    assert gate(x, mask)[2] is None


def test_gate_that_does_not_train_gives_its_weight_no_gradient_but_x_one(gate_of):
    gate, (x, mask) = gate_of(MoEConfig(**SIZES, train_gate=False, router_bias=True)), tokens()
    run = nnx.grad(lambda gate, x: (gate(x, mask)[0] ** 2).sum(), argnums=(0, 1))
    dgate, dx = nnx.jit(run)(gate, x)
    assert not dgate.weight[...].any() and not dgate.bias[...].any() and dx.any()


def test_gate_under_remat_counts_once_and_has_the_gradient_of_one_pass(gate_of):
    plain, kept, (x, mask) = gate_of(BALANCED), gate_of(BALANCED), tokens()
    loss = lambda gate: (gate(x, mask)[0] ** 2).sum()  # noqa: E731
    wanted, found = nnx.jit(nnx.grad(loss))(plain), nnx.jit(nnx.grad(nnx.remat(loss)))(kept)
    np.testing.assert_allclose(found.weight[...], wanted.weight[...], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(kept.cumulative_load[...], plain.cumulative_load[...])
    assert kept.cumulative_load[...].sum() == 18


def test_scale_of_the_losses_changes_without_a_second_trace(gate_of):
    gate, seen, (x, mask) = gate_of(MoEConfig(**SIZES, z_loss_coeff=0.5)), [], tokens()

    def loss(gate):
        seen.append(None)
        return (gate(x, mask)[0] * 0).sum()

    run = nnx.jit(nnx.grad(loss))
    before = run(gate).weight[...]
    set_aux_loss_scale(gate, 4.0)
    np.testing.assert_allclose(run(gate).weight[...], 4 * before, rtol=1e-6)
    assert len(seen) == 1 and gate.aux_loss_scale[...] == 4


def test_gate_with_other_losses_than_the_auxiliary_returns_none_and_records_no_load(gate_of):
    gate = gate_of(MoEConfig(**SIZES, z_loss_coeff=0.1, seq_aux_loss_coeff=0.1))
    assert gate(*tokens())[2] is None and not gate.last_load[...].any()
    assert gate.last_z_loss[...] > 0 < gate.last_seq_aux_loss[...] and gate.last_aux_loss[...] == 0
    gate.eval()
    before = gate.last_z_loss[...]
    gate(tokens()[0] * 2, tokens()[1])
    assert gate.last_z_loss[...] == before


def test_gate_says_the_step_of_its_bias_under_the_name_that_callers_of_the_original_ask_for(gate_of):
    assert gate_of(BALANCED).bias_update_factor == 0.1
    assert gate_of(MoEConfig(**SIZES)).bias_update_factor == FakeBalancedGate.bias_update_factor == 0.0


def test_fake_balanced_gate_cycles_over_the_experts_it_may_use():
    weights, ids, loss = FakeBalancedGate(MoEConfig(**SIZES), 3)(*tokens("bfloat16"))
    np.testing.assert_array_equal(ids, (np.arange(20).reshape(10, 2) % 5) + 3)
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.bfloat16 and loss is None
    np.testing.assert_array_equal(weights, np.full((10, 2), 0.5))


def test_fake_balanced_gate_with_noise_repeats_itself_and_names_an_expert_once():
    gate, (x, mask) = FakeBalancedGate(MoEConfig(**SIZES), 1, noise=0.5), tokens()
    run = jax.jit(partial(gate, token_mask=mask))
    weights, ids, _ = run(x)
    np.testing.assert_array_equal(ids, run(x)[1])
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, rtol=1e-5)
    assert all(len(set(row)) == 2 for row in np.asarray(ids).tolist()) and ids.min() >= 1 and ids.max() < 8
    assert np.isfinite(run(jnp.full_like(x, jnp.nan))[0]).all()


def test_fake_balanced_gate_of_no_array_says_so():
    with pytest.raises(DTypeError, match="x as a jax"):
        FakeBalancedGate(MoEConfig(**SIZES))([[0.0] * 16], jnp.ones(1, bool))


def test_fake_balanced_gate_that_skips_too_many_says_so():
    with pytest.raises(ConfigError, match="skip_first_n_experts=7"):
        FakeBalancedGate(MoEConfig(**SIZES), 7)
