"""The experts and the layer under JAX's transformations, by both derivative rules, against the float64 reference."""

import os
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sides import cached_problem, reference_experts

from moebius.core import BackendConfig, layout, reference
from moebius.core.vectors import compute, load
from moebius.jax_frontend import GroupedExperts, MoE, experts, load_parameters, parameters

SIZES = {"tokens": 10, "dim": 8, "inter": 4, "n_experts": 4, "expert_bias": True}
PROBLEMS = [cached_problem(seed=seed, **SIZES) for seed in range(3)]
CONFIG = PROBLEMS[0].config
PARAMETERS = tuple(PROBLEMS[0].parameters)
backends = pytest.mark.parametrize("backend", ["loop", "ragged_dot"])
rules = pytest.mark.parametrize("double_backward", [False, True], ids=["lean", "double_backward"])


def given(p, ids_dtype="int32"):
    """(parameters, x, weights, mask, ids, dy) of a problem."""
    weights = {name: jnp.float32(value) for name, value in p.parameters.items()}
    ids, mask = jnp.asarray(p.ids, ids_dtype), jnp.asarray(p.token_mask)
    return weights, jnp.float32(p.x), jnp.float32(p.weights), mask, ids, jnp.float32(p.dy)


def stacked(problems):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(given, problems))


def forward(double_backward, backend="loop"):
    """A function (parameters, x, weights, mask, ids) -> y."""

    def run(parameters, x, weights, mask, ids):
        settings = {"config": CONFIG, "backend": backend, "double_backward": double_backward}
        return experts(parameters, x, mask, weights, ids, **settings)

    return run


def train(run):
    """A function (parameters, x, weights, mask, ids, dy) -> output and gradients by name."""

    def both(parameters, x, weights, mask, ids, dy):
        y, pull = jax.vjp(lambda *floats: run(*floats, mask, ids), parameters, x, weights)
        grads, dx, dweights = pull(dy)
        return {"y": y, "dx": dx, "dweights": dweights, **grads}

    return both


def together(problems, summed, arithmetic):
    """The reference's answers to all, stacked; those that are `summed`, added."""
    answers = [reference_experts(p, arithmetic) for p in problems]
    return {name: (np.sum if name in summed else np.stack)([a[name] for a in answers], axis=0) for name in answers[0]}


# -------------------------------------------------------------------------------------------------------- the function


@backends
@rules
def test_experts_gradients_under_jit_are_the_references(agree, double_backward, backend):
    found = jax.jit(train(forward(double_backward, backend)))(*given(PROBLEMS[0]))
    agree(found, partial(reference_experts, PROBLEMS[0]), "float32")


@rules
@pytest.mark.parametrize(
    "axes, summed",
    [
        ((None, 0, 0, 0, 0), PARAMETERS),
        ((0, None, None, None, None), ("dx", "dweights")),
    ],
    ids=["tokens", "parameters"],
)
def test_experts_under_vmap_have_each_elements_output_and_the_gradients_of_what_is_shared_added_up(
    agree, double_backward, axes, summed
):
    one, batch = given(PROBLEMS[0]), stacked(PROBLEMS)
    args = [one[i] if axis is None else batch[i] for i, axis in enumerate((*axes, 0))]
    found = jax.jit(train(jax.vmap(forward(double_backward), axes)))(*args)
    shared = {
        name: getattr(PROBLEMS[0], name)
        for name, axis in zip(("parameters", "x", "weights", "token_mask", "ids"), axes, strict=True)
        if axis is None
    }
    agree(found, partial(together, [p.but(**shared) for p in PROBLEMS], summed), "float32")


@backends
def test_experts_gradients_under_vmap_are_each_elements_own(agree, backend):
    found = jax.jit(jax.vmap(train(forward(False, backend))))(*stacked(PROBLEMS))
    agree(found, partial(together, PROBLEMS, ()), "float32")


def chain(arithmetic):
    """The reference through three layers, each with its own parameters and routing: output and gradients."""
    x, traces, grads = PROBLEMS[0].x, [], []
    for p in PROBLEMS:
        traces.append(reference.experts(x, p.token_mask, p.weights, p.ids, p.parameters, CONFIG, arithmetic))
        x = traces[-1].y_TD
    dx = PROBLEMS[0].dy
    for p, trace in zip(PROBLEMS[::-1], traces[::-1], strict=True):
        dx, dweights, dparameters = reference.experts_vjp(trace, p.parameters, CONFIG, dx, arithmetic)
        grads.insert(0, {"dweights": dweights, **dparameters})
    return {"y": x, "dx": dx} | {name: np.stack([each[name] for each in grads]) for name in grads[0]}


