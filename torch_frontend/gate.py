"""Step 2 as a module: the router, its correction bias and what it records of the load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moebius.core import checks, layout
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError, StateDictError
from moebius.core.stages import Tap, untapped
from moebius.torch_frontend.checks import check_arrays, check_devices
from moebius.torch_frontend.dtypes import accumulate_dtype, as_dtype
from moebius.torch_frontend.losses import attach_aux_loss, losses, sum_over_ranks
from moebius.torch_frontend.matmul import linear
from moebius.torch_frontend.recompute import once
from moebius.torch_frontend.replay import RouterReplay
from moebius.torch_frontend.route import Routing, expert_load, quiet, route, updated_correction_bias
from moebius.torch_frontend.sharding import local
from moebius.torch_frontend.statedict import AllOrNothing
from moebius.torch_frontend.weights import draw

if TYPE_CHECKING:
    from jaxtyping import Float


class Gate(AllOrNothing):
    """The router: tokens to experts and weights.

    Args:
        config: MoEConfig, or any object with its attributes.
        gate_precision: dtype of the logits; None for x's. The scores are always promote_types(..., float32).
        dtype: of x inside; None for x's. param_dtype: to store in; None for config.gate_dtype, else config.dtype.
        device: of the parameters.

    Attributes:
        weight [E, dim], bias [E] or None: parameters.
        e_score_correction_bias: [E] float32, whatever the module is cast to; None where the config holds none. May be
            made a DTensor, replicated over the ranks whose load `update_bias` is to sum.
        aux_loss_scale: multiplies the gradient of every loss, beside its coefficient; a number, or a tensor of one,
            which may change without compiling anew. `set_aux_loss_scale` sets it in all gates of a model.
        track_load: record the load even when neither a loss nor an update needs it.
        tap: called as tap("logits", value) before routing; returns the value to go on with.
        last_load [E] int32, last_aux_loss, last_z_loss, last_seq_aux_loss: of the latest call, None before it or when
            nothing is recorded. The load is that of this rank, a loss that of all ranks of cp_mesh.
        cumulative_load [E] int32: of this rank since the latest `update_bias`, None before the first training call.
            A recomputation under activation checkpointing adds nothing.
        replay: RouterReplay, or None without config.enable_routing_replay; see moebius.torch_frontend.replay.
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
        self.aux_loss_scale: Any = 1.0
        self.track_load = False
        self.tap: Tap = untapped
        self.replay = RouterReplay(n) if self.config.enable_routing_replay else None
        self.last_load: Tensor | None = None
        self.last_aux_loss: Tensor | None = None
        self.last_z_loss: Tensor | None = None
        self.last_seq_aux_loss: Tensor | None = None
        self.cumulative_load: Tensor | None = None
        self.init_weights()

    @property
    def bias_update_factor(self) -> float:
        """Step of `update_bias`: config.gate_bias_update_factor."""
        return float(self.config.gate_bias_update_factor)

    def forward(
        self, x: Tensor, token_mask: Tensor, cp_mesh: Any = None, n_sequences: int = 1
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Route tokens.

        Args:
            x: [T, dim] floating. token_mask: [T] bool; a masked token is routed but counts in no statistic.
            cp_mesh: DeviceMesh or ProcessGroup of the ranks that hold other parts of the same sequences: the losses
                are then those of all of their tokens, and each rank has its own tokens' share of the gradient.
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
        check_devices(x=x, token_mask=token_mask, weight=self.weight)
        x = quiet(x if self.dtype is None else x.to(self.dtype), token_mask)
        logits_TE = self.tap("logits", self._project(x))
        routing = self._route(logits_TE)
        load_E = self._record_load(routing, token_mask)
        found = self._losses(logits_TE, routing, load_E, token_mask, cp_mesh, n_sequences)
        weights_TK = routing.weights_TK
        for name, loss in found.items():
            weights_TK = attach_aux_loss(weights_TK, loss, self.config.losses[name] * self.aux_loss_scale)
        out = accumulate_dtype(x.dtype) if self.config.router_weights_fp32 else x.dtype
        return weights_TK.to(out), routing.ids_TK, found.get("aux_loss")

    def _route(self, logits_TE: Float[Tensor, "T E"]) -> Routing:
        correction, forced_TK = self.e_score_correction_bias, None
        if self.replay is not None:
            forced_TK = self.replay.chosen(logits_TE.shape[0], self.config.n_activated_experts)
        routing = route(
            logits_TE,
            self.config,
            correction_bias_E=None if correction is None else local(correction),
            ids_TK=None if forced_TK is None else forced_TK.to(logits_TE.device),
        )
        if self.replay is not None:
            self.replay.keep(routing.ids_TK)
        return routing

    def _record_load(self, routing: Routing, token_mask: Tensor) -> Tensor | None:
        """Keep the load where something needs it, and return it there."""
        c = self.config
        updates = self.training and c.gate_bias_update_factor > 0
        if not (updates or self.track_load or (self.training and c.aux_loss_coeff > 0)):
            return None
        load_E = expert_load(routing.ids_TK, token_mask, c.n_routed_experts)
        if _transformed():
            return load_E
        self.last_load = load_E
        if updates:
            # The first pass adds too: selective checkpointing demands the same operators of a recomputation.
            self.cumulative_load = once(load_E) + (0 if self.cumulative_load is None else self.cumulative_load)
        return load_E

    def _losses(
        self,
        logits_TE: Float[Tensor, "T E"],
        routing: Routing,
        load_E: Tensor | None,
        token_mask: Tensor,
        cp_mesh: Any,
        n_sequences: int,
    ) -> dict[str, Tensor]:
        """In training the losses of the config, by name and not yet times their coefficients."""
        c = self.config
        if not (self.training and c.losses):
            return {}
        # Where nothing but the scores chooses, the chosen are each token's best.
        biased = c.routing_rule.uses_bias and self.e_score_correction_bias is not None
        by_score = not biased and c.n_expert_groups <= 1 and self.replay is None
        best_TK = routing.ids_TK if by_score else None
        settings: dict[str, Any] = {"n_sequences": n_sequences, "best_TK": best_TK, "cp_mesh": cp_mesh}
        found = losses(logits_TE, routing, load_E, token_mask, c, **settings)
        if not _transformed():
            for name, loss in found.items():
                setattr(self, f"last_{name}", loss.detach())
        return found

    @torch.no_grad()
    def update_bias(self, group: Any = None) -> None:
        """Move the correction bias by gate_bias_update_factor towards balance and clear cumulative_load.

        Call it once an optimizer step, after the optimizer. All ranks that route tokens of one batch have to take the
        same step: a correction bias that is a DTensor sums the load over its whole mesh, a plain one over `group`.

        Args:
            group: ProcessGroup, or DeviceMesh, of the ranks whose load counts; None for this rank alone.
        Raises:
            ConfigError: the config updates no bias, no load was recorded in training since the last update, or both
                a DTensor and a group say over which ranks to sum.
        """
        correction = self.e_score_correction_bias
        if self.config.gate_bias_update_factor <= 0 or correction is None:
            raise ConfigError("update_bias", "gate_bias_update_factor=0", "set it above 0")
        if self.cumulative_load is None:
            raise ConfigError("update_bias", "no load recorded", "run the gate in training mode first")
        mesh = getattr(correction, "device_mesh", None)
        if mesh is not None and group is not None:
            found = "a correction bias with a mesh of its own, a DTensor"
            raise ConfigError("update_bias over a group", found, "leave the group out")
        (load_E,) = sum_over_ranks([self.cumulative_load], group if mesh is None else mesh)
        bias_E = local(correction)
        bias_E.copy_(updated_correction_bias(bias_E, load_E, self.config.gate_bias_update_factor))
        self.cumulative_load = None

    @torch.no_grad()
    def init_weights(self, buffer_device: Any = None, init_std: float = 0.02) -> None:
        """Draw the weight anew from N(0, init_std); biases zero."""
        for row in layout.gate(self.config):
            draw(getattr(self, row.name), row, init_std)
        if self.e_score_correction_bias is not None and not self.e_score_correction_bias.is_meta:
            self.e_score_correction_bias.zero_()

    def _project(self, x: Float[Tensor, "T dim"]) -> Tensor:
        """Logits in gate_precision, also where autocast would have them shorter; without one as autocast has it."""
        if self.gate_precision is None:
            return linear(x, self.weight, self.bias)
        return linear(x.to(self.gate_precision), self.weight, self.bias, autocast=False)

    def _read(self, name: str, value: Any) -> Any:
        """A checkpoint's correction bias in float32, whatever it was saved in."""
        own = self.e_score_correction_bias
        if own is None or name != "e_score_correction_bias":
            return value
        placements = getattr(own, "placements", ())
        if not all(placement.is_replicate() for placement in placements):
            raise StateDictError(f"{name} replicated over its mesh", f"a DTensor placed {placements}", "replicate it")
        return value.to(torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        """Move like any module, but keep the correction bias in float32: bfloat16 would lose its small steps."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = before.to(device=after.device)
        return self


def set_aux_loss_scale(module: nn.Module, scale: Any) -> None:
    """Set `aux_loss_scale` of every gate in `module`: the gradient of each loss is scale * coefficient * its own.

    For what the model's loss is scaled by and the router's losses would miss: micro-batches that are averaged, ranks
    of a context-parallel mesh whose gradients are averaged, a loss scale of 16-bit training. Before the forward pass.

    Args:
        scale: a number, or a tensor of one. NeMo Automodel's MoEAuxLossAutoScaler.main_loss_backward_scale.
    Raises:
        ConfigError: there is no gate in `module`.
    """
    gates = [gate for gate in module.modules() if isinstance(gate, Gate)]
    if not gates:
        raise ConfigError(f"the scale of the router's losses in a {type(module).__name__}", "no Gate", "pass a model")
    for gate in gates:
        gate.aux_loss_scale = scale


def _transformed() -> bool:
    """Whether torch.func transforms this call: what it hands out is dead afterwards and must not be kept."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
