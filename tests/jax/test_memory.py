"""What a training step holds beside its arguments and results must not grow with the number of experts."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from moebius.core import MoEConfig, layout
from moebius.jax_frontend import experts

TOKENS, K, DIM, INTER = 256, 2, 32, 16
FEW, MANY = 4, 64
ROWS_BY_WIDTH = TOKENS * K * DIM * 4  # bytes of the rows, and of their pre-activation


@cache
def temporary_bytes(backend, n_experts, bias):
    """Of a compiled value_and_grad: neither arguments, so no parameters, nor results, so none of their gradients."""
    sizes = {"n_activated_experts": K, "dim": DIM, "moe_inter_dim": INTER, "dtype": "float32"}
    config = MoEConfig(n_routed_experts=n_experts, expert_bias=bias, **sizes)
    shape = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))  # noqa: E731
    parameters = {row.name: shape(*row.shape) for row in layout.experts(config)}
    given = parameters, shape(TOKENS, DIM), shape(TOKENS, K)
    routes = shape(TOKENS, dtype="bool"), shape(TOKENS, K, dtype="int32")

    def loss(parameters, x, weights, mask, ids):
        return (experts(parameters, x, mask, weights, ids, config=config, backend=backend) ** 2).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*given, *routes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def growth(backend, bias):
    return temporary_bytes(backend, MANY, bias) - temporary_bytes(backend, FEW, bias)


@pytest.mark.parametrize("bias, arrays", [(False, 0.1), (True, 2)], ids=["plain", "bias"])
def test_training_step_holds_no_more_for_many_experts(bias, arrays):
    """But with biases the last block of rows of each expert, part empty: at most as much again as the rows."""
    assert growth("loop", bias) <= arrays * ROWS_BY_WIDTH


def test_training_step_by_ragged_dot_on_a_cpu_holds_the_rows_once_for_each_expert():
    """So that the test above can fail."""
    assert growth("ragged_dot", False) > (MANY - FEW) * ROWS_BY_WIDTH