@pytest.mark.parametrize(
    "double_backward, checkpointed, backend",
    [(False, False, "loop"), (False, True, "loop"), (True, True, "loop"), (False, True, "ragged_dot")],
    ids=["lean", "lean_checkpoint", "double_backward_checkpoint", "lean_checkpoint_ragged_dot"],
)
def test_experts_under_scan_over_stacked_layers_are_the_chain_of_layers(agree, double_backward, checkpointed, backend):
    batch, one = stacked(PROBLEMS), forward(double_backward, backend)

    def layers(parameters, x, weights, mask, ids):
        layer = lambda x, own: (one(own[0], x, *own[1:]), None)  # noqa: E731
        body = jax.checkpoint(layer) if checkpointed else layer
        return jax.lax.scan(body, x, (parameters, weights, mask, ids))[0]

    found = jax.jit(train(layers))(batch[0], jnp.float32(PROBLEMS[0].x), *batch[2:5], jnp.float32(PROBLEMS[0].dy))
    agree(found, chain, "float32")


@rules
def test_experts_of_other_token_counts_neither_trace_nor_compile_again(traces, double_backward):
    run, seen = traces(train(forward(double_backward)))
    weights, x, route_weights, mask, ids, dy = given(PROBLEMS[0])
    for routed in (ids, ids[::-1], jnp.full_like(ids, 3), jnp.full_like(ids, -1), jnp.arange(20).reshape(ids.shape)):
        for valid in (mask, ~mask, jnp.zeros_like(mask)):
            run(weights, x, route_weights, valid, routed.astype(jnp.int32), dy)
    assert len(seen) == run._cache_size() == 1


@pytest.mark.parametrize("double_backward, backend", [(False, "loop"), (True, "loop"), (False, "ragged_dot")])
def test_experts_train_in_donated_buffers(double_backward, backend):
    weights, *rest, dy = given(PROBLEMS[0])
    both = train(forward(double_backward, backend))

    def step(parameters, x, *others):
        found = both(parameters, x, *others)
        return {name: value - 0.5 * found[name] for name, value in parameters.items()}, found["y"]

    run = jax.jit(step, donate_argnums=(0, 1))
    kept = run.lower(weights, *rest, dy).compile().memory_analysis().alias_size_in_bytes
    assert kept >= sum(value.nbytes for value in weights.values())
    after, y = run(weights, *rest, dy)
    assert all(value.is_deleted() for value in (*weights.values(), rest[0]))
    exact = reference_experts(PROBLEMS[0])
    np.testing.assert_allclose(y, exact["y"], rtol=1e-4, atol=1e-5)
    for name, value in after.items():
        np.testing.assert_allclose(value, PROBLEMS[0].parameters[name] - 0.5 * exact[name], rtol=1e-4, atol=1e-5)


@backends
def test_experts_of_float32_with_64_bit_numbers_on_are_the_same_bit_for_bit(backend):
    both = train(forward(False, backend))
    wanted = jax.jit(both)(*given(PROBLEMS[0]))
    with jax.enable_x64(True):
        args = given(PROBLEMS[0], "int64")
        assert args[4].dtype == "int64"
        found = jax.jit(both)(*args)
    assert {str(value.dtype) for value in found.values()} == {"float32"}
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_experts_take_no_route_of_an_int64_id_that_int32_would_wrap_into_range(agree):
    ids = PROBLEMS[0].ids + np.where(np.arange(len(PROBLEMS[0].ids)) % 2, 0, 2**32)[:, None]
    with jax.enable_x64(True):
        found = jax.jit(train(forward(False)))(*given(PROBLEMS[0].but(ids=ids), "int64"))
    agree(found, partial(reference_experts, PROBLEMS[0].but(ids=np.where(ids < 4, ids, -1))), "float32")


IN_SHARD_MAP = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, PartitionSpec as P
from sides import problem, reference_experts
from moebius.jax_frontend import experts
p = problem(tokens=12, dim=8, inter=4, expert_bias=True)
exact = reference_experts(p)
weights = {name: jnp.float32(value) for name, value in p.parameters.items()}
tokens = jnp.float32(p.x), jnp.float32(p.weights), jnp.asarray(p.token_mask), jnp.asarray(p.ids, "int32")
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

def forward(parameters, x, routing_weights, mask, ids, double_backward):
    return experts(parameters, x, mask, routing_weights, ids, config=p.config, double_backward=double_backward)

