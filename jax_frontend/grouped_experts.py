"""Steps 3 to 9: the routed experts as modules, which hold the parameters of `experts` and choose for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moebius.core import layout
from moebius.core.activations import Activation
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import ConfigError, Unsupported
from moebius.core.registry import Problem
from moebius.core.stages import Tap, untapped
from moebius.jax_frontend.activate import activate
from moebius.jax_frontend.checks import check_arrays
from moebius.jax_frontend.dispatch import DISPATCHERS, Dispatcher, Local
from moebius.jax_frontend.dtypes import as_dtype
from moebius.jax_frontend.experts import WeightedActivation, experts
from moebius.jax_frontend.matmul import choose, device_of
from moebius.jax_frontend.permute import choose_permuter
from moebius.jax_frontend.weights import draw, new_parameter

# The axis of a mesh along which experts are spread; the name is NeMo Automodel's.
EP = "ep"
_ACTIVATIONS = ("expert_activation_grouped", "expert_activation")


class _Experts(nnx.Module):
    """What the three modules share: the parameters, and the forward pass over a dispatcher."""

    gate_and_up_projs: nnx.Param[Array]
    down_projs: nnx.Param[Array]

    def __init__(
        self,
        config: Any,
        backend: Any,
        default_backend: str | None,
        dtype: Any,
        param_dtype: Any,
        kernel_init: Any,
        kernel_metadata: Mapping[str, Any] | None,
        rngs: nnx.Rngs,
    ):
        self.config = MoEConfig.of(config)
        self.backend = BackendConfig.of(backend)
        if self.backend.te_fp8 is not None:
            do = "run the layer inside transformer_engine.jax.autocast(recipe=...)"
            raise Unsupported(f"te_fp8={self.backend.te_fp8!r}", "the experts take FP8 from the autocast alone", do)
        self.dtype = None if dtype is None else as_dtype(dtype)
        self.n_routed_experts = self.config.n_routed_experts
        self.expert_bias = self.config.expert_bias
        self.is_gated = self.config.activation.gated
        self.tap: Tap = untapped
        self._activation: WeightedActivation | None = None
        self.gate_up_proj_bias: nnx.Param[Array] | None = nnx.data(None)
        self.down_proj_bias: nnx.Param[Array] | None = nnx.data(None)
        for row in layout.experts(self.config):
            made = {"dtype": param_dtype, "kernel_init": kernel_init, "kernel_metadata": kernel_metadata}
            setattr(self, row.name, new_parameter(row, rngs, **made))
        # Chosen for the dtype it will most likely see, so that a backend that cannot serve is refused here already.
        self._backend_asked = self.backend.experts or default_backend
        rows = self._no_rows()
        chosen = [choose(self._backend_asked, rows, w.shape).name for w in (self.gate_and_up_projs, self.down_projs)]
        self.backend_name = chosen[0].partition("+")[0]  # without what the context asks of it
        if self.backend.permute is not None:
            choose_permuter(self.backend.permute, rows, self.n_routed_experts)

    def __call__(self, x: Array, token_mask: Array, weights: Array, indices: Array) -> Array:
        """[T, D] in the compute dtype (`dtype` of the constructor, else x's); see `experts`."""
        check_arrays(x=x)
        x = jnp.asarray(x, self.dtype)  # NumPy's float64 is JAX's only in x64 mode
        return experts(
            {row.name: getattr(self, row.name)[...] for row in layout.experts(self.config)},
            x,
            token_mask,
            weights,
            indices,
            config=self.config,
            backend=self._backend_asked,
            dispatcher=self._dispatcher(),
            activation=self._activation,
            double_backward=self.backend.double_backward,
            remat=self.backend.remat,
            permute_backend=self.backend.permute,
            check=self.backend.checks == "full",
            tap=self.tap,
        )

    def _no_rows(self) -> Array:
        """Rows of the shape and dtype that the experts will most likely see, where they will see them."""
        weight = self.gate_and_up_projs
        return jnp.zeros((0, weight.shape[1]), self.dtype or weight.dtype)

    def _dispatcher(self) -> Dispatcher:
        raise NotImplementedError

    # Hidden from type checkers, as Flax hides its own: they would let any attribute pass.
    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if name in _ACTIVATIONS and not hasattr(type(self), name):
                own = next(other for other in _ACTIVATIONS if hasattr(type(self), other))
                raise ConfigError(f"{type(self).__name__}.{name}", f"its activation is {own}", f"assign {own}")
            if isinstance(getattr(type(self), name, None), property):
                object.__setattr__(self, name, value)  # Flax would note an attribute that is none
            else:
                super().__setattr__(name, value)

    def init_weights(self, init_std: float = 0.02, *, rngs: nnx.Rngs) -> None:
        """Draw the weights anew from N(0, init_std), first gate_and_up_projs, then down_projs; biases zero."""
        for row in layout.experts(self.config):
            parameter = getattr(self, row.name)
            parameter[...] = draw(row, rngs, init_std, dtype=parameter.dtype)


class GroupedExperts(_Experts):
    """The routed experts as a module, on one rank.

    Unlike nnx.Linear, `param_dtype` follows the config and the computation follows x, as in PyTorch: parameters are
    cast to x's dtype, x is never promoted to theirs.

    Args:
        config: MoEConfig, or any object with its attributes.
        backend: BackendConfig, or any object with its attributes, or None. `experts` names the grouped matmul's
            backend; None takes the first that supports the problem.
        dtype: to compute in; None for x's. param_dtype: to store in; None for the config's.
        kernel_init: (key, shape, dtype) -> array for the matrices; None for N(0, 0.02).
        kernel_metadata: of the matrices' nnx.Param, e.g. {"out_sharding": ("expert", None, None)}; None for none. In
            jax.set_mesh of a mesh, whose axes are Auto, they are built on it; without a mesh nothing is moved.
        rngs: its `params` stream gives a key for each matrix.

    Attributes:
        gate_and_up_projs [E, D, U], down_projs [E, I, D]: nnx.Param.
        gate_up_proj_bias [E, U], down_proj_bias [E, D]: zeros, or None without config.expert_bias.
        expert_activation_grouped: assign (hidden [R, U], weights [R, 1]) -> [R, I] to compute that instead of the
            config's activation; None for the config's. A part of what jit compares: assign one function to all layers.
        backend_name: the grouped matmul's backend, chosen at construction.
        tap: see `experts`; `untapped` by default.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: the config contradicts itself, or a named backend cannot serve.
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
        rngs: nnx.Rngs,
    ):
        super().__init__(config, backend, None, dtype, param_dtype, kernel_init, kernel_metadata, rngs)
        self.dispatcher = _choose_dispatcher(self.backend.dispatcher, self.config, self._no_rows(), 1)

    def _dispatcher(self) -> Dispatcher:
        return self.dispatcher

    @property
    def expert_activation_grouped(self) -> WeightedActivation:
        """What is computed between the projections; see `experts`."""
        return self._activation or weighted_activation(self.config)

    @expert_activation_grouped.setter
    def expert_activation_grouped(self, value: WeightedActivation | None) -> None:
        self._activation = value


class _Dispatched(_Experts):
    """What the two modules share that are given a dispatcher."""

    _default_backend: str | None = None

    def __init__(
        self,
        config: Any,
        backend: Any = None,
        dispatcher_backend: str = "deepep",
        dispatcher_num_sms: int = 20,
        dispatcher_share_token_dispatcher: bool = True,
        dispatcher_async_dispatch: bool = False,
        *,
        dtype: Any = None,
        param_dtype: Any = None,
        kernel_init: Any = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, backend, self._default_backend, dtype, param_dtype, kernel_init, kernel_metadata, rngs)
        self.dispatcher_backend = BackendConfig(dispatcher=dispatcher_backend).dispatcher
        self.dispatcher_num_sms = dispatcher_num_sms
        self.dispatcher_share_token_dispatcher = dispatcher_share_token_dispatcher
        self.dispatcher_async_dispatch = dispatcher_async_dispatch
        self.ep_size, self.ep_rank = 1, 0
        self.token_dispatcher: Dispatcher | None = None

    def _spread(self, ep_mesh: Any) -> None:
        ranks = _ranks(ep_mesh)
        dispatcher: Dispatcher = Local()
        if ranks > 1:
            dispatcher = _choose_dispatcher(self.dispatcher_backend, self.config, self._no_rows(), ranks)
        self.ep_size, self.ep_rank, self.token_dispatcher = dispatcher.ranks, dispatcher.rank, dispatcher

    def _dispatcher(self) -> Dispatcher:
        return self.token_dispatcher or Local()

    @property
    def expert_activation(self) -> WeightedActivation:
        """What is computed between the projections; see `experts`."""
        return self._activation or weighted_activation(self.config)

    @expert_activation.setter
    def expert_activation(self, value: WeightedActivation | None) -> None:
        self._activation = value


class GroupedExpertsDeepEP(_Dispatched):
    """The routed experts with a dispatcher of their own: the original's class, complete on one rank.

    Several devices are no ranks here: under jit XLA moves what the arrays' shardings ask for, see `kernel_metadata`.

    Args:
        config, backend, dtype, param_dtype, kernel_init, kernel_metadata, rngs: as in GroupedExperts.
        dispatcher_backend: how tokens reach other ranks, one of moebius.core.config.DISPATCHERS; on one rank any.
        dispatcher_num_sms, dispatcher_share_token_dispatcher, dispatcher_async_dispatch: of DeepEP, which is PyTorch's.

    Attributes:
        As in GroupedExperts; the assignable activation is `expert_activation`.
        token_dispatcher: None before `init_token_dispatcher`. ep_size, ep_rank: 1 and 0.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: the config contradicts itself, or a named backend cannot serve.
    """

    def init_token_dispatcher(self, ep_mesh: Any) -> None:
        """Build the dispatcher over `ep_mesh`.

        Args:
            ep_mesh: jax.sharding.Mesh of one axis, or with an axis "ep".
        Raises:
            ConfigError: it is no such mesh. Unsupported: the dispatcher does not serve so many ranks.
        """
        self._spread(ep_mesh)


class GroupedExpertsTE(_Dispatched):
    """GroupedExpertsDeepEP with Transformer Engine's grouped matmul; one layout of parameters, as everywhere.

    `backend.experts` None means "te". Under Transformer Engine's autocast the matmuls run in its FP8 recipe.

    Args, Attributes, Raises: as in GroupedExpertsDeepEP.
    """

    _default_backend = "te"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.moe_mesh: Any = None

    def init_token_dispatcher(self, ep_mesh: Any, moe_mesh: Any = None) -> None:
        """As GroupedExpertsDeepEP.init_token_dispatcher; `moe_mesh` as in `set_moe_mesh`."""
        self._spread(ep_mesh)
        self.set_moe_mesh(moe_mesh)

    def set_moe_mesh(self, moe_mesh: Any) -> None:
        """Keep the mesh (axes "ep", "ep_shard", "ep_replicate") for callers that read it; None for none.

        The arrays have shardings of their own, so no checkpoint needs it.
        """
        self.moe_mesh = moe_mesh


def weighted_activation(config: MoEConfig) -> WeightedActivation:
    """The config's activation as (hidden [R, U], weights [R, 1]) -> [R, I]."""
    return functools.partial(_weighted, of=config.activation)  # which, unlike a closure, can be pickled


def _weighted(hidden_RU: Array, weights_R1: Array, of: Activation) -> Array:
    return activate(hidden_RU, weights_R1[:, 0], of)


def _ranks(mesh: Any) -> int:
    """How many ranks share the experts: the length of the mesh's only axis, or of its axis "ep"."""
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise ConfigError("a jax.sharding.Mesh", f"a {type(mesh).__name__}", "make one with jax.make_mesh")
    names = mesh.axis_names
    if len(names) != 1 and EP not in names:
        found = f"{len(names)} axes named {', '.join(map(str, names))}" if names else "no axis"
        do = f'pass a mesh of the one axis, or name it "{EP}" in jax.make_mesh(axis_shapes, axis_names)'
        raise ConfigError(f'a mesh of one axis, or with an axis "{EP}"', found, do)
    return int(mesh.shape[names[0] if len(names) == 1 else EP])


def _choose_dispatcher(name: str | None, config: MoEConfig, rows: Array, ranks: int) -> Dispatcher:
    problem = Problem(
        device=device_of(rows)[0],
        dtype=str(rows.dtype),
        dim=config.expert_dim,
        inter_dim=config.moe_inter_dim,
        n_experts=config.n_routed_experts // ranks,
        ranks=ranks,
    )
    chosen = DISPATCHERS.choose("allgather" if name == "torch" else name, problem)
    dispatcher: Dispatcher = DISPATCHERS.implementation(chosen)()
    return dispatcher
