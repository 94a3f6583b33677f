"""The experts as one rule: the gradients of the steps that it stands for, what it keeps, and what it refuses."""

from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sides import cached_problem, expected, jax_array

from moebius.core import ConfigError, Unsupported
from moebius.core.activations import CONFIG_ACTIVATIONS
from moebius.core.config import REMATS
from moebius.core.tolerance import within
from moebius.jax_frontend import experts
from moebius.jax_frontend.dispatch import Sent
from moebius.jax_frontend.experts import steps
from moebius.jax_frontend.lean import lean

E, K, D, I, T = 4, 2, 16, 8, 23
# float16 takes bfloat16's path; tests/cross has it.
DTYPES = ("float64", "float32", "bfloat16")
# Summed in another order: blocks of rows instead of one row after the other.
BIASES = {"gate_up_proj_bias", "down_proj_bias"}
NAMES = jax.checkpoint_policies.save_only_these_names


def arguments(p):
    """(parameters, x, weights), (token_mask, ids), dy of a problem, as JAX arrays."""
    own = {name: jax_array(value, p.dtype) for name, value in p.parameters.items()}
    weights = jax_array(p.weights, "float64" if p.dtype == "float64" else "float32")
    return (
        (own, jax_array(p.x, p.dtype), weights),
        (jax_array(p.token_mask), jax_array(p.ids)),
        jax_array(p.dy, p.dtype),
    )


def call(p, routes, **settings):
    """experts as a function of what has a gradient: (parameters, x, weights) -> y."""
    mask, ids = routes
    return lambda own, x, weights: experts(own, x, mask, weights, ids, config=p.config, backend="loop", **settings)


@cache
def run(p, jit=False, **settings):
    """y and every gradient, by the names of the reference; op by op unless `jit`. Kept for who asks for the same."""
    given, routes, dy = arguments(p)

    def both(given, dy):
        y, pull = jax.vjp(call(p, routes, **settings), *given)
        grads, dx, dweights = pull(dy)
        return {"y": y, "dx": dx, "dweights": dweights, **grads}

    found = (jax.jit(both) if jit else both)(given, dy)
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def assert_same(found, wanted, but=frozenset()):
    assert found.keys() == wanted.keys()
    for name in found.keys() - but:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def assert_correct(p, found):
    exact, limits = expected(p)
    for name, value in exact.items():
        assert within(found[name], value, limits[name]), name