for check_vma in (True, False):
    for double_backward in (False, True):
        run = jax.shard_map(partial(forward, double_backward=double_backward), mesh=mesh,
                            in_specs=(P(), *[P("data")] * 4), out_specs=P("data"), check_vma=check_vma)
        @jax.jit
        def both(parameters, x, routing_weights):
            y, pull = jax.vjp(lambda *floats: run(*floats, *tokens[2:]), parameters, x, routing_weights)
            return y, pull(jnp.float32(p.dy))
        y, (grads, dx, dweights) = both(weights, *tokens[:2])
        for name, value in {"y": y, "dx": dx, "dweights": dweights, **grads}.items():
            error = np.linalg.norm(value - exact[name]) / np.linalg.norm(exact[name])
            assert error < 1e-5, (check_vma, double_backward, name, error)
"""


def test_experts_in_shard_map_over_tokens_with_replicated_parameters_are_the_whole(run_alone):
    folders = [str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    flags = "--xla_force_host_platform_device_count=4"
    run_alone(IN_SHARD_MAP, XLA_FLAGS=flags, PYTHONPATH=os.pathsep.join(filter(None, folders)))


# --------------------------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("how", ["jit", "nnx.jit", "split_and_merge", "nnx.remat"])
def test_grouped_experts_under_nnx_have_the_references_gradients(agree, build, how):
    p = PROBLEMS[0]
    module = build(GroupedExperts, CONFIG, BackendConfig(double_backward=how == "jit"))
    load_parameters(module, p.parameters)
    _, x, weights, mask, ids, dy = given(p)
    graph, trained, rest = nnx.split(module, nnx.Param, ...)

    def loss(module, x, weights):
        call = nnx.remat(lambda m, *args: m(*args)) if how == "nnx.remat" else lambda m, *args: m(*args)
        y = call(module, x, mask, weights, ids)
        return (y * dy).sum(), y

    def by_state(trained, x, weights):
        return loss(nnx.merge(graph, trained, rest, copy=True), x, weights)

    if how == "split_and_merge":
        run, first = jax.jit(jax.grad(by_state, (0, 1, 2), has_aux=True)), trained
    else:
        run, first = (jax.jit if how == "jit" else nnx.jit)(nnx.grad(loss, argnums=(0, 1, 2), has_aux=True)), module
    (grads, dx, dweights), y = run(first, x, weights)
    named = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(grads)}
    agree({"y": y, "dx": dx, "dweights": dweights, **named}, partial(reference_experts, p), "float32")


CASE = next(case for case in load() if case.name == "moe-gpt_oss")


@cache
def moe():
    """(a golden layer's graph, its parameters, the rest)."""
    module = MoE(CASE.config, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    load_parameters(module, CASE.parameters)
    return nnx.split(module, nnx.Param, ...)


def apply(trained, x):
    graph, _, rest = moe()
    return nnx.merge(graph, trained, rest, copy=True)(x, jnp.asarray(CASE.inputs["padding_mask"]))


def twice(run):
    """`run` of two copies of the layer, which it maps over, with the first one's outcome."""
    return lambda trained, x: run(*jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), (trained, x)))


MOE = {
    "jit": apply,
    "checkpoint": jax.checkpoint(apply),
    "vmap": lambda trained, x: twice(jax.vmap(apply))(trained, x)[0],
    "scan": lambda trained, x: twice(lambda *both: jax.lax.scan(lambda c, one: (c, apply(*one)), 0, both)[1])(
        trained, x
    )[0],
}


@pytest.mark.parametrize("how", MOE)
def test_moe_under_a_transformation_has_the_golden_gradients(agree, how):
    x, dy = jnp.float32(CASE.inputs["x"]), jnp.float32(CASE.inputs["dy"])

    @jax.jit
    def run(trained, x):
        y, pull = jax.vjp(MOE[how], trained, x)
        return y, pull(dy)

    y, (grads, dx) = run(moe()[1], x)
    found = {"d" + ".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(grads)} | {"y": y, "dx": dx}
    agree(found, lambda arithmetic: {name: compute(CASE, arithmetic)[name] for name in found}, "float32")


def test_moe_of_other_tokens_and_paddings_neither_traces_nor_compiles_again(traces, build):
    module = build(MoE, CASE.config)
    run, seen = traces(jax.grad(lambda m, x, padding: (m(x, padding) ** 2).sum(), 1))
    rng = np.random.default_rng(0)
    for masked in (0.0, 0.5, 1.0):
        run(module, jnp.float32(rng.normal(size=(2, 4, 8))), jnp.asarray(rng.random((2, 4)) < masked))
    assert len(seen) == run._cache_size() == 1
    assert parameters(module).keys() == {row.name for row in layout.moe(CASE.config)}
