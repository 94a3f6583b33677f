"""Steps 3 to 9: the routed experts as modules, which hold the parameters of `experts` and choose for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moebius.core import layout
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.registry import Problem
from moebius.core.stages import Tap, untapped
from moebius.jax_frontend.dispatch import DISPATCHERS, Dispatcher
from moebius.jax_frontend.dtypes import as_dtype
from moebius.jax_frontend.experts import experts
from moebius.jax_frontend.matmul import choose, device_of
from moebius.jax_frontend.weights import draw


class GroupedExperts(nnx.Module):
    """The routed experts as a module, on one rank.

    Unlike nnx.Linear, `param_dtype` follows the config and the computation follows x, as in PyTorch: parameters are
    cast to x's dtype, x is never promoted to theirs.

    Args:
        config: MoEConfig, or any object with its attributes.
        backend: BackendConfig, or any object with its attributes, or None. `experts` names the grouped matmul's
            backend; None takes the first that supports the problem.
        dtype: to compute in; None for x's. param_dtype: to store in; None for the config's.
        kernel_init: (key, shape, dtype) -> array for the matrices; None for N(0, 0.02).
        kernel_metadata: of the matrices' nnx.Param, e.g. {"out_sharding": ("expert", None, None)}; None for none.
        rngs: its `params` stream gives a key for each matrix.

    Attributes:
        gate_and_up_projs [E, D, U], down_projs [E, I, D]: nnx.Param.
        gate_up_proj_bias [E, U], down_proj_bias [E, D]: zeros, or None without config.expert_bias.
        backend_name: the grouped matmul's backend, chosen at construction.
        tap: see `experts`; `untapped` by default.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: the config contradicts itself, or a named backend cannot serve.
    """

    gate_and_up_projs: nnx.Param[Array]
    down_projs: nnx.Param[Array]

    def __init__(
        self,
        config: Any,
        backend: Any = None,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        kernel_init: Any = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = MoEConfig.of(config)
        self.backend = BackendConfig.of(backend)
        self.dtype = None if dtype is None else as_dtype(dtype)
        self.n_routed_experts = self.config.n_routed_experts
        self.expert_bias = self.config.expert_bias
        self.is_gated = self.config.activation.gated
        self.tap: Tap = untapped
        self.gate_up_proj_bias: nnx.Param[Array] | None = nnx.data(None)
        self.down_proj_bias: nnx.Param[Array] | None = nnx.data(None)
        for row in layout.experts(self.config):
            value = draw(row, rngs, dtype=param_dtype, kernel_init=kernel_init)
            metadata = {} if row.zeros else dict(kernel_metadata or {})
            setattr(self, row.name, nnx.Param(value, **metadata))
        weight = self.gate_and_up_projs[...]
        # Chosen for the dtype it will most likely see, so that a backend that cannot serve is refused here already.
        rows = jnp.zeros((0, weight.shape[1]), self.dtype or weight.dtype)
        self.backend_name = choose(self.backend.experts, rows, weight.shape).name
        self.dispatcher = _dispatcher(self.backend.dispatcher, rows, weight.shape)

    def __call__(self, x: Array, token_mask: Array, weights: Array, indices: Array) -> Array:
        """[T, D] in the compute dtype (`dtype` of the constructor, else x's); see `experts`."""
        parameters = {row.name: getattr(self, row.name)[...] for row in layout.experts(self.config)}
        return experts(
            parameters,
            x if self.dtype is None else x.astype(self.dtype),
            token_mask,
            weights,
            indices,
            config=self.config,
            backend=self.backend.experts,
            dispatcher=self.dispatcher,
            check=self.backend.checks == "full",
            tap=self.tap,
        )

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Draw the weights anew from N(0, init_std), first gate_and_up_projs, then down_projs; biases zero."""
        for row in layout.experts(self.config):
            parameter = getattr(self, row.name)
            parameter[...] = draw(row, rngs, init_std, dtype=parameter.dtype)


def _dispatcher(name: str | None, rows: Array, weight_shape: Any) -> Dispatcher:
    e, dim, width = weight_shape
    kind, _ = device_of(rows)
    problem = Problem(device=kind, dtype=str(rows.dtype), dim=dim, inter_dim=width, n_experts=e)
    chosen = DISPATCHERS.choose("allgather" if name == "torch" else name, problem)
    dispatcher: Dispatcher = DISPATCHERS.implementation(chosen)()
    return dispatcher
