"""The StableHLO that JAX lowers for CUDA: what a machine without a GPU can say of the program that one compiles."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from moebius.core import MoEConfig, layout
from moebius.jax_frontend import MoE, experts
from moebius.jax_frontend.dispatch_allgather import AllGather
from moebius.jax_frontend.dispatch_alltoall import AllToAll
from moebius.jax_frontend.dispatch_ragged import RaggedAllToAll

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, expert_bias=True)
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
rules = pytest.mark.parametrize("double_backward", [False, True], ids=["lean", "double_backward"])


def array(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(run, *args, platform="cuda"):
    """The StableHLO of `run` for a platform, whatever device there is."""
    return jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def gradients(backend, dtype, double_backward, platform="cuda"):
    """Of the experts: the text of output and all gradients together."""
    parameters = {row.name: array(row.shape, dtype) for row in layout.experts(CONFIG)}
    mask, ids = array((12,), "bool"), array((12, 2), "int32")

    def run(parameters, x, weights, mask, ids):
        def call(*floats):
            settings = {"config": CONFIG, "backend": backend, "double_backward": double_backward}
            return experts(floats[0], floats[1], mask, floats[2], ids, **settings)

        y, pull = jax.vjp(call, parameters, x, weights)
        return y, pull(jnp.ones_like(y))

    return lowered(run, parameters, array((12, 16), dtype), array((12, 2)), mask, ids, platform=platform)


def products(text):
    """The lines of matrix products."""
    return [line for line in text.splitlines() if re.search(r"dot_general|ragged_dot", line)]


@dtypes
@rules
def test_experts_with_ragged_dot_lower_for_cuda_to_ragged_dots_alone(dtype, double_backward):
    """Which XLA rewrites by its flags; nothing is made dense before it sees it."""
    found = products(gradients("ragged_dot", dtype, double_backward))
    assert len(found) >= 6 and all("chlo.ragged_dot" in line for line in found)
    assert all(line.count("precision HIGHEST") == 2 for line in found)


def test_experts_with_ragged_dot_lower_for_a_cpu_to_dense_products():
    found = products(gradients("ragged_dot", "float32", False, platform="cpu"))
    assert found and not any("ragged_dot" in line for line in found)


@dtypes
@rules
def test_experts_with_the_loop_lower_for_cuda_to_loops_over_products_of_one_matrix(dtype, double_backward):
    text = gradients("loop", dtype, double_backward)
    found = products(text)
    assert text.count("stablehlo.while") >= 6 and len(found) >= 5
    kind = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    assert all(
        re.search(rf": \(tensor<\d+x\d+x{kind}>, tensor<\d+x\d+x{kind}>\) -> tensor<\d+x\d+xf32>", x) for x in found
    )
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in found)


@pytest.mark.parametrize("backend", ["loop", "ragged_dot"])
def test_experts_lower_for_cuda_without_a_call_to_the_host(backend):
    text = gradients(backend, "bfloat16", False)
    assert not re.search("callback|infeed|outfeed|@Sharding|host", text)


def test_moe_in_training_lowers_for_cuda():
    config = MoEConfig(
        n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, n_shared_experts=1, aux_loss_coeff=0.1
    )
    module = nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)

    def run(state, x, padding):
        return jax.grad(lambda s: nnx.merge(graph, s, copy=True)(x, padding).sum().astype("float32"), allow_int=True)(
            state
        )

    text = lowered(run, state, array((2, 6, 16), "bfloat16"), array((2, 6), "bool"))
    assert "stablehlo.while" in text and "callback" not in text


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_ragged_all_to_all_in_shard_map_lowers_for_cuda(gradient, check_vma):
    """The collective that moves rows between ranks exists in this JAX, with its gradient; XLA has none on a CPU."""
    mesh = AbstractMesh((4,), ("expert",), axis_types=(AxisType.Auto,))

    def exchange(rows, out, *offsets_and_sizes):
        return jax.lax.ragged_all_to_all(rows, out, *offsets_and_sizes, axis_name="expert")

    run = jax.shard_map(exchange, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=check_vma)
    args = [array((32, 8), "bfloat16")] * 2 + [array((16,), "int32")] * 4
    taken = jax.grad(lambda *args: run(*args).sum().astype("float32")) if gradient else run
    assert len(re.findall(r"custom_call @ragged_all_to_all", lowered(taken, *args))) == 1


# Collectives of output and all gradients: ids, weights and tokens go out and outputs home, and three gradients go back.
COLLECTIVES = {
    "AllGather": {"all_gather": 4, "all_to_all": 3},
    "AllToAll": {"all_to_all": 7},
    "RaggedAllToAll": {"custom_call @ragged_all_to_all": 7, "all_gather": 1},  # and how many there are
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_experts_over_devices_lower_for_cuda_to_the_collectives_of_their_dispatcher_alone(name):
    mesh, parameters = AbstractMesh((4,), ("ep",), axis_types=(AxisType.Auto,)), layout.experts(CONFIG)
    dispatcher = {"AllGather": AllGather, "AllToAll": AllToAll, "RaggedAllToAll": RaggedAllToAll}[name]("ep")
    over = jax.shard_map(
        partial(experts, config=CONFIG, backend="loop", dispatcher=dispatcher),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )

    def both(parameters, x, mask, weights, ids):
        y, pull = jax.vjp(lambda p, x, w: over(p, x, mask, w, ids), parameters, x, weights)
        return y, pull(jnp.ones_like(y))

    own = {row.name: array(row.shape, "bfloat16") for row in parameters}
    text = lowered(
        both, own, array((12, 16), "bfloat16"), array((12,), "bool"), array((12, 2)), array((12, 2), "int32")
    )
    found = Counter(re.findall(r"custom_call @ragged_all_to_all|(?<=stablehlo\.)(?:all_\w+|reduce_scatter)", text))
    assert found == COLLECTIVES[name] and "callback" not in text
