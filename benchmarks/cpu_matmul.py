"""Flax: the grouped matmul's backend "loop" against jax.lax.ragged_dot, time and temporary memory.

Limit: the FLOPs of the rows, 2 R D F for the forward pass and three times that with both gradients, at the rate of one
dense matmul of the same size, timed in the same run. lax.ragged_dot on a CPU does E times that work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleaved
from moebius.jax_frontend import grouped_matmul

ROWS, N_IN, N_OUT = 2048, 256, 512


def main(runs: int) -> None:
    """Print the table for E = 8, 64, 128 in float32."""
    print(f"\nFlax grouped matmul, float32, {ROWS} rows [{N_IN}] x [E, {N_IN}, {N_OUT}], random groups, ms and MiB")
    print("| E | pass | dense | loop | lax.ragged_dot | speed-up | loop tmp | ragged_dot tmp |")
    print("|---|---|---|---|---|---|---|---|")
    for n_experts in (8, 64, 128):
        for name, backward in (("forward", False), ("forward+backward", True)):
            print(_row(n_experts, name, backward, runs))


def _row(n_experts: int, name: str, backward: bool, runs: int) -> str:
    rng = np.random.default_rng(0)
    rows, dout = (jnp.asarray(rng.normal(size=(ROWS, width)), jnp.float32) for width in (N_IN, N_OUT))
    weight = jnp.asarray(rng.normal(size=(n_experts, N_IN, N_OUT)), jnp.float32)
    sizes = jnp.asarray(np.bincount(rng.integers(0, n_experts, ROWS), minlength=n_experts), jnp.int32)
    kinds: dict[str, Callable[[Any, Any], Any]] = {
        "dense": lambda r, w: r @ w[0],
        "loop": lambda r, w: grouped_matmul(r, w, sizes, backend="loop"),
        "ragged_dot": lambda r, w: jax.lax.ragged_dot(r, w, sizes),
    }
    calls, memory = {}, {}
    for kind, product in kinds.items():
        # The dense product's weight has no expert axis, so that its gradient is not filled up with zeros.
        operand = weight[:1] if kind == "dense" else weight
        compiled = (
            jax.jit(_forward_backward(product) if backward else _forward(product)).lower(rows, operand, dout).compile()
        )
        memory[kind] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        calls[kind] = _call(compiled, rows, operand, dout)
    ms = {kind: 1e3 * seconds for kind, seconds in interleaved(calls, runs).items()}
    return (
        f"| {n_experts} | {name} | {ms['dense']:.2f} | {ms['loop']:.2f} | {ms['ragged_dot']:.2f} | "
        f"{ms['ragged_dot'] / ms['loop']:.1f}x | {memory['loop']:.1f} | {memory['ragged_dot']:.1f} |"
    )


def _forward(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda r, w, d: product(r, w)


def _forward_backward(product: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def run(r: Any, w: Any, d: Any) -> Any:
        out, pullback = jax.vjp(product, r, w)
        return out, pullback(d)

    return run


def _call(compiled: Any, *arguments: Any) -> Callable[[], object]:
    return lambda: jax.block_until_ready(compiled(*arguments))
