"""Flax experts by kernels under JAX's transformations, in Triton's interpreter: see
tests/jax/test_transformed_kernels.py."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moebius.core import MoEConfig, Unsupported
from moebius.core.kernels.interpreter import mend
from moebius.jax_frontend import experts, launch, matmul

E, K, D, I, T = 4, 2, 16, 8, 6
CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=I, dtype="float32", expert_bias=True)
RNG = np.random.default_rng(0)
SHAPES = {
    "gate_and_up_projs": (E, D, 2 * I),
    "down_projs": (E, I, D),
    "gate_up_proj_bias": (E, 2 * I),
    "down_proj_bias": (E, D),
}
PARAMETERS = {name: jnp.asarray(RNG.normal(size=shape) / 4, jnp.float32) for name, shape in SHAPES.items()}
X = jnp.asarray(RNG.normal(size=(T, D)), jnp.float32)
MASK = jnp.arange(T) != 2
WEIGHTS = jnp.asarray(RNG.random((T, K)), jnp.float32)
IDS = jnp.asarray(RNG.integers(0, E, (T, K)), jnp.int32)

Function = Callable[..., Any]


def run(parameters: Any, x: Any, *, backend: str, double_backward: bool = False) -> jax.Array:
    how = {"config": CONFIG, "backend": backend, "double_backward": double_backward}
    return experts(parameters, x, MASK, WEIGHTS, IDS, **how)


def total(parameters: Any, x: Any, **how: Any) -> jax.Array:
    return jnp.sum(run(parameters, x, **how) ** 2)


def layers(parameters: Any, x: Any, **how: Any) -> jax.Array:
    """Two checkpointed layers of the same parameters under scan."""
    layer = jax.checkpoint(lambda x, _: (run(parameters, x, **how), None))
    return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0] ** 2)


def penalised(parameters: Any, x: Any, **how: Any) -> jax.Array:
    """Uses a gradient as a number, which is not differentiated."""
    slope = jax.lax.stop_gradient(jax.grad(total, 1)(parameters, x, **how))
    return total(parameters, x, **how) + jnp.sum(slope * x)


def over_batches(function: Function) -> Function:
    """`function` of x and of twice x."""
    return lambda parameters, x: jax.vmap(function, in_axes=(None, 0))(parameters, jnp.stack([x, 2 * x]))


# Of a backend's function, what is computed; "loop" says what it should be.
COMPUTED: dict[str, Callable[[str], Function]] = {
    "jit": lambda b: jax.jit(jax.value_and_grad(partial(total, backend=b), (0, 1))),
    "no jit": lambda b: jax.value_and_grad(partial(total, backend=b), (0, 1)),
    "scan of remat": lambda b: jax.jit(jax.grad(partial(layers, backend=b), (0, 1))),
    "vmap": lambda b: jax.jit(over_batches(partial(run, backend=b))),
    "vmap of grad": lambda b: jax.jit(over_batches(jax.grad(partial(total, backend=b)))),
    "grad of vmap": lambda b: jax.jit(jax.grad(lambda p, x: jnp.sum(over_batches(partial(run, backend=b))(p, x) ** 2))),
    "a gradient in a loss": lambda b: jax.grad(partial(penalised, backend=b), 1),
    "a gradient in a loss under vmap": lambda b: jax.jit(over_batches(jax.grad(partial(penalised, backend=b), 1))),
    "the switch": lambda b: jax.jit(jax.grad(slope(backend=b, double_backward=True), 1)),
}


def slope(**how: Any) -> Function:
    """The sum of a gradient's squares."""
    return lambda parameters, x: jnp.sum(jax.grad(total, 1)(parameters, x, **how) ** 2)


def of_x(function: Function) -> Function:
    return partial(function, PARAMETERS)


ONCE, SLOPE = of_x(partial(total, backend="triton")), of_x(slope(backend="triton"))
REFUSED: dict[str, Callable[[], Any]] = {
    "grad of grad": lambda: jax.grad(SLOPE)(X),
    "jit of grad of grad": lambda: jax.jit(jax.grad(SLOPE))(X),
    "grad of grad under vmap": lambda: jax.vmap(jax.grad(SLOPE))(jnp.stack([X, X])),
    "grad of grad of vmap": lambda: jax.grad(lambda x: jnp.sum(jax.vmap(SLOPE)(x)))(jnp.stack([X, X])),
    "hessian": lambda: jax.hessian(ONCE)(X),
    "jvp": lambda: jax.jvp(ONCE, (X,), (X,)),
    "jit of jvp": lambda: jax.jit(lambda x: jax.jvp(ONCE, (x,), (x,)))(X),
    "jvp of grad": lambda: jax.jvp(jax.grad(ONCE), (X,), (X,)),
    "jit of jvp of grad": lambda: jax.jit(lambda x: jax.jvp(jax.grad(ONCE), (x,), (x,)))(X),
    "linearize": lambda: jax.linearize(ONCE, X)[1](X),
    "grad of a kernel": lambda: jax.grad(lambda x: jnp.sum(launch.scatter_rows(x, IDS)))(X),
    "vmap of jvp of a kernel": lambda: jax.vmap(lambda x: jax.jvp(lambda x: launch.scatter_rows(x, IDS), (x,), (x,)))(
        jnp.stack([X, X])
    ),
    # By way of scratch of integers, which have no tangents.
    "grad of two kernels": lambda: jax.grad(lambda x: jnp.sum(launch.sum_rows(x, jnp.asarray([T], jnp.int32)) ** 2))(X),
}


def computes(name: str) -> None:
    found, wanted = (jax.tree.leaves(COMPUTED[name](backend)(PARAMETERS, X)) for backend in ("triton", "loop"))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(np.abs(other).max()))


def refuses(name: str) -> None:
    try:
        REFUSED[name]()
    except Unsupported as error:
        assert "double_backward=True" in error.do, error
        return
    raise AssertionError("it was not refused")


def main() -> None:
    mend()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # jax-triton, which the registry asks for, is not needed by the interpreter.
    object.__setattr__(matmul.BACKENDS["triton"], "needs", ())
    from moebius.jax_frontend import matmul_triton as kernels

    raw = kernels.raw_product, kernels.weight_gradient
    matmul.BACKENDS._loaded["triton"] = matmul.Kernels(kernels.product, kernels.weight_gradient, raw=raw)
    found: dict[str, str | None] = {}
    for name in (*COMPUTED, *REFUSED):
        try:
            computes(name) if name in COMPUTED else refuses(name)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
