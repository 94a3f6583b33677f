"""Step 2 as a module: the router, its correction bias and what it records of the load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moebius.core import checks, layout
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError
from moebius.core.stages import Tap, untapped
from moebius.jax_frontend.checks import check_arrays, check_devices
from moebius.jax_frontend.dtypes import accumulate_dtype, as_dtype
from moebius.jax_frontend.losses import attach_aux_loss, losses, sum_over_ranks
from moebius.jax_frontend.matmul import linear
from moebius.jax_frontend.replay import RouterReplay
from moebius.jax_frontend.route import Routing, choose_router, expert_load, quiet, route, updated_correction_bias
from moebius.jax_frontend.weights import CorrectionBias, draw, new_parameter

if TYPE_CHECKING:
    from jaxtyping import Float


@nnx.register_variable_name("routing_statistics", overwrite=True)
class RoutingStatistic(nnx.Variable):
    """What a gate records: not a parameter, and not worth a place in a checkpoint."""


@nnx.register_variable_name("loss_scale", overwrite=True)
class LossScale(nnx.Variable):
    """What multiplies the gradient of a gate's losses: an input that stays, so that it may change without compiling."""


class Gate(nnx.Module):
    """The router: tokens to experts and weights.

    A call that records writes to the gate's variables: nnx.jit and nnx.grad carry that out of a transformed function,
    jax.jit drops it, and a gate that a function closes over refuses it. A call records in training
    (`deterministic=False`, as `train()` sets it) where the config has a loss or a bias update, with `track_load`, and
    in the context of moebius.jax_frontend.replay.record; every other call writes nothing.

    Args:
        config: MoEConfig, or any object with its attributes.
        gate_precision: dtype of the logits; None for x's. The scores are always promote_types(..., float32).
        dtype: of x inside; None for x's. param_dtype: to store in; None for config.gate_dtype, else config.dtype.
        kernel_init: (key, shape, dtype) -> array for the weight; None for N(0, 0.02).
        kernel_metadata: of the weight's nnx.Param, see GroupedExperts; None for none.
        rngs: its `params` stream gives a key.
        route_backend: of `route`, None for moebius' own.

    Attributes:
        weight [E, dim], bias [E] or None: nnx.Param.
        e_score_correction_bias: CorrectionBias [E], always float32; None where the config holds none.
        aux_loss_scale: LossScale [], multiplies the gradient of every loss, beside its coefficient.
            `set_aux_loss_scale` sets it in all gates of a model.
        track_load: record the load even when neither a loss nor an update needs it.
        tap: called as tap("logits", value) before routing; returns the value to go on with.
        last_load [E] int32, last_aux_loss, last_z_loss, last_seq_aux_loss: RoutingStatistic of the latest call that
            recorded, zeros before. The load is that of this device, a loss that of all devices of cp_axis.
        cumulative_load: RoutingStatistic [E] int32, of this device in training since the latest `update_bias`.
        replay: RouterReplay, or None without config.enable_routing_replay; see moebius.jax_frontend.replay.
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
        route_backend: str | None = None,
    ):
        self.config = c = MoEConfig.of(config)
        self.route_backend = route_backend
        self.gate_precision = None if gate_precision is None else as_dtype(gate_precision)
        self.dtype = None if dtype is None else as_dtype(dtype)
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        for row in layout.gate(c):
            made = {"dtype": param_dtype, "kernel_init": kernel_init, "kernel_metadata": kernel_metadata}
            setattr(self, row.name, new_parameter(row, rngs, **made))
        n = c.n_routed_experts
        self.e_score_correction_bias: CorrectionBias | None = nnx.data(None)
        if c.has_correction_bias:
            self.e_score_correction_bias = CorrectionBias(jnp.zeros(n, jnp.float32))
        if route_backend is not None:  # refused here already, not first where it is called
            logits_TE = jnp.zeros((0, n), accumulate_dtype(self.gate_precision or self.dtype or self.weight.dtype))
            choose_router(route_backend, logits_TE, c, c.has_correction_bias, c.enable_routing_replay)
        self.aux_loss_scale = LossScale(jnp.ones((), jnp.float32))
        self.replay: RouterReplay | None = nnx.data(RouterReplay(n) if c.enable_routing_replay else None)
        self.deterministic = False
        self.track_load = False
        self.tap: Tap = untapped
        # Always there, so that the module's structure does not depend on what was called.
        self.last_load = RoutingStatistic(jnp.zeros(n, jnp.int32))
        self.last_aux_loss = RoutingStatistic(jnp.zeros((), jnp.float32))
        self.last_z_loss = RoutingStatistic(jnp.zeros((), jnp.float32))
        self.last_seq_aux_loss = RoutingStatistic(jnp.zeros((), jnp.float32))
        self.cumulative_load = RoutingStatistic(jnp.zeros(n, jnp.int32))

    @property
    def bias_update_factor(self) -> float:
        """Step of `update_bias`: config.gate_bias_update_factor."""
        return float(self.config.gate_bias_update_factor)

    def __call__(
        self, x: Array, token_mask: Array, cp_axis: Any = None, n_sequences: int = 1
    ) -> tuple[Array, Array, Array | None]:
        """Route tokens.

        Args:
            x: [T, dim] floating. token_mask: [T] bool; a masked token is routed but counts in no statistic.
            cp_axis: name of a mesh axis, inside of jax.shard_map, whose devices hold other parts of the same
                sequences: the losses are then those of all of their tokens, and each device has its own tokens' share
                of the gradient. Under jit alone the tokens are all there, whatever their sharding: None.
            n_sequences: the tokens are those of so many sequences of equal length, one after the other.
        Returns:
            weights [T, K] in x.dtype (promote_types(x.dtype, float32) with config.router_weights_fp32),
            indices [T, K] int32, and the auxiliary loss: a float32 scalar, unscaled, in training with
            config.aux_loss_coeff > 0, else None. To weights is attached, in training, the gradient of every loss of
            the config, times its coefficient and `aux_loss_scale`.
        Raises:
            ShapeError, DTypeError: an input does not fit. RoutingError: see RouterReplay.
        """
        check_arrays(x=x, token_mask=token_mask)
        checks.tokens(x, self.config.dim)
        checks.token_mask(token_mask, x.shape[0])
        check_devices(x=x, token_mask=token_mask, weight=self.weight[...])
        x = quiet(x if self.dtype is None else x.astype(self.dtype), token_mask)
        logits_TE = self.tap("logits", linear(x.astype(self.gate_precision or x.dtype), *self._parameters()))
        routing = self._route(logits_TE)
        load_E = self._record_load(routing, token_mask)
        found = self._losses(logits_TE, routing, load_E, token_mask, cp_axis, n_sequences)
        weights_TK = routing.weights_TK
        for name, loss in found.items():
            scale = self.aux_loss_scale[...].astype(loss.dtype)
            weights_TK = attach_aux_loss(weights_TK, loss, self.config.losses[name] * scale)
        out = accumulate_dtype(x.dtype) if self.config.router_weights_fp32 else x.dtype
        return weights_TK.astype(out), routing.ids_TK, found.get("aux_loss")

    def _parameters(self) -> tuple[Array, Array | None]:
        """(weight, bias), cut off from gradients where the config does not train the gate."""
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        return (weight, bias) if self.config.train_gate else lax.stop_gradient((weight, bias))

    def _route(self, logits_TE: Float[Array, "T E"]) -> Routing:
        correction, forced_TK = self.e_score_correction_bias, None
        if self.replay is not None:
            forced_TK = self.replay.chosen(logits_TE.shape[0], self.config.n_activated_experts)
        routing = route(
            logits_TE,
            self.config,
            correction_bias_E=None if correction is None else correction[...],
            ids_TK=forced_TK,
            backend=self.route_backend,
        )
        if self.replay is not None:
            self.replay.keep(routing.ids_TK)
        return routing

    def _record_load(self, routing: Routing, token_mask: Array) -> Array | None:
        """Keep the load where something needs it, and return it there."""
        c, training = self.config, not self.deterministic
        updates = training and c.gate_bias_update_factor > 0
        if not (updates or self.track_load or (training and c.aux_loss_coeff > 0)):
            return None
        load_E = expert_load(routing.ids_TK, token_mask, c.n_routed_experts)
        # Not `self.last_load[...] = load_E`: while JAX traces, that is a scatter with an empty array of indices, which
        # inside shard_map over several devices crashes the compiler of jaxlib 0.11.2, where it removes empty arrays.
        self.last_load.set_value(load_E)
        if updates:
            self.cumulative_load.set_value(self.cumulative_load[...] + load_E)
        return load_E

    def _losses(
        self,
        logits_TE: Float[Array, "T E"],
        routing: Routing,
        load_E: Array | None,
        token_mask: Array,
        cp_axis: Any,
        n_sequences: int,
    ) -> dict[str, Array]:
        """In training the losses of the config, by name and not yet times their coefficients."""
        c = self.config
        if self.deterministic or not c.losses:
            return {}
        # Where nothing but the scores chooses, the chosen are each token's best.
        biased = c.routing_rule.uses_bias and self.e_score_correction_bias is not None
        by_score = not biased and c.n_expert_groups <= 1 and self.replay is None
        best_TK = routing.ids_TK if by_score else None
        settings: dict[str, Any] = {"n_sequences": n_sequences, "best_TK": best_TK, "cp_axis": cp_axis}
        found = losses(logits_TE, routing, load_E, token_mask, c, **settings)
        for name, loss in found.items():
            getattr(self, f"last_{name}").set_value(lax.stop_gradient(loss).astype(jnp.float32))
        return found

    def update_bias(self, axis_name: Any = None) -> None:
        """Move the correction bias by gate_bias_update_factor towards balance and clear cumulative_load.

        Call it once an optimizer step, after the optimizer. All devices that route tokens of one batch have to take
        the same step: inside of jax.shard_map, where each has a load of its own, it is summed over `axis_name`. Under
        jit alone the load is that of all tokens.

        Args:
            axis_name: name of a mesh axis, or several, whose devices' load counts; None for this device alone.
        Raises:
            ConfigError: the config updates no bias. Without a recorded load the bias stays as it is.
        """
        bias = self.e_score_correction_bias
        if self.config.gate_bias_update_factor <= 0 or bias is None:
            raise ConfigError("update_bias", "gate_bias_update_factor=0", "set it above 0")
        own_E, factor = self.cumulative_load[...], self.config.gate_bias_update_factor
        (load_E,) = sum_over_ranks([own_E], axis_name)
        bias.set_value(updated_correction_bias(bias[...], load_E, factor))
        self.cumulative_load.set_value(jnp.zeros_like(own_E))

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Draw the weight anew from N(0, init_std); biases zero."""
        for row in layout.gate(self.config):
            parameter = getattr(self, row.name)
            parameter[...] = draw(row, rngs, init_std, dtype=parameter.dtype)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias[...] = jnp.zeros_like(self.e_score_correction_bias[...])


def set_aux_loss_scale(module: nnx.Module, scale: Any) -> None:
    """Set `aux_loss_scale` of every gate in `module`: the gradient of each loss is scale * coefficient * its own.

    For what the model's loss is scaled by and the router's losses would miss: micro-batches that are averaged, devices
    of a context-parallel axis whose gradients are averaged, a loss scale of 16-bit training. Before the forward pass;
    nothing is compiled anew.

    Args:
        scale: a number, or an array of one. NeMo Automodel's MoEAuxLossAutoScaler.main_loss_backward_scale.
    Raises:
        ConfigError: there is no gate in `module`.
    """
    gates = [gate for _, gate in nnx.iter_modules(module) if isinstance(gate, Gate)]
    if not gates:
        raise ConfigError(f"the scale of the router's losses in a {type(module).__name__}", "no Gate", "pass a model")
    for gate in gates:
        before = gate.aux_loss_scale[...]  # [] of one layer, [layers] of a stack
        after = jnp.broadcast_to(jnp.asarray(scale, before.dtype), before.shape)
        # Written into the old value, so that the new one lies where that lay: elsewhere a step would compile anew.
        gate.aux_loss_scale.set_value(lax.dynamic_update_slice(before, after, (0,) * before.ndim))