# ------------------------------------------------------------------------------------------------------- equal to steps
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*CONFIG_ACTIVATIONS, "swiglu_clamped"])
def test_lean_equals_the_steps_bit_for_bit_and_in_bias_gradients_agrees_with_reference(wide, activation, dtype):
    clamped = {"swiglu_limit": 0.5} if activation == "swiglu_clamped" else {}
    # Without biases the steps are those of every dtype, less two.
    for bias in (False, True) if dtype == "float32" else (True,):
        name = "swiglu" if clamped else activation
        p = cached_problem(tokens=T, dtype=dtype, expert_activation=name, expert_bias=bias, **clamped)
        with wide(dtype):
            found, wanted = run(p), run(p, double_backward=True)
        assert all(np.abs(value).max() > 0 for value in wanted.values())
        assert_same(found, wanted, but=BIASES)
        assert_correct(p, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("remat", REMATS)
def test_lean_gives_the_same_bits_whatever_it_computes_again(wide, remat, dtype):
    p = cached_problem(tokens=T, dtype=dtype, expert_activation="quick_geglu", expert_bias=True)
    with wide(dtype):
        assert_same(run(p, remat=remat), run(p))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", REMATS)
def test_lean_compiled_has_the_output_of_the_steps_and_the_gradients_of_the_reference(remat, dtype):
    p = cached_problem(tokens=T, dtype=dtype, expert_activation="swigluoai", expert_bias=True)
    found = run(p, jit=True, remat=remat)
    assert_same({"y": found["y"]}, {"y": run(p, jit=True, double_backward=True)["y"]})
    assert_correct(p, found)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("dtype, bias", list(product(DTYPES, [False, True])))
def test_lean_weighted_after_down_equals_the_steps_in_output_and_both_agree_with_reference(wide, dtype, bias, remat):
    p = cached_problem(tokens=T, dtype=dtype, expert_bias=bias, apply_router_weight_after_down=True)
    with wide(dtype):
        found, by_steps = run(p, remat=remat), run(p, double_backward=True)
    assert_same({"y": found["y"]}, {"y": by_steps["y"]})
    for answer in (found, by_steps):
        assert_correct(p, answer)


def situation(name, **settings):
    """The base problem, bent into the named situation."""
    p = cached_problem(tokens=T, expert_bias=True, **settings)
    if name in ("no_token", "one_token"):
        n = 0 if name == "no_token" else 1
        few = {field: getattr(p, field)[:n] for field in ("x", "token_mask", "weights", "ids", "dy")}
        return p.but(**(few | {"token_mask": np.ones(n, bool)}))
    ids = p.ids.copy()
    if name == "one_expert":
        ids[:] = [2, -1]
    elif name == "named_twice":
        ids[:, 1] = ids[:, 0]
    elif name == "no_route":
        ids[:] = [E, -1]
    return p.but(ids=ids)


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("name", ["no_token", "one_token", "one_expert", "named_twice", "no_route"])
def test_lean_in_a_situation_agrees_with_the_reference_in_every_remat(name, after):
    p = situation(name, apply_router_weight_after_down=after)
    wanted = run(p, double_backward=True)
    for remat in REMATS:
        found = run(p, remat=remat)
        assert_correct(p, found)
        assert_same(found, wanted, but=found.keys() - {"y"} if after else BIASES)


@cache
def one_masked():
    return cached_problem(tokens=T, expert_bias=True).but(token_mask=np.arange(T) != 3)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_lean_with_poison_in_a_masked_token_is_unchanged_bit_for_bit(poison, remat):
    clean = one_masked()
    x, weights, dy = clean.x.copy(), clean.weights.copy(), clean.dy.copy()
    x[3], weights[3], dy[3] = poison, poison, poison
    assert_same(run(clean.but(x=x, weights=weights, dy=dy), remat=remat), run(clean, remat=remat))


@pytest.mark.parametrize("name", sorted(BIASES))
def test_lean_with_nan_in_one_experts_bias_keeps_its_gradients_to_that_expert(name):
    p = cached_problem(tokens=T, expert_bias=True)
    parameters = {key: value.copy() for key, value in p.parameters.items()}
    parameters[name][1] = np.nan
    found = run(p.but(parameters=parameters))
    for key in p.parameters:
        assert np.isfinite(np.delete(found[key], 1, axis=0)).all(), key
    assert np.isnan(found["dweights"]).any() and np.isfinite(found["dweights"][(p.ids != 1).all(-1)]).all()


def test_lean_sums_bias_gradients_of_many_rows_an_expert():
    """Of one expert's rows a block, then of blocks, and again: three rounds."""
    p = cached_problem(tokens=3000, dim=4, inter=2, expert_bias=True)
    p = p.but(ids=np.where(p.ids == 1, 0, p.ids))
    found = run(p, jit=True)
    assert_correct(p, found)
    for name in BIASES:
        assert not found[name][1].any()


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lean_of_a_part_of_the_sum_is_promoted_and_has_the_gradients_of_the_steps(dtype, after):
    p = cached_problem(tokens=T, dtype=dtype, apply_router_weight_after_down=after)
    (own, x, weights), (_, ids), dy = arguments(p)
    dy = dy.astype(jnp.float32)

    def both(function):
        y, pull = jax.vjp(lambda *given: function(given[0], Sent(given[1], given[2], ids)), own, x, weights)
        return y, pull(dy)

    y, grads = both(lambda own, sent: lean(own, sent, p.config, "loop", partial=True))
    wanted_y, wanted = both(lambda own, sent: steps(own, sent, p.config, "loop", partial=True))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, wanted_y)
    if not after:
        jax.tree.map(np.testing.assert_array_equal, grads, wanted)


@pytest.mark.parametrize("which", range(3), ids=["parameters", "x", "weights"])
def test_lean_with_the_gradient_of_one_argument_alone_gives_the_same(which):
    p = cached_problem(tokens=T, expert_bias=True)
    given, routes, dy = arguments(p)
    scalar = lambda *given: (call(p, routes)(*given) * dy).sum()  # noqa: E731
    found, wanted = jax.grad(scalar, which)(*given), jax.grad(scalar, (0, 1, 2))(*given)[which]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# ------------------------------------------------------------------------------------------------------ what is refused
