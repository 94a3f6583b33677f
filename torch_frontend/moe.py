"""Steps 1 to 9 as one module: gate, routed experts, shared experts, latent projections."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moebius.core import activations, checks, layout
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import ShapeError
from moebius.core.stages import OUTPUT, Tap, untapped
from moebius.torch_frontend.activate import activate
from moebius.torch_frontend.checks import check_arrays
from moebius.torch_frontend.dtypes import as_dtype, promoted
from moebius.torch_frontend.fake_gate import FakeBalancedGate
from moebius.torch_frontend.gate import Gate
from moebius.torch_frontend.grouped_experts import GroupedExperts
from moebius.torch_frontend.matmul import linear
from moebius.torch_frontend.route import quiet
from moebius.torch_frontend.statedict import AllOrNothing
from moebius.torch_frontend.weights import draw

if TYPE_CHECKING:
    from jaxtyping import Float


class Linear(nn.Module):
    """A dense projection: weight [out, in] and bias [out] or None, cast to x.dtype at use.

    Args:
        n_in, n_out: widths. bias: hold a bias. param_dtype: to store in. device: of the parameters.
    """

    weight: nn.Parameter

    def __init__(self, n_in: int, n_out: int, bias: bool, *, param_dtype: Any, device: Any = None):
        super().__init__()
        self.rows = layout.linear("", n_in, n_out, str(param_dtype), bias)
        self.bias: nn.Parameter | None = None
        for row in self.rows:
            value = torch.empty(row.shape, dtype=as_dtype(param_dtype), device=device)
            setattr(self, row.name.removeprefix("."), nn.Parameter(value))
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] in x.dtype."""
        return linear(x, self.weight, self.bias)

    def init_weights(self, buffer_device: Any = None, init_std: float = 0.02) -> None:
        """Draw the weight anew from N(0, init_std); bias zero."""
        for row in self.rows:
            draw(getattr(self, row.name.removeprefix(".")), row, init_std)


