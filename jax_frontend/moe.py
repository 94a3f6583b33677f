"""Steps 1 to 9 as one module: gate, routed experts, shared experts, latent projections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from moebius.core import activations, checks, layout
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import ConfigError, ShapeError
from moebius.core.stages import OUTPUT, Tap, untapped
from moebius.jax_frontend.activate import activate
from moebius.jax_frontend.checks import check_arrays
from moebius.jax_frontend.dtypes import as_dtype, promoted
from moebius.jax_frontend.fake_gate import FakeBalancedGate
from moebius.jax_frontend.gate import Gate
from moebius.jax_frontend.grouped_experts import GroupedExperts
from moebius.jax_frontend.matmul import linear
from moebius.jax_frontend.over_mesh import over_layer
from moebius.jax_frontend.route import quiet
from moebius.jax_frontend.weights import draw, new_parameter

if TYPE_CHECKING:
    from jaxtyping import Float


class Linear(nnx.Module):
    """A dense projection: weight [out, in] and bias [out] or None, cast to x.dtype at use.

    Args:
        n_in, n_out: widths. bias: hold a bias. param_dtype: to store in.
        kernel_init: (key, shape, dtype) -> array for the weight; None for N(0, 0.02).
        kernel_metadata: of the weight's nnx.Param, see GroupedExperts; None for none.
        rngs: its `params` stream gives a key.
    """

    weight: nnx.Param[Array]

    def __init__(
        self,
        n_in: int,
        n_out: int,
        bias: bool,
        *,
        param_dtype: Any,
        kernel_init: Any = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.rows = layout.linear("", n_in, n_out, str(param_dtype), bias)
        self.bias: nnx.Param[Array] | None = nnx.data(None)
        for row in self.rows:
            value = new_parameter(row, rngs, kernel_init=kernel_init, kernel_metadata=kernel_metadata)
            setattr(self, row.name.removeprefix("."), value)

    def __call__(self, x: Array) -> Array:
        """[..., out] in x.dtype."""
        x = jnp.asarray(x)  # NumPy's float64 is JAX's only in x64 mode
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Draw the weight anew from N(0, init_std); bias zero."""
        for row in self.rows:
            parameter = getattr(self, row.name.removeprefix("."))
            parameter[...] = draw(row, rngs, init_std)


