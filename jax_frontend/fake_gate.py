"""A router that looks at nothing: even routing for benchmarks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moebius.core import checks
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError
from moebius.jax_frontend.checks import check_arrays


class FakeBalancedGate(nnx.Module):
    """Routes evenly without looking at the values: for benchmarks.

    Args:
        config: MoEConfig, or any object with its attributes.
        skip_first_n_experts: leave these experts out.
        noise: 0 for a fixed cycle; up to 1 for random weights and popularity, drawn from a seed taken from x, so
            that a recomputation of the same x agrees.
        rngs: not read; for those that give it to every module, as nnx.bridge does.
    """

    bias_update_factor = 0.0

    def __init__(self, config: Any, skip_first_n_experts: int = 0, noise: float = 0.0, *, rngs: nnx.Rngs | None = None):
        self.config = MoEConfig.of(config)
        self.skip_first_n_experts = skip_first_n_experts
        self.noise = noise
        available = self.config.n_routed_experts - skip_first_n_experts
        if not 0 <= skip_first_n_experts or available < self.config.n_activated_experts:
            raise ConfigError(
                f"skip_first_n_experts={skip_first_n_experts}",
                f"{self.config.n_routed_experts} experts, {self.config.n_activated_experts} per token",
                "leave at least as many experts as a token uses",
            )

    def __call__(
        self, x: Array, token_mask: Array, cp_axis: Any = None, n_sequences: int = 1
    ) -> tuple[Array, Array, None]:
        """(weights [T, K] in x.dtype, indices [T, K] int32, None); only x has an effect."""
        check_arrays(x=x)
        checks.tokens(x, self.config.dim)
        x = jnp.asarray(x)  # NumPy's float64 is JAX's only in x64 mode
        T, K = x.shape[0], self.config.n_activated_experts
        available = self.config.n_routed_experts - self.skip_first_n_experts
        if self.noise > 0:
            weights_TK, ids_TK = self._draw(x, available)
        else:
            ids_TK = jnp.arange(T * K, dtype=jnp.int32).reshape(T, K) % available
            weights_TK = jnp.full((T, K), 1.0 / K, jnp.float32)
        return weights_TK.astype(x.dtype), ids_TK + self.skip_first_n_experts, None

    def _draw(self, x: Array, available: int) -> tuple[Array, Array]:
        T, K = x.shape[0], self.config.n_activated_experts
        total = lax.stop_gradient(x).reshape(-1)[:4].astype(jnp.float32).sum()
        seed = jnp.nan_to_num(1e6 * total).astype(jnp.int32) & 0x7FFFFFFF
        for_weights, for_popularity, for_scores = jax.random.split(jax.random.key(seed), 3)
        random_TK = jax.random.uniform(for_weights, (T, K), jnp.float32)
        random_TK = random_TK / random_TK.sum(-1, keepdims=True)
        weights_TK = (1.0 - self.noise) / K + self.noise * random_TK
        popularity_E = jax.random.normal(for_popularity, (available,), jnp.float32) * self.noise * 0.1
        score_TE = jax.random.uniform(for_scores, (T, available), jnp.float32) + popularity_E
        return weights_TK, lax.top_k(score_TE, K)[1]

    def update_bias(self, axis_name: Any = None) -> None:
        """Nothing: there is no bias."""

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Nothing: there are no parameters."""