class SharedExperts(nn.Module):
    """The MLP that every token visits: all shared experts side by side.

    Args:
        config: MoEConfig with n_shared_experts > 0. param_dtype: to store in; None for the config's.
        device: of the parameters.

    Attributes:
        gate_proj (swiglu only, else None), up_proj, down_proj: Linear.
    """

    def __init__(self, config: Any, *, param_dtype: Any = None, device: Any = None):
        super().__init__()
        self.config = c = MoEConfig.of(config)
        self.activation = activations.resolve(c.shared_expert_activation, c)
        kwargs: dict[str, Any] = {"param_dtype": param_dtype or c.dtype, "device": device}
        inter, bias = c.shared_inter_dim, c.expert_bias
        self.gate_proj = Linear(c.dim, inter, bias, **kwargs) if self.activation.gated else None
        self.up_proj = Linear(c.dim, inter, bias, **kwargs)
        self.down_proj = Linear(inter, c.dim, bias, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """[T, dim] to [T, dim], x.dtype."""
        hidden_TU = self.up_proj(x)
        if self.gate_proj is not None:
            hidden_TU = torch.cat([self.gate_proj(x), hidden_TU], dim=-1)
        out_TD: Tensor = self.down_proj(activate(hidden_TU, None, self.activation))
        return out_TD


class MoE(AllOrNothing):
    """A mixture-of-experts layer: y = routed experts of x + shared experts of x.

    Args:
        config: MoEConfig, or any object with its attributes.
        backend: BackendConfig, or any object with its attributes, or None.
        dtype: to compute in; None for x's. param_dtype: to store in; None for the config's.
        device: of the parameters.

    Attributes:
        gate: Gate or FakeBalancedGate. experts: GroupedExperts.
        shared_experts, shared_expert_gate, fc1_latent_proj, fc2_latent_proj: modules, or None where the config
            has none. The load and the losses of the latest call: gate.last_load, gate.last_aux_loss and so on.
        cp_mesh: DeviceMesh of the ranks that hold other parts of the same sequences, over which the gate's losses are
            taken where a call names none; None for this rank alone.
        tap: called as tap(name, value) at the stages outside gate and experts, which have their own; returns the
            value to go on with. `trace.tapped` sets all of them.
    """

    def __init__(
        self,
        config: Any,
        backend: Any = None,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        device: Any = None,
    ):
        super().__init__()
        self.config = c = MoEConfig.of(config)
        self.backend = b = BackendConfig.of(backend)
        b.require_own_linear()
        self.dtype = None if dtype is None else as_dtype(dtype)
        kwargs: dict[str, Any] = {"param_dtype": param_dtype, "device": device}
        dense = {"param_dtype": param_dtype or c.dtype, "device": device}
        self.tap: Tap = untapped
        self.cp_mesh: Any = None
        self.gate: Gate | FakeBalancedGate
        if b.fake_balanced_gate:
            self.gate = FakeBalancedGate(c, noise=b.fake_gate_noise)
        else:
            self.gate = Gate(c, b.gate_precision, **kwargs)
        self.experts = GroupedExperts(c, b, dtype=dtype, **kwargs)
        has_shared, latent = c.n_shared_experts > 0, c.moe_latent_size
        self.shared_experts = SharedExperts(c, **kwargs) if has_shared else None
        has_shared_gate = has_shared and c.shared_expert_gate
        self.shared_expert_gate = Linear(c.dim, 1, False, **dense) if has_shared_gate else None
        self.fc1_latent_proj = None if latent is None else Linear(c.dim, latent, c.expert_bias, **dense)
        self.fc2_latent_proj = None if latent is None else Linear(latent, c.dim, c.expert_bias, **dense)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, cp_mesh: Any = None) -> Tensor:
        """The layer's output.

        Args:
            x: [..., S, dim] floating; S is the length of a sequence for the loss that looks at sequences.
            padding_mask: bool, x's leading shape, True for padding: visits no routed expert, counted nowhere. The
                shared experts see padding too, and fc2_latent_proj's bias is added to it. None for none.
            cp_mesh: see Gate; None for the attribute of that name.
        Returns:
            x's shape, in the compute dtype.
        Raises:
            ShapeError, DTypeError: an input does not fit.
        """
        check_arrays(x=x, **({} if padding_mask is None else {"padding_mask": padding_mask}))
        x = x if self.dtype is None else x.to(self.dtype)
        if len(x.shape) < 2:
            raise ShapeError(f"x of shape [..., {self.config.dim}]", f"shape {tuple(x.shape)}", "add a token axis")
        x_TD = x.reshape(-1, x.shape[-1])
        checks.tokens(x_TD, self.config.dim)
        token_mask_T = self._token_mask(x, padding_mask)
        if padding_mask is not None:
            x_TD = quiet(x_TD, token_mask_T)
        cp_mesh = self.cp_mesh if cp_mesh is None else cp_mesh
        weights_TK, ids_TK, _ = self.gate(x_TD, token_mask_T, cp_mesh, max(1, x.shape[:-2].numel()))
        weights_TK, ids_TK = self.tap("weights", weights_TK), self.tap("ids", ids_TK)
        latent_TD = x_TD if self.fc1_latent_proj is None else self.tap("latent", self.fc1_latent_proj(x_TD))
        routed = latent_TD, token_mask_T, weights_TK, ids_TK
        shared: list[Tensor] = []
        # Of experts in a wrapper nothing is computed inside: one for checkpoints would not do it again.
        overlaps = self.backend.dispatcher_async_dispatch and hasattr(type(self.experts), "meanwhile")
        if self.shared_experts is not None and overlaps:
            with self.experts.meanwhile(partial(self._share, x_TD, shared)):
                y_TD = self.experts(*routed)
        else:
            y_TD = self.experts(*routed)
        if self.fc2_latent_proj is not None:
            y_TD = self.fc2_latent_proj(y_TD)
        if self.shared_experts is not None:
            if not shared:
                self._share(x_TD, shared)
            y_TD = y_TD + shared[0]
        y: Tensor = self.tap(OUTPUT, y_TD).reshape(x.shape)
        return y

    def _token_mask(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is None:
            return torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
        if tuple(padding_mask.shape) != tuple(x.shape[:-1]):
            raise ShapeError(
                f"padding_mask of x's leading shape {tuple(x.shape[:-1])}",
                f"shape {tuple(padding_mask.shape)}",
                "give one entry per token",
            )
        mask_T = padding_mask.reshape(-1)
        checks.token_mask(mask_T, mask_T.shape[0], "padding_mask")
        return ~mask_T

    def _share(self, x_TD: Float[Tensor, "T D"], into: list[Tensor]) -> None:
        """Append the shared experts' output."""
        into.append(self.tap("shared", self._shared(x_TD)))

    def _shared(self, x_TD: Float[Tensor, "T D"]) -> Tensor:
        assert self.shared_experts is not None
        out_TD: Tensor = self.shared_experts(x_TD)
        if self.shared_expert_gate is None:
            return out_TD
        opening_T1 = torch.sigmoid(promoted(self.shared_expert_gate(x_TD)))
        return (promoted(out_TD) * opening_T1).to(out_TD.dtype)

    def init_weights(self, buffer_device: Any = None, init_std: float = 0.02) -> None:
        """Draw every weight anew from N(0, init_std); biases zero."""
        for module in self.modules():
            if isinstance(module, Linear | Gate | GroupedExperts):
                module.init_weights(buffer_device, init_std)