class SharedExperts(nnx.Module):
    """The MLP that every token visits: all shared experts side by side.

    Args:
        config: MoEConfig with n_shared_experts > 0. param_dtype: to store in; None for the config's.
        kernel_init, kernel_metadata, rngs: of the projections, see Linear.

    Attributes:
        gate_proj (swiglu only, else None), up_proj, down_proj: Linear.
    """

    def __init__(
        self,
        config: Any,
        *,
        param_dtype: Any = None,
        kernel_init: Any = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = c = MoEConfig.of(config)
        self.activation = activations.resolve(c.shared_expert_activation, c)
        kwargs: dict[str, Any] = {"param_dtype": param_dtype or c.dtype, "kernel_init": kernel_init, "rngs": rngs}
        kwargs["kernel_metadata"] = kernel_metadata
        inter, bias = c.shared_inter_dim, c.expert_bias
        self.gate_proj = Linear(c.dim, inter, bias, **kwargs) if self.activation.gated else None
        self.up_proj = Linear(c.dim, inter, bias, **kwargs)
        self.down_proj = Linear(inter, c.dim, bias, **kwargs)

    def __call__(self, x: Array) -> Array:
        """[T, dim] to [T, dim], x.dtype."""
        hidden_TU = self.up_proj(x)
        if self.gate_proj is not None:
            hidden_TU = jnp.concatenate([self.gate_proj(x), hidden_TU], axis=-1)
        return self.down_proj(activate(hidden_TU, None, self.activation))


class MoE(nnx.Module):
    """A mixture-of-experts layer: y = routed experts of x + shared experts of x.

    Unlike nnx.Linear, `param_dtype` follows the config and the computation follows x, as in PyTorch: parameters are
    cast to x's dtype, x is never promoted to theirs. What its gate records are integers too, so the gradient of a layer
    takes nnx.grad, or jax.grad with allow_int=True; see Gate for what becomes of the records.

    Args:
        config: MoEConfig, or any object with its attributes.
        backend: BackendConfig, or any object with its attributes, or None.
        dtype: to compute in; None for x's. param_dtype: to store in; None for the config's.
        kernel_init: (key, shape, dtype) -> array for every matrix; None for N(0, 0.02).
        kernel_metadata: of the routed experts' matrices, see GroupedExperts; None for none.
        mesh: jax.sharding.Mesh over which the routed experts are spread, see GroupedExperts; None for none.
        rngs: its `params` stream gives a key for each matrix.

    Attributes:
        gate: Gate or FakeBalancedGate. experts: GroupedExperts.
        shared_experts, shared_expert_gate, fc1_latent_proj, fc2_latent_proj: modules, or None where the config
            has none. The load and the losses of the latest call: gate.last_load, gate.last_aux_loss and so on.
        cp_axis: mesh axis, inside of jax.shard_map, whose devices hold other parts of the same sequences, over which
            the gate's losses are taken where a call names none; None for this device alone.
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
        kernel_init: Any = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        mesh: Mesh | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = c = MoEConfig.of(config)
        self.backend = b = BackendConfig.of(backend)
        b.require_own_linear()
        self.dtype = None if dtype is None else as_dtype(dtype)
        kwargs: dict[str, Any] = {"param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        dense = {**kwargs, "param_dtype": param_dtype or c.dtype}
        self.tap: Tap = untapped
        self.cp_axis: Any = None
        self.gate: Gate | FakeBalancedGate
        if b.fake_balanced_gate:
            if b.route is not None:
                asked = f"route={b.route!r} with fake_balanced_gate=True"
                raise ConfigError(asked, "a fake gate looks at nothing", "leave one of them out")
            self.gate = FakeBalancedGate(c, noise=b.fake_gate_noise)
        else:
            self.gate = Gate(c, b.gate_precision, route_backend=b.route, **kwargs)
        self.experts = GroupedExperts(c, b, dtype=dtype, kernel_metadata=kernel_metadata, mesh=mesh, **kwargs)
        has_shared, latent = c.n_shared_experts > 0, c.moe_latent_size
        self.shared_experts = SharedExperts(c, **kwargs) if has_shared else None
        has_shared_gate = has_shared and c.shared_expert_gate
        self.shared_expert_gate = Linear(c.dim, 1, False, **dense) if has_shared_gate else None
        self.fc1_latent_proj = None if latent is None else Linear(c.dim, latent, c.expert_bias, **dense)
        self.fc2_latent_proj = None if latent is None else Linear(latent, c.dim, c.expert_bias, **dense)

    def __call__(self, x: Array, padding_mask: Array | None = None, cp_axis: Any = None) -> Array:
        """The layer's output.

        Args:
            x: [..., S, dim] floating; S is the length of a sequence for the loss that looks at sequences.
            padding_mask: bool, x's leading shape, True for padding: visits no routed expert, counted nowhere. The
                shared experts see padding too, and fc2_latent_proj's bias is added to it. None for none.
            cp_axis: see Gate; None for the attribute of that name.
        Returns:
            x's shape, in the compute dtype.
        Raises:
            ShapeError, DTypeError: an input does not fit.
        """
        check_arrays(x=x, **({} if padding_mask is None else {"padding_mask": padding_mask}))
        x = jnp.asarray(x, self.dtype)  # NumPy's float64 is JAX's only in x64 mode
        if len(x.shape) < 2:
            raise ShapeError(f"x of shape [..., {self.config.dim}]", f"shape {tuple(x.shape)}", "add a token axis")
        cp_axis = self.cp_axis if cp_axis is None else cp_axis
        mesh = self.experts.ep_mesh
        return over_layer(self, mesh, lambda layer, *given: layer._forward(*given, cp_axis), x, padding_mask)

    def _forward(self, x: Array, padding_mask: Array | None, cp_axis: Any) -> Array:
        x_TD = x.reshape(-1, x.shape[-1])
        checks.tokens(x_TD, self.config.dim)
        token_mask_T = self._token_mask(x, padding_mask)
        if padding_mask is not None:
            x_TD = quiet(x_TD, token_mask_T)
        weights_TK, ids_TK, _ = self.gate(x_TD, token_mask_T, cp_axis, max(1, math.prod(x.shape[:-2])))
        weights_TK, ids_TK = self.tap("weights", weights_TK), self.tap("ids", ids_TK)
        latent_TD = x_TD if self.fc1_latent_proj is None else self.tap("latent", self.fc1_latent_proj(x_TD))
        y_TD = self.experts(latent_TD, token_mask_T, weights_TK, ids_TK)
        if self.fc2_latent_proj is not None:
            y_TD = self.fc2_latent_proj(y_TD)
        if self.shared_experts is not None:
            y_TD = y_TD + self.tap("shared", self._shared(x_TD))
        y: Array = self.tap(OUTPUT, y_TD).reshape(x.shape)
        return y

    def _token_mask(self, x: Array, padding_mask: Array | None) -> Array:
        if padding_mask is None:
            return jnp.ones(math.prod(x.shape[:-1]), bool)
        if tuple(padding_mask.shape) != tuple(x.shape[:-1]):
            raise ShapeError(
                f"padding_mask of x's leading shape {tuple(x.shape[:-1])}",
                f"shape {tuple(padding_mask.shape)}",
                "give one entry per token",
            )
        mask_T = padding_mask.reshape(-1)
        checks.token_mask(mask_T, mask_T.shape[0], "padding_mask")
        return ~mask_T

    def _shared(self, x_TD: Float[Array, "T D"]) -> Array:
        assert self.shared_experts is not None
        out_TD = self.shared_experts(x_TD)
        if self.shared_expert_gate is None:
            return out_TD
        opening_T1 = jax.nn.sigmoid(promoted(self.shared_expert_gate(x_TD)))
        return (promoted(out_TD) * opening_T1).astype(x_TD.dtype)

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Draw every weight anew from N(0, init_std); biases zero."""
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear | Gate | GroupedExperts):
                module.init_weights(init_std, rngs=rngs)
