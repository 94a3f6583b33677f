"""Flax kernels on four devices in Triton's interpreter: see tests/jax/test_sharded_kernels.py."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moebius.core import MoEConfig, Unsupported
from moebius.jax_frontend import experts, launch, matmul

E, K, D, I, T = 4, 2, 16, 8, 8
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I, dtype="float32")
RNG = np.random.default_rng(0)
PARAMETERS = {
    "gate_and_up_projs": jnp.asarray(RNG.normal(size=(E, D, 2 * I)), jnp.float32),
    "down_projs": jnp.asarray(RNG.normal(size=(E, I, D)), jnp.float32),
}
TOKENS = (
    jnp.asarray(RNG.normal(size=(T, D)), jnp.float32),
    jnp.ones(T, bool),
    jnp.asarray(RNG.random((T, K)), jnp.float32),
    jnp.asarray(RNG.integers(0, E, (T, K)), jnp.int32),
)


def run(parameters: Any, *tokens: Any) -> jax.Array:
    return experts(parameters, *tokens, config=CONFIG, backend="triton")


def both(parameters: Any, *tokens: Any) -> Any:
    return jax.value_and_grad(lambda p: jnp.sum(run(p, *tokens)))(parameters)


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))


def placed(kind: AxisType, spec: P) -> list[Any]:
    """Parameters on every device, and the tokens as `spec` says."""
    whole, split = NamedSharding(mesh(kind), P()), NamedSharding(mesh(kind), spec)
    return [jax.device_put(PARAMETERS, whole), *(jax.device_put(each, split) for each in TOKENS)]


def refused(call: Callable[[], Any]) -> None:
    try:
        call()
    except Unsupported as error:
        assert "over 4 devices, outside of a shard_map" in error.asked or "over 2 devices" in error.asked, error
        assert "gather" in error.found and "shard_map" in error.do and "another backend" in error.do
        return
    raise AssertionError("it was not refused")


def same(found: Any, wanted: Any) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), found, wanted)


def spread(axes: set[str], check_vma: bool) -> Any:
    """`run` of the tokens of each device along those axes of a mesh."""
    spec = P(tuple(sorted(axes)))
    return jax.shard_map(
        run,
        mesh=mesh(AxisType.Auto),
        in_specs=(P(), *[spec] * 4),
        out_specs=spec,
        axis_names=axes,
        check_vma=check_vma,
    )


def lowered() -> None:
    """For devices that are told by the arguments' shardings alone."""
    split = NamedSharding(mesh(AxisType.Auto), P("a"))
    tokens = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=split) for each in TOKENS]
    jax.jit(run).lower(PARAMETERS, *tokens)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CASES: dict[str, Callable[[], Any]] = {
    "jit of sharded tokens": lambda: refused(lambda: jax.jit(run)(*placed(AUTO, P("a")))),
    "jit of a gradient": lambda: refused(lambda: jax.jit(both)(*placed(AUTO, P(("a", "b"))))),
    "lowered for shardings": lambda: refused(lowered),
    "no jit": lambda: refused(lambda: launch.scatter_rows(placed(AUTO, P("a"))[1], jnp.zeros((T, K), jnp.int32))),
    "no jit, explicit": lambda: refused(
        lambda: launch.scatter_rows(placed(EXPLICIT, P("a"))[1], jnp.zeros((T, K), jnp.int32))
    ),
    "a shard_map over one of two axes": lambda: refused(lambda: jax.jit(spread({"a"}, True))(PARAMETERS, *TOKENS)),
    "one device": lambda: same(jax.jit(run)(PARAMETERS, *TOKENS), expected()),
    "one device of four": lambda: same(
        jax.jit(run)(*jax.device_put((PARAMETERS, *TOKENS), jax.devices()[2])), expected()
    ),
    "a shard_map over all axes": lambda: same(jax.jit(spread({"a", "b"}, True))(PARAMETERS, *TOKENS), expected()),
    "a shard_map without jit": lambda: same(spread({"a", "b"}, False)(PARAMETERS, *TOKENS), expected()),
    "another backend": lambda: same(
        jax.jit(lambda p, *tokens: experts(p, *tokens, config=CONFIG, backend="loop"))(*placed(AUTO, P("a"))),
        expected(),
    ),
}


def expected() -> Any:
    return experts(PARAMETERS, *TOKENS, config=CONFIG, backend="loop")


def main() -> None:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # jax-triton, which the registry asks for, is not needed by the interpreter.
    row = matmul.BACKENDS["triton"]
    object.__setattr__(row, "needs", ())
    from moebius.jax_frontend import matmul_triton as kernels

    raw = kernels.raw_product, kernels.weight_gradient
    matmul.BACKENDS._loaded["triton"] = matmul.Kernels(kernels.product, kernels.weight_gradient, raw=raw)
    found: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
