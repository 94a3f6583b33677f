"""Which backend None means on a GPU that was measured: one for a whole layer, in both of its forms."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moebius.core import BackendConfig, MoEConfig, measured, registry
from moebius.core.dispatchers import routed_share
from moebius.core.registry import of_layer
from moebius.jax_frontend import GroupedExperts, experts, lean, matmul
from moebius.jax_frontend.matmul import choose

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="float32")
UP, DOWN = (4, 16, 16), (4, 8, 16)
RUN = measured.Run(
    frontend="jax", date="2026-01-01", device="G", capability=(9, 0), dtype="bfloat16", versions="v", command="c"
)


def point(tokens, **tflops):
    sizes = {"n_experts": 4, "k": 2, "dim": 16, "inter_dim": 8, "tokens": tokens}
    return measured.Point(run=RUN, layer="layer", tflops={name: (one, one) for name, one in tflops.items()}, **sizes)


@pytest.fixture
def hopper(monkeypatch):
    """The CPU in the guise of a Hopper GPU with every package, on which "triton" wins from 16 rows an expert on.

    Every backend computes as "loop" does; `used` are the names that were chosen.
    """
    points = (point(2, triton=1.0, tokamax=9.0), point(2048, triton=9.0, tokamax=1.0))
    gpu = SimpleNamespace(device=("cuda", (9, 0)), used=[], absent=())
    loop = matmul.BACKENDS.implementation(matmul.BACKENDS["loop"])
    monkeypatch.setattr(matmul.BACKENDS, "_loaded", dict.fromkeys(matmul.BACKENDS.names, loop))
    monkeypatch.setattr(measured, "read", lambda: points)
    monkeypatch.setattr(registry, "_absent", lambda package: package in gpu.absent)
    monkeypatch.setattr(matmul, "device_of", lambda rows: gpu.device)
    matmul._choose.cache_clear()
    yield gpu
    matmul._choose.cache_clear()


def rows(dtype=jnp.bfloat16, n=0):
    return jnp.zeros((n, 16), dtype)


def test_choose_for_experts_takes_what_was_fastest_at_such_rows(hopper):
    assert choose(None, rows(), UP, DOWN).name == "triton"  # many
    assert choose(None, rows(), UP, DOWN, 4096).name == "triton"
    assert choose(None, rows(), UP, DOWN, 4).name == "tokamax"
    assert choose(None, rows(jnp.float16), UP, DOWN).name == "triton"
    assert choose("tokamax", rows(), UP, DOWN, 4096).name == "tokamax"


def test_choose_where_nothing_was_measured_takes_what_is_declared_first(hopper):
    assert choose(None, rows(), UP).name == "tokamax"  # a product alone
    assert choose(None, rows(jnp.float32), UP, DOWN).name == "tokamax"
    hopper.device = ("cuda", (8, 0))
    assert choose(None, rows(), UP, DOWN).name == "tokamax"
    hopper.device = ("cpu", None)
    assert choose(None, rows(), UP, DOWN).name == "loop"


def test_choose_where_a_package_is_absent_takes_the_next(hopper):
    hopper.absent = ("tokamax",)
    assert choose(None, rows(), UP, DOWN, 4096).name == "triton"
    hopper.absent = ("jax_triton",)
    matmul._choose.cache_clear()
    assert choose(None, rows(), UP, DOWN, 4096).name == "loop"


@pytest.mark.parametrize(("n", "name"), [(4, "tokamax"), (4096, "triton")])
def test_choose_by_of_layer_is_that_of_the_layer_for_either_product(hopper, n, name):
    told = of_layer(None, CONFIG)
    assert [choose(told, rows(n=n), shape).name for shape in (UP, DOWN)] == [name] * 2


@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize(("tokens", "name"), [(2, "tokamax"), (600, "triton")])
def test_experts_take_one_backend_in_both_forms(hopper, monkeypatch, tokens, name, double_backward):
    chosen = []

    def spy(*args):
        chosen.append(choose(*args).name)
        return matmul.BACKENDS["loop"]

    for module in (lean, matmul):
        monkeypatch.setattr(module, "choose", spy)
    p = {"gate_and_up_projs": jnp.ones(UP, jnp.bfloat16), "down_projs": jnp.ones(DOWN, jnp.bfloat16)}
    given = rows(n=tokens), jnp.ones(tokens, bool), jnp.ones((tokens, 2)), jnp.zeros((tokens, 2), jnp.int32)
    jax.make_jaxpr(lambda p: experts(p, *given, config=CONFIG, double_backward=double_backward))(p)
    assert chosen == [name] * (2 if double_backward else 1)  # product by product, or once


def test_backend_name_is_the_choice_for_many_tokens_on_the_device_in_force(hopper):
    module = GroupedExperts(CONFIG, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert module.backend_name == "triton"
    hopper.device = ("cpu", None)
    assert module.backend_name == "loop"
    assert GroupedExperts(CONFIG, BackendConfig(experts="ragged_dot"), rngs=nnx.Rngs(0)).backend_name == "ragged_dot"


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_default_that_xla_cannot_split_is_taken_on_one_device_and_inside_of_shard_map(hopper, monkeypatch, kind):
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    chosen = []

    def call(x):
        chosen.append(choose(None, x, UP, DOWN, 4096).name)
        return x

    spec, x = jax.sharding.PartitionSpec(), rows(n=8)
    traced = lambda function: jax.eval_shape(lambda x: function(x), x)  # noqa: E731
    traced(call)
    with jax.sharding.use_abstract_mesh(mesh):
        traced(call)
        traced(jax.shard_map(call, in_specs=spec, out_specs=spec))
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    call(x)  # which lies on one
    traced(call)
    assert chosen == ["triton", "tokamax", "triton", "triton", "tokamax"]
    assert choose("triton", jax.ShapeDtypeStruct((8, 16), jnp.bfloat16), UP, DOWN, 4096).name == "triton"


def test_default_of_some_experts_goes_by_the_routes_that_they_get(hopper):
    told = of_layer(None, CONFIG, routed_share("tokens", 128, 2))
    assert choose(of_layer(None, CONFIG), rows(), UP, DOWN, 512).name == "triton"
    assert choose(told, rows(), UP, DOWN, 512).name == "tokamax"
