"""moebius's own function in Flax, as a user calls it under jit."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_jax import Peer
from benchmarks.gpu_problem import Problem


def build(problem: Problem, *, backend: str | None = None, **options: Any) -> Peer:
    """`experts` with this backend of the grouped matmul and these of its options."""
    import jax.numpy as jnp

    from moebius.core import MoEConfig
    from moebius.jax_frontend import experts
    from moebius.jax_frontend.matmul import choose

    s = problem.shape
    config = MoEConfig(
        n_routed_experts=s.n_experts,
        n_activated_experts=s.k,
        dim=s.dim,
        moe_inter_dim=s.inter,
        dtype=str(problem.up.dtype),
    )
    # Refused here, in words, where it cannot serve.
    chosen = choose(backend, jnp.zeros((0, s.dim), jnp.bfloat16), tuple(problem.up.shape))

    def call(x: Any, weights: Any, indices: Any, up: Any, down: Any) -> Any:
        parameters = {"gate_and_up_projs": up, "down_projs": down}
        mask = jnp.ones(x.shape[0], bool)
        return experts(parameters, x, mask, weights, indices, config=config, backend=chosen.name, **options)

    return Peer(call=call, note=f"backend {chosen.name}", host=host(chosen))


def host(row: Any) -> str:
    """What the host waits for in each product of this backend; "" for nothing."""
    if row.name == "te":
        from moebius.jax_frontend import matmul_te

        name = matmul_te.path("bfloat16").name
        return "" if name == "V2" else f"reads group sizes ({name})"
    return "reads group sizes" if row.reads_host else ""
