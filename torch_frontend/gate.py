"""Step 2 as a module: the router, its correction bias and what it records of the load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moebius.core import checks, layout
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError, Unsupported
from moebius.core.stages import Tap, untapped
from moebius.torch_frontend.checks import check_arrays, check_devices
from moebius.torch_frontend.dtypes import accumulate_dtype, as_dtype
from moebius.torch_frontend.matmul import linear
from moebius.torch_frontend.route import attach_aux_loss, aux_loss, expert_load, quiet, route, updated_correction_bias
from moebius.torch_frontend.weights import draw

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Gate(nn.Module):
    """The router: tokens to experts and weights.

    Args:
        config: MoEConfig, or any object with its attributes.
        gate_precision: dtype of the logits; None for x's. The scores are always promote_types(..., float32).
        dtype: of x inside; None for x's. param_dtype: to store in; None for config.gate_dtype, else config.dtype.
        device: of the parameters.

    Attributes:
        weight [E, dim], bias [E] or None: parameters.
        e_score_correction_bias: [E] float32, whatever the module is cast to; None where the config holds none.
        track_load: record the load even when neither a loss nor an update needs it.
        tap: called as tap("logits", value) before routing; returns the value to go on with.
        last_load [E] int32, last_aux_loss: of the latest call, None before it or when nothing is recorded.
        cumulative_load [E] int32: since the latest `update_bias`, None before the first training call.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        config: Any,
        gate_precision: Any = None,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        device: Any = None,
    ):
        super().__init__()
        self.config = MoEConfig.of(config)
        if self.config.enable_routing_replay:
            raise Unsupported("enable_routing_replay=True", "routing replay is not built yet", "set it to False")
        self.gate_precision = None if gate_precision is None else as_dtype(gate_precision)
        self.dtype = None if dtype is None else as_dtype(dtype)
        self.bias: nn.Parameter | None = None
        for row in layout.gate(self.config):
            stored = as_dtype(param_dtype or row.dtype)
            value = nn.Parameter(torch.empty(row.shape, dtype=stored, device=device), self.config.train_gate)
            setattr(self, row.name, value)
        n = self.config.n_routed_experts
        correction = torch.zeros(n, dtype=torch.float32, device=device) if self.config.has_correction_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.track_load = False
        self.tap: Tap = untapped
        self.last_load: Tensor | None = None
        self.last_aux_loss: Tensor | None = None
        self.cumulative_load: Tensor | None = None
        self.init_weights()

    def forward(self, x: Tensor, token_mask: Tensor, cp_mesh: Any = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Route tokens.

        Args:
            x: [T, dim] floating. token_mask: [T] bool; a masked token is routed but counts in no statistic.
            cp_mesh: None; statistics over a mesh are not built yet.
        Returns:
            weights [T, K] in x.dtype (promote_types(x.dtype, float32) with config.router_weights_fp32),
            indices [T, K] int32, and the auxiliary loss: a float32 scalar, unscaled, in training with
            config.aux_loss_coeff > 0, else None. Its gradient, times the coefficient, is attached to weights.
        """
        if cp_mesh is not None:
            raise Unsupported("statistics over cp_mesh", "context parallelism is not built yet", "pass None")
        check_arrays(x=x, token_mask=token_mask)
        checks.tokens(x, self.config.dim)
        checks.token_mask(token_mask, x.shape[0])
        check_devices(x=x, token_mask=token_mask, weight=self.weight)
        x = quiet(x if self.dtype is None else x.to(self.dtype), token_mask)
        logits_TE = self.tap("logits", linear(x.to(self.gate_precision or x.dtype), self.weight, self.bias))
        routing = route(logits_TE, self.config, correction_bias_E=self.e_score_correction_bias)
        loss = self._record(routing.ids_TK, routing.scores_TE, token_mask)
        weights_TK = routing.weights_TK
        if loss is not None:
            weights_TK = attach_aux_loss(weights_TK, loss, self.config.aux_loss_coeff)
        out = accumulate_dtype(x.dtype) if self.config.router_weights_fp32 else x.dtype
        return weights_TK.to(out), routing.ids_TK, loss

    def _record(self, ids_TK: Int[Tensor, "T K"], scores_TE: Float[Tensor, "T E"], token_mask: Tensor) -> Tensor | None:
        """Keep the load where something needs it; the auxiliary loss in training."""
        c = self.config
        needed = self.training and (c.gate_bias_update_factor > 0 or c.aux_loss_coeff > 0)
        if not (needed or self.track_load):
            return None
        load_E = self.last_load = expert_load(ids_TK, token_mask, c.n_routed_experts)
        if self.training and c.gate_bias_update_factor > 0:
            self.cumulative_load = load_E if self.cumulative_load is None else self.cumulative_load + load_E
        if not (self.training and c.aux_loss_coeff > 0):
            return None
        loss = aux_loss(scores_TE, load_E, token_mask, c.n_activated_experts)
        self.last_aux_loss = loss.detach()
        return loss

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the correction bias by gate_bias_update_factor towards balance and clear cumulative_load.

        Raises:
            ConfigError: the config updates no bias, or no load was recorded in training since the last update.
        """
        bias_E = self.e_score_correction_bias
        if self.config.gate_bias_update_factor <= 0 or bias_E is None:
            raise ConfigError("update_bias", "gate_bias_update_factor=0", "set it above 0")
        if self.cumulative_load is None:
            raise ConfigError("update_bias", "no load recorded", "run the gate in training mode first")
        bias_E.copy_(updated_correction_bias(bias_E, self.cumulative_load, self.config.gate_bias_update_factor))
        self.cumulative_load = None

    @torch.no_grad()
    def init_weights(self, buffer_device: Any = None, init_std: float = 0.02) -> None:
        """Draw the weight anew from N(0, init_std); biases zero."""
        for row in layout.gate(self.config):
            draw(getattr(self, row.name), row, init_std)
        if self.e_score_correction_bias is not None and not self.e_score_correction_bias.is_meta:
            self.e_score_correction_bias.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Move like any module, but keep the correction bias in float32: bfloat16 would lose its small steps."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = before.to(device=after.device)
        return self


class FakeBalancedGate(nn.Module):
    """Routes evenly without looking at the values: for benchmarks.

    Args:
        config: MoEConfig, or any object with its attributes.
        skip_first_n_experts: leave these experts out.
        noise: 0 for a fixed cycle; up to 1 for random weights and popularity, drawn from a seed taken from x, so
            that a recomputation of the same x agrees.
    """

    bias_update_factor = 0.0

    def __init__(self, config: Any, skip_first_n_experts: int = 0, noise: float = 0.0):
        super().__init__()
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

    def forward(self, x: Tensor, token_mask: Tensor, cp_mesh: Any = None) -> tuple[Tensor, Tensor, None]:
        """(weights [T, K] in x.dtype, indices [T, K] int32, None); the mask has no effect."""
        checks.tokens(x, self.config.dim)
        T, K = x.shape[0], self.config.n_activated_experts
        available = self.config.n_routed_experts - self.skip_first_n_experts
        if self.noise > 0:
            weights_TK, ids_TK = self._draw(x, available)
        else:
            ids_TK = torch.arange(T * K, device=x.device).view(T, K) % available
            weights_TK = torch.full((T, K), 1.0 / K, device=x.device)
        return weights_TK.to(x.dtype), (ids_TK + self.skip_first_n_experts).to(torch.int32), None

    def _draw(self, x: Tensor, available: int) -> tuple[Tensor, Tensor]:
        T, K = x.shape[0], self.config.n_activated_experts
        seed = int(1e6 * x.detach().flatten()[:4].float().sum().nan_to_num()) & 0x7FFFFFFF
        generator = torch.Generator(x.device).manual_seed(seed)
        random_TK = torch.rand(T, K, generator=generator, device=x.device)
        random_TK = random_TK / random_TK.sum(-1, keepdim=True)
        weights_TK = (1.0 - self.noise) / K + self.noise * random_TK
        popularity_E = torch.randn(available, generator=generator, device=x.device) * self.noise * 0.1
        score_TE = torch.rand(T, available, generator=generator, device=x.device) + popularity_E
        return weights_TK, score_TE.topk(K, dim=-1).indices

    def update_bias(self) -> None:
        """Nothing: there is no bias."""

    def init_weights(self, buffer_device: Any = None, init_std: float = 0.02) -> None:
        """Nothing: there are no parameters."""