@cache
def scalars():
    """(the experts' sum as a function of x, the sum of its gradient, x)."""
    p = cached_problem(expert_bias=True)
    (own, x, weights), routes, _ = arguments(p)
    total = lambda x: call(p, routes)(own, x, weights).sum()  # noqa: E731
    return total, lambda x: jax.grad(total)(x).sum(), x


FORWARD = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jit_of_jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "jvp_of_jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "jvp_of_vmap": lambda f, x: jax.jvp(lambda x: jax.vmap(f)(x[None]), (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "hessian": lambda f, x: jax.hessian(f)(x),
}
REVERSE = {
    "grad": lambda f, x: jax.grad(f)(x),
    "jit_of_grad": lambda f, x: jax.jit(jax.grad(f))(x),
    "grad_of_jit": lambda f, x: jax.grad(jax.jit(f))(x),
}


@pytest.mark.parametrize("how", FORWARD)
def test_lean_refuses_forward_mode_and_names_the_switch(how):
    total, _, x = scalars()
    with pytest.raises(Unsupported, match="double_backward=True"):
        FORWARD[how](total, x)


@pytest.mark.parametrize("how", [name for name in (FORWARD | REVERSE) if name not in ("hessian", "jvp_of_vmap")])
def test_lean_refuses_the_gradient_of_its_gradient_and_names_the_switch(how):
    _, gradient, x = scalars()
    with pytest.raises(Unsupported, match="double_backward=True"):
        (FORWARD | REVERSE)[how](gradient, x)


def test_lean_lets_a_gradient_be_used_where_it_is_not_differentiated():
    total, _, x = scalars()
    penalised = lambda x: total(x) * jax.lax.stop_gradient(jax.grad(total)(x)).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(penalised)(x), jax.grad(total)(x) * jax.grad(total)(x).sum(), rtol=1e-4)


def test_experts_refuse_an_unknown_remat():
    p = cached_problem()
    given, routes, _ = arguments(p)
    with pytest.raises(ConfigError, match=r"remat='all'\n.*none.*act.*full"):
        call(p, routes, remat="all")(*given)


STEPWISE = {
    "double_backward=True": {"double_backward": True},
    "activation": {"activation": lambda hidden, weights: hidden[:, :6] * weights},
    "permute_backend='te'": {"permute_backend": "te"},
}


@pytest.mark.parametrize("why", STEPWISE)
def test_experts_refuse_a_remat_where_every_step_is_kept(why):
    p = cached_problem()
    given, routes, _ = arguments(p)
    with pytest.raises(ConfigError, match=rf"remat='full' with .*{why}"):
        call(p, routes, remat="full", **STEPWISE[why])(*given)


def test_experts_by_the_own_permute_named_keep_no_more_than_by_none():
    p = cached_problem()
    assert kept_bytes(p, permute_backend="xla") == kept_bytes(p)


# --------------------------------------------------------------------------------------------------------- what is kept
def kept_bytes(p, **settings):
    """Of what the backward pass holds beside the parameters, all of which it needs."""
    given, routes, _ = arguments(p)
    _, pull = jax.vjp(call(p, routes, **settings), *given)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) - sum(value.nbytes for value in given[0].values())


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_experts_keep_x_what_remat_says_and_integers_a_slot(dtype, bias, after):
    p = cached_problem(tokens=64, dtype=dtype, expert_bias=bias, apply_router_weight_after_down=after)
    rows, item = 64 * K, jnp.dtype(dtype).itemsize
    hidden, act = item * rows * 2 * I, item * rows * I
    # Two orders and a float32 weight a slot, with biases each row's expert too.
    least = item * 64 * D + 4 * rows * (4 if bias else 3) + 4 * E
    for remat, more in {"none": hidden + act, "act": hidden, "full": 0}.items():
        assert kept_bytes(p, remat=remat) == least + more
    assert kept_bytes(p, double_backward=True) > least + hidden + act


