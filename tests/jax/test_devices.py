"""Which device a computation runs on; and several. JAX fixes their number when it starts: interpreters of their own."""

import jax
import jax.numpy as jnp
import pytest

from moebius.jax_frontend import matmul

PREAMBLE = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moebius.core import MoEConfig, ShapeError
from moebius.jax_frontend import MoE, grouped_matmul
from moebius.jax_frontend.checks import check_devices
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
"""

IN_SHARD_MAP = """
config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32",
                   expert_bias=True, softmax_before_topk=True, aux_loss_coeff=0.1)
graph, weights, rest = nnx.split(MoE(config, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)), nnx.Param, ...)
weights = jax.tree.map(lambda leaf: normal(*leaf.shape) * 0.4, weights)
x = normal(4, 5, 8)

def apply(weights, x):
    return nnx.merge(graph, weights, rest, copy=True)(x)

def halves(weights, x):  # the auxiliary loss is that of each device's own tokens
    return (apply(weights, x[:2]) ** 2).sum() + (apply(weights, x[2:]) ** 2).sum()

def sharded(weights, x, check_vma):
    run = jax.shard_map(apply, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma)
    return (run(weights, x) ** 2).sum()

wanted = jax.jit(jax.grad(halves, (0, 1)))(weights, x)
for check_vma in (True, False):
    found = jax.jit(jax.grad(partial(sharded, check_vma=check_vma), (0, 1)))(weights, x)
    jax.tree.map(close, found, wanted)
"""

MIXED = """
here, there = (jax.device_put(jnp.ones((2, 3)), device) for device in jax.devices())
check_devices(x=here, free=jnp.ones(2))
try:
    check_devices(x=here, weights=there)
except ShapeError as error:
    assert "x on " in str(error) and "weights on " in str(error) and "jax.device_put" in str(error)
else:
    raise AssertionError("nothing was raised")
"""


def test_moe_inside_shard_map_has_the_gradients_of_the_whole_with_and_without_check_vma(run_alone):
    run_alone(PREAMBLE + IN_SHARD_MAP, XLA_FLAGS="--xla_force_host_platform_device_count=2")


def test_arrays_committed_to_different_devices_are_named(run_alone):
    run_alone(PREAMBLE + MIXED, XLA_FLAGS="--xla_force_host_platform_device_count=2")


class Device:
    """What JAX would say of a device that is not here."""

    def __init__(self, platform, capability=None):
        self.platform, self.compute_capability = platform, capability


@pytest.mark.parametrize(
    "device, wanted",
    [
        (Device("gpu", "9.0"), ("cuda", (9, 0))),
        (Device("gpu", "gfx942"), ("rocm", None)),
        (Device("tpu"), ("tpu", None)),
    ],
    ids=["nvidia", "amd", "tpu"],
)
def test_device_of_something_traced_is_that_of_jax_default_device(monkeypatch, device, wanted):
    monkeypatch.setattr(matmul, "get_default_device", lambda: device)
    seen = []
    jax.make_jaxpr(lambda x: seen.append(matmul.device_of(x)) or x)(jnp.ones(2))
    assert seen == [wanted]
    assert matmul.device_of(jnp.ones(2)) == ("cpu", None)


def test_device_of_something_traced_under_a_mesh_is_that_of_the_mesh(monkeypatch):
    monkeypatch.setattr(matmul, "get_default_device", lambda: Device("gpu", "9.0"))
    seen = []
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        jax.make_jaxpr(lambda x: seen.append(matmul.device_of(x)) or x)(jnp.ones(2))
    assert seen == [("cpu", None)]
