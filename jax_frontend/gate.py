"""Step 2 as a module: the router, its correction bias and what it records of the load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moebius.core import checks, layout
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError, Unsupported
from moebius.core.stages import Tap, untapped
from moebius.jax_frontend.checks import check_arrays, check_devices
from moebius.jax_frontend.dtypes import accumulate_dtype, as_dtype
from moebius.jax_frontend.matmul import linear
from moebius.jax_frontend.route import attach_aux_loss, aux_loss, expert_load, quiet, route, updated_correction_bias
from moebius.jax_frontend.weights import CorrectionBias, draw

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class RoutingStatistic(nnx.Variable):
    """What a gate records: not a parameter, and not worth a place in a checkpoint."""


class Gate(nnx.Module):
    """The router: tokens to experts and weights.

    A call that records writes to the gate's variables: nnx.jit and nnx.grad carry that out of a transformed function,
    jax.jit drops it, and a gate that a function closes over refuses it. A call records in training
    (`deterministic=False`, as `train()` sets it) where the config has an auxiliary loss or a bias update, and with
    `track_load`; every other call writes nothing.

    Args:
        config: MoEConfig, or any object with its attributes.
        gate_precision: dtype of the logits; None for x's. The scores are always promote_types(..., float32).
        dtype: of x inside; None for x's. param_dtype: to store in; None for config.gate_dtype, else config.dtype.
        kernel_init: (key, shape, dtype) -> array for the weight; None for N(0, 0.02).
        kernel_metadata: of the weight's nnx.Param; None for none. rngs: its `params` stream gives a key.

    Attributes:
        weight [E, dim], bias [E] or None: nnx.Param.
        e_score_correction_bias: CorrectionBias [E], always float32; None where the config holds none.
        track_load: record the load even when neither a loss nor an update needs it.
        tap: called as tap("logits", value) before routing; returns the value to go on with.
        last_load [E] int32, last_aux_loss: RoutingStatistic of the latest call that recorded, zeros before.
        cumulative_load: RoutingStatistic [E] int32, training load since the latest `update_bias`.
    """

    weight: nnx.Param[Array]

    def __init__(
        self,
        config: Any,
        gate_precision: Any = None,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        kernel_init: Any = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = c = MoEConfig.of(config)
        if c.enable_routing_replay:
            raise Unsupported("enable_routing_replay=True", "routing replay is not built yet", "set it to False")
        self.gate_precision = None if gate_precision is None else as_dtype(gate_precision)
        self.dtype = None if dtype is None else as_dtype(dtype)
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        for row in layout.gate(c):
            value = draw(row, rngs, dtype=param_dtype, kernel_init=kernel_init)
            metadata = {} if row.zeros else dict(kernel_metadata or {})
            setattr(self, row.name, nnx.Param(value, **metadata))
        n = c.n_routed_experts
        self.e_score_correction_bias: CorrectionBias | None = nnx.data(None)
        if c.has_correction_bias:
            self.e_score_correction_bias = CorrectionBias(jnp.zeros(n, jnp.float32))
        self.deterministic = False
        self.track_load = False
        self.tap: Tap = untapped
        # Always there, so that the module's structure does not depend on what was called.
        self.last_load = RoutingStatistic(jnp.zeros(n, jnp.int32))
        self.last_aux_loss = RoutingStatistic(jnp.zeros((), jnp.float32))
        self.cumulative_load = RoutingStatistic(jnp.zeros(n, jnp.int32))

    def __call__(self, x: Array, token_mask: Array) -> tuple[Array, Array, Array | None]:
        """Route tokens.

        Args:
            x: [T, dim] floating. token_mask: [T] bool; a masked token is routed but counts in no statistic.
        Returns:
            weights [T, K] in x.dtype (promote_types(x.dtype, float32) with config.router_weights_fp32),
            indices [T, K] int32, and the auxiliary loss: a float32 scalar, unscaled, in training with
            config.aux_loss_coeff > 0, else None. Its gradient, times the coefficient, is attached to weights.
        """
        check_arrays(x=x, token_mask=token_mask)
        checks.tokens(x, self.config.dim)
        checks.token_mask(token_mask, x.shape[0])
        check_devices(x=x, token_mask=token_mask, weight=self.weight[...])
        x = quiet(x if self.dtype is None else x.astype(self.dtype), token_mask)
        logits_TE = self.tap("logits", linear(x.astype(self.gate_precision or x.dtype), *self._parameters()))
        correction = self.e_score_correction_bias
        routing = route(logits_TE, self.config, correction_bias_E=None if correction is None else correction[...])
        loss = self._record(routing.ids_TK, routing.scores_TE, token_mask)
        weights_TK = routing.weights_TK
        if loss is not None:
            weights_TK = attach_aux_loss(weights_TK, loss, self.config.aux_loss_coeff)
        out = accumulate_dtype(x.dtype) if self.config.router_weights_fp32 else x.dtype
        return weights_TK.astype(out), routing.ids_TK, loss

    def _parameters(self) -> tuple[Array, Array | None]:
        """(weight, bias), cut off from gradients where the config does not train the gate."""
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        return (weight, bias) if self.config.train_gate else lax.stop_gradient((weight, bias))

    def _record(self, ids_TK: Int[Array, "T K"], scores_TE: Float[Array, "T E"], token_mask: Array) -> Array | None:
        """Keep the load where something needs it; the auxiliary loss in training."""
        c, training = self.config, not self.deterministic
        needed = training and (c.gate_bias_update_factor > 0 or c.aux_loss_coeff > 0)
        if not (needed or self.track_load):
            return None
        load_E = expert_load(ids_TK, token_mask, c.n_routed_experts)
        self.last_load[...] = load_E
        if training and c.gate_bias_update_factor > 0:
            self.cumulative_load[...] = self.cumulative_load[...] + load_E
        if not (training and c.aux_loss_coeff > 0):
            return None
        loss = aux_loss(scores_TE, load_E, token_mask, c.n_activated_experts)
        self.last_aux_loss[...] = lax.stop_gradient(loss).astype(jnp.float32)
        return loss

    def update_bias(self) -> None:
        """Move the correction bias by gate_bias_update_factor towards balance and clear cumulative_load.

        Raises:
            ConfigError: the config updates no bias. Without a recorded load the bias stays as it is.
        """
        bias = self.e_score_correction_bias
        if self.config.gate_bias_update_factor <= 0 or bias is None:
            raise ConfigError("update_bias", "gate_bias_update_factor=0", "set it above 0")
        load_E, factor = self.cumulative_load[...], self.config.gate_bias_update_factor
        bias[...] = updated_correction_bias(bias[...], load_E, factor)
        self.cumulative_load[...] = jnp.zeros_like(load_E)

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Draw the weight anew from N(0, init_std); biases zero."""
        for row in layout.gate(self.config):
            parameter = getattr(self, row.name)
            parameter[...] = draw(row, rngs, init_std, dtype=parameter.dtype)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias[...] = jnp.zeros_like(self.e_score_correction_bias[...])


class FakeBalancedGate(nnx.Module):
    """Routes evenly without looking at the values: for benchmarks.

    Args:
        config: MoEConfig, or any object with its attributes.
        skip_first_n_experts: leave these experts out.
        noise: 0 for a fixed cycle; up to 1 for random weights and popularity, drawn from a seed taken from x, so
            that a recomputation of the same x agrees.
    """

    bias_update_factor = 0.0

    def __init__(self, config: Any, skip_first_n_experts: int = 0, noise: float = 0.0):
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

    def __call__(self, x: Array, token_mask: Array) -> tuple[Array, Array, None]:
        """(weights [T, K] in x.dtype, indices [T, K] int32, None); the mask has no effect."""
        checks.tokens(x, self.config.dim)
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

    def update_bias(self) -> None:
        """Nothing: there is no bias."""

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Nothing: there are no parameters."""