def test_backward_pass_reads_x_and_the_pre_activation_behind_a_barrier(equations):
    """Else XLA on a GPU finds the rows and the activation of the forward pass equal to these, and keeps them."""
    p = cached_problem(tokens=T)
    given, routes, dy = arguments(p)
    found = equations(jax.grad(lambda *given: (call(p, routes)(*given) * dy).sum()), *given)
    barriers = [{v.aval.shape for v in e.outvars} for e in found if e.primitive.name == "optimization_barrier"]
    assert any({(T, D), (T * K, 2 * I)} <= shapes for shapes in barriers)


@pytest.fixture
def counted(equations):
    """counted(names, remat, primitive): its equations in the gradient of a checkpointed function of the experts."""

    def count(names, remat, primitive, after=lambda y: y):
        p = cached_problem(expert_bias=True)
        given, routes, dy = arguments(p)
        inner = call(p, routes, remat=remat)
        kept = jax.checkpoint(lambda *given: after(inner(*given)), policy=NAMES(*names))
        found = equations(jax.grad(lambda *given: (kept(*given) * dy).sum(), (0, 1, 2)), *given)
        return sum(equation.primitive.name == primitive for equation in found)

    return count


@pytest.mark.parametrize(
    "names, remat, again",
    [
        ((), "none", 1),
        ((), "act", 1),
        ((), "full", 1),
        (("moe_hidden",), "none", 0),
        (("moe_hidden",), "act", 0),
        (("moe_hidden",), "full", 1),  # which does not look at it
    ],
)
def test_checkpoint_that_keeps_moe_hidden_runs_the_up_projection_once(counted, names, remat, again):
    assert counted(names, remat, "grouped_product") == 2 + again + 2


@pytest.mark.parametrize("names, again", [((), 2), (("moe_hidden",), 1), (("moe_hidden", "moe_y"), 0)])
def test_checkpoint_that_keeps_moe_y_too_runs_the_down_projection_once(counted, names, again):
    assert counted(names, "act", "grouped_product", after=jnp.sin) == 2 + again + 2


def test_checkpoint_that_keeps_moe_act_activates_once_less(counted):
    without = counted(("moe_hidden",), "none", "logistic")
    assert counted(("moe_hidden", "moe_act"), "none", "logistic") == without - 1


# ------------------------------------------------------------------------------------------------------ transformations
def transformed(plain):
    """name -> (transformed function, what its result is a multiple of)."""

    def scanned(own, x, weights):
        return jax.lax.scan(lambda total, _: (total + plain(own, x, weights), None), jnp.zeros_like(x), length=2)[0]

    def mapped(own, x, weights):
        return jax.vmap(plain, (None, 0, 0))(own, x[None], weights[None])[0]

    return {"remat": (jax.checkpoint(plain), 1), "scan": (scanned, 2), "vmap": (mapped, 1)}


@pytest.mark.parametrize("how", ["remat", "scan", "vmap"])
def test_lean_under_a_transformation_has_the_same_gradients(how):
    p = cached_problem(tokens=T, expert_bias=True)
    given, routes, dy = arguments(p)
    function, times = transformed(call(p, routes))[how]
    y, pull = jax.jit(lambda *given: jax.vjp(function, *given))(*given)
    grads, dx, dweights = jax.jit(pull)(dy)
    found = {"y": y, "dx": dx, "dweights": dweights, **grads}
    assert_correct(p, {name: np.asarray(value, np.float64) / times for name, value in found.items()})


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P
from moebius.core import MoEConfig, layout
from moebius.jax_frontend import experts
config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32", expert_bias=True)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
own = {row.name: normal(*row.shape) for row in layout.experts(config)}
x, weights, ids = normal(10, 8), normal(10, 2), jnp.asarray(rng.integers(-1, 5, (10, 2)), jnp.int32)
mask = jnp.arange(10) != 3
def loss(own, x, weights, run):
    return (run(own, x, mask, weights, ids) ** 2).sum()
grad = lambda run: jax.jit(jax.grad(partial(loss, run=run), (0, 1, 2)))(own, x, weights)
for remat in ("none", "act", "full"):
    run = partial(experts, config=config, remat=remat)
    wanted = grad(run)
    for check_vma in (True, False):
        specs = P(), P("data"), P("data"), P("data"), P("data")
        found = grad(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, wanted)
"""


def test_lean_inside_shard_map_adds_up_the_gradients_of_replicated_parameters(run_alone):
    run_alone(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2")
