"""Steps 3 to 9: the routed experts as modules, which hold the parameters of `experts` and choose for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from moebius.core import layout
from moebius.core.activations import Activation
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import ConfigError, Unsupported
from moebius.core.registry import Problem
from moebius.core.stages import Tap, untapped
from moebius.jax_frontend import preflight
from moebius.jax_frontend.activate import activate
from moebius.jax_frontend.checks import check_arrays
from moebius.jax_frontend.dispatch import Dispatcher, Local
from moebius.jax_frontend.dispatch_ranks import OverRanks, check_bound, choose_dispatcher
from moebius.jax_frontend.dtypes import as_dtype
from moebius.jax_frontend.experts import WeightedActivation
from moebius.jax_frontend.gate import RoutingStatistic
from moebius.jax_frontend.matmul import choose, device_of
from moebius.jax_frontend.over_mesh import Count, Run, check_call, in_force, over_devices, over_none
from moebius.jax_frontend.permute import choose_permuter
from moebius.jax_frontend.sharding import ep_axis, shard_experts
from moebius.jax_frontend.weights import draw, new_parameter, placed_like

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
        if self.backend.dispatcher_max_tokens is not None:
            asked = f"dispatcher_max_tokens={self.backend.dispatcher_max_tokens}"
            raise Unsupported(asked, "in Flax shapes are static, and nothing is read on the host", "leave it out")
        check_bound(self.backend)
        self.dtype = None if dtype is None else as_dtype(dtype)
        self.n_routed_experts = self.config.n_routed_experts
        self.expert_bias = self.config.expert_bias
        self.is_gated = self.config.activation.gated
        self.tap: Tap = untapped
        self._activation: WeightedActivation | None = None
        self.ep_mesh: Mesh | None = None
        counts = self.backend.dispatcher_bound is not None and self.backend.dispatcher_on_overflow == "count"
        dropped = RoutingStatistic(jnp.zeros((), jnp.int32)) if counts else None
        self.last_dropped: RoutingStatistic | None = nnx.data(dropped)
        self.gate_up_proj_bias: nnx.Param[Array] | None = nnx.data(None)
        self.down_proj_bias: nnx.Param[Array] | None = nnx.data(None)
        for row in layout.experts(self.config):
            made = {"dtype": param_dtype, "kernel_init": kernel_init, "kernel_metadata": kernel_metadata}
            setattr(self, row.name, new_parameter(row, rngs, **made))
        # Chosen for the dtype it will most likely see, so that a backend that cannot serve is refused here already.
        self._backend_asked = self.backend.experts or default_backend
        self._choose_backend()
        if self.backend.permute is not None:
            choose_permuter(self.backend.permute, self._no_rows(), self.n_routed_experts)

    @property
    def backend_name(self) -> str:
        """Of the grouped matmul: what was named, or chosen for many tokens on the device in force."""
        return self._backend_asked or self._choose_backend()

    def _choose_backend(self) -> str:
        """For the dtype that it will most likely see."""
        up, down = self.gate_and_up_projs.shape, self.down_projs.shape
        return choose(self._backend_asked, self._no_rows(), up, down).name

    def __call__(self, x: Array, token_mask: Array, weights: Array, indices: Array) -> Array:
        """[T, D] in the compute dtype (`dtype` of the constructor, else x's); see `experts`.

        Over a mesh the arrays are those of all devices; inside of a shard_map over its axis of experts they are, like
        the parameters, this device's.
        """
        check_arrays(x=x)
        if self.ep_mesh is None:
            check_bound(self.backend, 1)
        preflight.begin(self, self.ep_mesh)
        x = jnp.asarray(x, self.dtype)  # NumPy's float64 is JAX's only in x64 mode
        parameters = {row.name: getattr(self, row.name)[...] for row in layout.experts(self.config)}
        tokens = x, token_mask, weights, indices
        run = Run(
            config=self.config,
            backend=self._backend_asked,
            dispatcher=self._dispatcher(),
            activation=self._activation,
            double_backward=self.backend.double_backward,
            remat=self.backend.remat,
            permute_backend=self.backend.permute,
            check=self.backend.checks == "full",
        )
        mesh = self._mesh_around()
        if mesh is None:
            y_TD = over_none(run, self.ep_mesh, parameters, tokens, self.tap)
        else:
            check_call(run, parameters, *tokens)
            y_TD = self.tap("combine", over_devices(run, mesh, parameters, tokens, check_vma=self._check_vma))
        if self.last_dropped is not None:
            self.last_dropped.set_value(jnp.sum(self.dropped(token_mask, indices), dtype=jnp.int32))
        return y_TD

    def dropped(self, token_mask: Array, indices: Array) -> Array:
        """[T] int32: how many routes of each token a call drops, which only a dispatcher_bound can; see BackendConfig.

        Args:
            token_mask [T], indices [T, K]: of the call.
        """
        dispatcher, E = self._dispatcher(), self.config.n_routed_experts
        if not isinstance(dispatcher, OverRanks):
            return jnp.zeros(indices.shape[0], jnp.int32)
        mesh = self._mesh_around()
        if mesh is None:
            return dispatcher.dropped(indices, token_mask, E)
        return over_devices(Count(dispatcher, E), mesh, {}, (indices, token_mask))

    def _mesh_around(self) -> Mesh | None:
        """The mesh over whose devices a call has to be spread; None for one device, and on each of them."""
        mesh = self.ep_mesh
        return None if mesh is None or mesh.size == 1 or in_force(mesh) else mesh

    @property
    def _check_vma(self) -> bool:
        # Transformer Engine's kernels do not say over which axes their results vary.
        return "te" not in (self._backend_asked, self.backend.permute)

    def _no_rows(self) -> Array:
        """Rows of the shape and dtype that the experts will most likely see, where they will see them."""
        weight = self.gate_and_up_projs
        return jnp.zeros((0, weight.shape[1]), self.dtype or weight.dtype)

    def _dispatcher(self) -> Dispatcher:
        raise NotImplementedError

    def _choose(self, name: str | None, mesh: Any) -> Dispatcher:
        """The dispatcher of that name over the axis of experts of `mesh`, None for one rank."""
        axis = None if mesh is None else ep_axis(mesh)
        ranks = 1 if axis is None else int(mesh.shape[axis])
        if mesh is not None:
            check_bound(self.backend, ranks)
        rows, c = self._no_rows(), self.config
        problem = Problem(
            device=device_of(rows)[0],
            dtype=str(rows.dtype),
            dim=c.expert_dim,
            inter_dim=c.moe_inter_dim,
            n_experts=c.n_routed_experts // ranks,
            ranks=ranks,
        )
        return choose_dispatcher(name, problem, c.n_activated_experts, axis if ranks > 1 else None, self.backend)

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
            drawn = draw(row, rngs, init_std, dtype=parameter.dtype)
            parameter.set_value(placed_like(parameter.get_value(), drawn))


class GroupedExperts(_Experts):
    """The routed experts as a module: on one device, or over those of a mesh.

    Unlike nnx.Linear, `param_dtype` follows the config and the computation follows x, as in PyTorch: parameters are
    cast to x's dtype, x is never promoted to theirs.

    Args:
        config: MoEConfig, or any object with its attributes.
        backend: BackendConfig, or any object with its attributes, or None. `experts` names the grouped matmul's
            backend; None takes the fastest that was measured for such a problem, else the first that supports it.
        dtype: to compute in; None for x's. param_dtype: to store in; None for the config's.
        kernel_init: (key, shape, dtype) -> array for the matrices; None for N(0, 0.02).
        kernel_metadata: of the matrices' nnx.Param, e.g. {"out_sharding": ("expert", None, None)}; None for none. In
            jax.set_mesh of a mesh, whose axes are Auto, they are built on it; without a mesh nothing is moved.
        mesh: jax.sharding.Mesh over whose only axis, or axis "ep", the experts are spread, as `shard_experts` does with
            a module that there is; None for none. Under jit each device draws its own experts alone; where the mesh's
            axes are Explicit it has to be in force there, by jax.set_mesh.
        rngs: its `params` stream gives a key for each matrix.

    Attributes:
        gate_and_up_projs [E, D, U], down_projs [E, I, D]: nnx.Param.
        ep_mesh: the mesh, or None. A call takes and gives the tokens of all of its devices, split over them; see
            over_mesh.over_devices. Inside of a shard_map over the axis it is this device's part.
        last_dropped: RoutingStatistic [] int32, how many routes the latest call dropped, in all or, inside of such a
            shard_map, of this device; None without a dispatcher_bound whose overflow is counted. Written as a gate's.
        gate_up_proj_bias [E, U], down_proj_bias [E, D]: zeros, or None without config.expert_bias.
        expert_activation_grouped: assign (hidden [R, U], weights [R, 1]) -> [R, I] to compute that instead of the
            config's activation; None for the config's. A part of what jit compares: assign one function to all layers.
        backend_name: the grouped matmul's backend: what was named, or the choice for many tokens on the device in
            force; a call of few rows may take another.
        tap: see `experts`; `untapped` by default. Over a mesh of the stage "combine" alone, whose rows are all tokens'.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: the config contradicts itself, a named backend cannot serve, or
            the mesh does not fit the experts.
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
        super().__init__(config, backend, None, dtype, param_dtype, kernel_init, kernel_metadata, rngs)
        self._choose(self.backend.dispatcher, mesh)  # refuses a dispatcher that is not there
        if mesh is not None:
            shard_experts(self, mesh)

    def _dispatcher(self) -> Dispatcher:
        return self._choose(self.backend.dispatcher, self.ep_mesh)

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
        dispatcher_backend: str | None = None,
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
        self._dispatched_over: Mesh | None = None

    def _spread(self, ep_mesh: Any) -> None:
        axis = ep_axis(ep_mesh)
        ranks = int(ep_mesh.shape[axis])
        check_bound(self.backend, ranks)
        dispatcher = Local() if ranks == 1 else self._choose(self.dispatcher_backend, ep_mesh)
        if ranks > 1 or not isinstance(ep_mesh, AbstractMesh):
            shard_experts(self, ep_mesh)
        self.ep_size, self.token_dispatcher, self._dispatched_over = ranks, dispatcher, self.ep_mesh

    def _dispatcher(self) -> Dispatcher:
        if self._dispatched_over != self.ep_mesh:
            raise ConfigError(
                f"{type(self).__name__}.__call__ over the mesh {dict(self.ep_mesh.shape) if self.ep_mesh else None}",
                "no dispatcher over it",
                "call init_token_dispatcher(ep_mesh) first",
            )
        return self.token_dispatcher or Local()

    @property
    def expert_activation(self) -> WeightedActivation:
        """What is computed between the projections; see `experts`."""
        return self._activation or weighted_activation(self.config)

    @expert_activation.setter
    def expert_activation(self, value: WeightedActivation | None) -> None:
        self._activation = value


class GroupedExpertsDeepEP(_Dispatched):
    """The routed experts over the devices of a mesh, by a dispatcher of their own; complete on one without.

    Args:
        config, backend, dtype, param_dtype, kernel_init, kernel_metadata, rngs: as in GroupedExperts.
        dispatcher_backend: how tokens reach other ranks, one of moebius.core.config.DISPATCHERS; on one rank any. None
            to choose, which is the default here: the original's, "deepep", is PyTorch's.
        dispatcher_num_sms, dispatcher_share_token_dispatcher, dispatcher_async_dispatch: of DeepEP, which is PyTorch's.

    Attributes:
        As in GroupedExperts; the assignable activation is `expert_activation`.
        token_dispatcher: None before `init_token_dispatcher`. ep_size: 1 before it, then the ranks.
        ep_rank: 0, as one program stands for all ranks; inside of a shard_map token_dispatcher.rank is the device's.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: the config contradicts itself, or a named backend cannot serve.
    """

    def init_token_dispatcher(self, ep_mesh: Any) -> None:
        """Spread the experts over `ep_mesh`, keeping their values, and build the dispatcher.

        Args:
            ep_mesh: jax.sharding.Mesh of one axis, or with an axis "ep".
        Raises:
            ConfigError: the mesh does not fit the experts. Unsupported: the dispatcher does not serve so many ranks.
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
