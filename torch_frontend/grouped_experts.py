"""Steps 3 to 9: the routed experts as modules, which hold the parameters of `experts` and choose for it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moebius.core import layout
from moebius.core.activations import Activation
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.errors import ConfigError, Unsupported
from moebius.core.registry import Problem
from moebius.core.stages import Tap, untapped
from moebius.torch_frontend import preflight
from moebius.torch_frontend.activate import activate
from moebius.torch_frontend.checks import check_arrays
from moebius.torch_frontend.dispatch import DISPATCHERS, Dispatcher, During, Local, Options
from moebius.torch_frontend.dispatch_choice import agreed
from moebius.torch_frontend.dispatch_limits import require_counts
from moebius.torch_frontend.dtypes import as_dtype, computed
from moebius.torch_frontend.experts import WeightedActivation, experts
from moebius.torch_frontend.matmul import choose
from moebius.torch_frontend.sharding import ep_dimension, local, mesh_of, shard_experts
from moebius.torch_frontend.statedict import AllOrNothing
from moebius.torch_frontend.weights import draw

_ACTIVATIONS = ("expert_activation_grouped", "expert_activation")


class _Experts(AllOrNothing):
    """What the three modules share: the parameters, and the forward pass over a dispatcher."""

    gate_and_up_projs: nn.Parameter
    down_projs: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None
    _work: Callable[[], None] | None = None

    def __init__(
        self, config: Any, backend: Any, default_backend: str | None, dtype: Any, param_dtype: Any, device: Any
    ):
        super().__init__()
        self.config = MoEConfig.of(config)
        self.backend = BackendConfig.of(backend)
        if self.backend.te_fp8 is not None:
            do = "run the layer inside transformer_engine.pytorch.autocast(recipe=...)"
            raise Unsupported(f"te_fp8={self.backend.te_fp8!r}", "the experts take FP8 from the autocast alone", do)
        _require_own_steps(self.backend)
        self.dtype = None if dtype is None else as_dtype(dtype)
        self.n_routed_experts = self.config.n_routed_experts
        self.expert_bias = self.config.expert_bias
        self.is_gated = self.config.activation.gated
        self.tap: Tap = untapped
        self._activation: WeightedActivation | None = None
        self._dispatchers: dict[torch.dtype | None, Dispatcher] = {}  # that it built by itself, by the tokens' dtype
        self.gate_up_proj_bias = None
        self.down_proj_bias = None
        self._names = tuple(row.name for row in layout.experts(self.config))
        for row in layout.experts(self.config):
            stored = as_dtype(param_dtype or row.dtype)
            setattr(self, row.name, nn.Parameter(torch.empty(row.shape, dtype=stored, device=device)))
        self._backend_asked = self.backend.experts or default_backend
        self._choose_backend()  # refuses one that cannot serve
        self.init_weights()

    @property
    def backend_name(self) -> str:
        """Of the grouped matmul: what was named, or chosen for many tokens where the parameters are now."""
        return self._backend_asked or self._choose_backend()

    def _choose_backend(self) -> str:
        """For the dtype that it will most likely see. On the CPU it may move to a GPU, where there is one."""
        weight = self.gate_and_up_projs
        may_move = weight.device.type == "cpu" and torch.cuda.is_available()
        rows = torch.empty(0, dtype=self.dtype or weight.dtype, device="meta" if may_move else weight.device)
        shapes = {row.name: row.shape for row in layout.experts(self.config)}
        return choose(self._backend_asked, rows, shapes["gate_and_up_projs"], shapes["down_projs"]).name

    @contextmanager
    def meanwhile(self, work: Callable[[], None]) -> Iterator[None]:
        """In it a call computes `work`, once, while its tokens travel, by a dispatcher that can."""
        self._work = work
        try:
            yield
        finally:
            self._work = None

    def forward(self, x: Tensor, token_mask: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """[T, D] in the compute dtype (`dtype` of the constructor, else autocast's, else x's); see `experts`."""
        check_arrays(x=x)
        parameters, x = self._parameters_by_name(), computed(x, self.dtype)
        dispatcher: Any = self._dispatcher(mesh_of(parameters), x.dtype)
        if dispatcher.ranks > 1 and hasattr(dispatcher, "layer"):  # not of a user's own
            dispatcher.layer = preflight.begin(self, dispatcher.group)
        if self._work is not None:
            dispatcher = During(dispatcher, self._work)
        return experts(
            {name: local(value) for name, value in parameters.items()},
            x,
            token_mask,
            weights,
            indices,
            config=self.config,
            backend=self._backend_asked,
            dispatcher=dispatcher,
            activation=self._activation,
            double_backward=self.backend.double_backward,
            check=self.backend.checks == "full",
            tap=self.tap,
        )

    def _parameters_by_name(self) -> dict[str, Tensor]:
        """As attributes, which a parametrization or FSDP may compute, not as what is registered."""
        return {name: getattr(self, name) for name in self._names}

    def _dispatcher(self, mesh: Any, dtype: torch.dtype) -> Dispatcher:
        """The dispatcher of a call over the ranks of `mesh`, for tokens of that dtype."""
        raise NotImplementedError

    def _choose(self, name: str | None, mesh: Any, dtype: torch.dtype | None = None) -> Dispatcher:
        """As `_built`, over the ranks of `mesh`, None for one rank."""
        return self._built(name, None if mesh is None else mesh.get_group(), dtype)

    def _built(self, name: str | None, group: Any, dtype: torch.dtype | None = None) -> Dispatcher:
        """The dispatcher of that name over the ranks of `group`, None for one rank; all ranks call.

        Args:
            dtype: of the tokens; None for what it will most likely be.
        """
        group = None if group is None or group.size() == 1 else group
        weight, ranks = self.gate_and_up_projs, 1 if group is None else group.size()
        # Of a named one the tokens' dtype is known where they come, and is checked there: an autocast may choose it.
        dtype = dtype or self.dtype or (weight.dtype if name is None else torch.bfloat16)
        may_move = name is not None and weight.device.type == "cpu" and torch.cuda.is_available()
        problem = Problem(
            device="meta" if may_move else weight.device.type,
            dtype=str(dtype)[6:],
            dim=self.config.expert_dim,
            inter_dim=self.config.moe_inter_dim,
            n_experts=self.config.n_routed_experts // ranks,
            ranks=ranks,
        )
        if name == "torch" or (name is None and group is not None and self.backend.dispatcher_max_tokens is not None):
            name = "allgather"
        options, combine_dtype = self._options(), self.backend.combine_dtype
        chosen = agreed(name, problem, options, group, combine_dtype)
        dispatcher: Dispatcher = DISPATCHERS.implementation(chosen)(group, combine_dtype, options)
        return dispatcher

    def close(self) -> None:
        """Give back what its dispatchers hold: buffers, and after a group's last one the thread of its heartbeats.

        By all ranks together, after the last backward pass. A call after it begins anew.
        """
        given, self._dispatchers = self._dispatchers, {}
        for dispatcher in given.values():
            getattr(dispatcher, "close", lambda: None)()

    def _settings(self) -> tuple[int, bool, bool]:
        """num_sms, share and asynchronous of Options."""
        b = self.backend
        return b.dispatcher_num_sms, b.dispatcher_share_token_dispatcher, b.dispatcher_async_dispatch

    def _options(self) -> Options:
        c = self.config
        sizes = c.expert_dim, c.n_routed_experts, c.n_activated_experts
        return Options(*sizes, *self._settings(), self.backend.dispatcher_max_tokens)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ACTIVATIONS and not hasattr(type(self), name):
            own = next(other for other in _ACTIVATIONS if hasattr(type(self), other))
            raise ConfigError(f"{type(self).__name__}.{name}", f"its activation is {own}", f"assign {own}")
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # nn.Module would make a child of a module, past the property
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def init_weights(self, buffer_device: Any = None, init_std: float = 0.02) -> None:
        """Draw the weights anew from N(0, init_std), first gate_and_up_projs, then down_projs; biases zero.

        Args:
            buffer_device: accepted for NeMo Automodel's callers; parameters stay where they are.
        """
        for row in layout.experts(self.config):
            draw(local(getattr(self, row.name)), row, init_std)

    def extra_repr(self) -> str:
        """Sizes, activation and backend."""
        c = self.config
        return (
            f"{c.n_routed_experts} experts, D={c.expert_dim}, I={c.moe_inter_dim}, {c.expert_activation}, "
            f"bias={c.expert_bias}, backend={self.backend_name}"
        )


class GroupedExperts(_Experts):
    """The routed experts as a module: on one rank, or over the ranks of a mesh after `shard_experts`.

    Args:
        config: MoEConfig, or any object with its attributes.
        backend: BackendConfig, or any object with its attributes, or None. `experts` names the grouped matmul's
            backend; None takes the fastest that was measured for such a problem, else the first that supports it.
        dtype: to compute in; None for that of an autocast region, else x's. param_dtype: to store in; None for the
            config's.
        device: of the parameters; None for torch's default.

    Attributes:
        gate_and_up_projs [E, D, U], down_projs [E, I, D]: drawn from N(0, 0.02).
        gate_up_proj_bias [E, U], down_proj_bias [E, D]: zeros, or None without config.expert_bias.
        expert_activation_grouped: assign (hidden [R, U], weights [R, 1]) -> [R, I] to compute that instead of the
            config's activation.
        backend_name: the grouped matmul's backend: what was named, or the choice for many tokens where the parameters
            are; a call of few rows may take another. Of the dispatcher, None is chosen in the first call, for the dtype
            of its tokens.
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
        device: Any = None,
    ):
        super().__init__(config, backend, None, dtype, param_dtype, device)
        # Also refuses a dispatcher that is not there.
        self._on_one_rank = self._choose(self.backend.dispatcher, None)
        self._over_ranks: Any = None

    def _dispatcher(self, mesh: Any, dtype: torch.dtype) -> Dispatcher:
        if mesh is None:
            return self._on_one_rank
        # One that was named takes the tokens or refuses them; what serves tokens of one dtype may not serve another.
        kind = dtype if self.backend.dispatcher is None else None
        if self._over_ranks is None or self._over_ranks != mesh or kind not in self._dispatchers:
            # Ranks talk to one another there: not in a compiled graph.
            once = self._choose_once
            (torch.compiler.disable(once) if torch.compiler.is_compiling() else once)(mesh, kind)
        return self._dispatchers[kind]

    def _choose_once(self, mesh: Any, kind: torch.dtype | None) -> None:
        chosen = self._choose(self.backend.dispatcher, mesh, kind)
        if self._over_ranks is not None and self._over_ranks != mesh:
            self.close()  # after the new one was made: a buffer that both can use stays
        self._over_ranks, self._dispatchers[kind] = mesh, chosen

    def __getstate__(self) -> dict[str, Any]:
        """Without the process group, which can be neither copied nor stored."""
        return {**self.__dict__, "_over_ranks": None, "_dispatchers": {}}

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
        device: Any = None,
    ):
        super().__init__(config, backend, self._default_backend, dtype, param_dtype, device)
        self.dispatcher_backend = BackendConfig(dispatcher=dispatcher_backend).dispatcher
        require_counts(self.dispatcher_backend, self.backend.dispatcher_max_tokens)
        self.dispatcher_num_sms = dispatcher_num_sms
        self.dispatcher_share_token_dispatcher = dispatcher_share_token_dispatcher
        self.dispatcher_async_dispatch = dispatcher_async_dispatch
        self.ep_size, self.ep_rank = 1, 0
        self.token_dispatcher: Dispatcher | None = None

    def _shard(self, ep_mesh: Any) -> None:
        mesh = ep_dimension(ep_mesh)
        spread = mesh_of(self._parameters_by_name())
        if spread is not None and spread != mesh:
            raise ConfigError(f"a dispatcher over {mesh}", f"parameters on {spread}", "pass the parameters' mesh")
        dispatcher: Dispatcher = Local()
        if mesh.size() > 1:
            dispatcher = self._choose(self.dispatcher_backend, mesh)
            if spread is None:
                shard_experts(self, mesh)
            preflight.register(self, mesh)
        self._take(dispatcher)

    def _take(self, dispatcher: Dispatcher) -> None:
        """Send tokens by this one from now on."""
        self.close()  # after the new one was made: a buffer that both can use stays
        self.ep_size, self.ep_rank, self.token_dispatcher = dispatcher.ranks, dispatcher.rank, dispatcher

    def close(self) -> None:
        """See GroupedExperts.close; a call after it needs `init_token_dispatcher` again."""
        super().close()
        given, self.token_dispatcher = self.token_dispatcher, None
        self.ep_size, self.ep_rank = 1, 0
        getattr(given, "close", lambda: None)()  # a user's own may have none

    def _settings(self) -> tuple[int, bool, bool]:
        return self.dispatcher_num_sms, self.dispatcher_share_token_dispatcher, self.dispatcher_async_dispatch

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that sends its tokens over the same ranks: a process group cannot be copied."""
        shared = [getattr(self, "moe_mesh", None)]
        if not hasattr(self.token_dispatcher, "__deepcopy__"):
            shared.append(self.token_dispatcher)
        memo.update({id(each): each for each in shared})
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def _dispatcher(self, mesh: Any, dtype: torch.dtype) -> Dispatcher:
        given: Any = self.token_dispatcher
        if given is not None:
            # Where none was named, tokens that the one chosen does not take go by another.
            fits = self.dispatcher_backend is not None or getattr(given, "takes", None) in (None, dtype)
            return given if fits else self._another(given.group, dtype)
        if mesh is not None and mesh.size() > 1:
            raise ConfigError(
                f"{type(self).__name__}.forward over {mesh.size()} ranks",
                "no dispatcher",
                "call init_token_dispatcher(ep_mesh) first",
            )
        return Local()

    def _another(self, group: Any, dtype: torch.dtype) -> Dispatcher:
        if dtype not in self._dispatchers:
            build = self._built
            build = torch.compiler.disable(build) if torch.compiler.is_compiling() else build
            self._dispatchers[dtype] = build(None, group, dtype)
        return self._dispatchers[dtype]

    @property
    def expert_activation(self) -> WeightedActivation:
        """What is computed between the projections; see `experts`."""
        return self._activation or weighted_activation(self.config)

    @expert_activation.setter
    def expert_activation(self, value: WeightedActivation | None) -> None:
        self._activation = value


class GroupedExpertsDeepEP(_Dispatched):
    """The routed experts over the ranks of a mesh, by a dispatcher of their own; complete on one rank without.

    Args:
        config, backend, dtype, param_dtype, device: as in GroupedExperts.
        dispatcher_backend: how tokens reach other ranks, one of moebius.core.config.DISPATCHERS.
        dispatcher_num_sms, dispatcher_share_token_dispatcher, dispatcher_async_dispatch: of DeepEP.

    Attributes:
        As in GroupedExperts; the assignable activation is `expert_activation`.
        token_dispatcher: None before `init_token_dispatcher`. ep_size, ep_rank: 1 and 0 before it.

    Raises:
        ConfigError, BackendUnavailable, Unsupported: the config contradicts itself, or a named backend cannot serve.
    """

    def init_token_dispatcher(self, ep_mesh: Any) -> None:
        """Spread the experts over `ep_mesh`, keeping their values, and build the dispatcher.

        Args:
            ep_mesh: torch.distributed DeviceMesh of one dimension, or with a dimension "ep". Parameters that are
                sharded over it already stay.
        Raises:
            ConfigError: the mesh does not fit the experts. Unsupported: the dispatcher does not serve so many ranks.
        """
        self._shard(ep_mesh)


class GroupedExpertsTE(_Dispatched):
    """GroupedExpertsDeepEP with Transformer Engine's grouped matmul; one layout of parameters, as everywhere.

    `backend.experts` None means "te". Under Transformer Engine's autocast the matmuls run in its FP8 recipe; with
    activation checkpointing open it inside the checkpointed function, so that the recomputation sees it too.

    Args, Attributes, Raises: as in GroupedExpertsDeepEP.
    """

    _default_backend = "te"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.moe_mesh: Any = None

    def init_token_dispatcher(self, ep_mesh: Any, moe_mesh: Any = None) -> None:
        """As GroupedExpertsDeepEP.init_token_dispatcher; `moe_mesh` as in `set_moe_mesh`."""
        self._shard(ep_mesh)
        self.set_moe_mesh(moe_mesh)

    def set_moe_mesh(self, moe_mesh: Any) -> None:
        """Keep the mesh (dimensions "ep", "ep_shard", "ep_replicate") for callers that read it; None for none.

        The parameters are DTensors of their own meshes, so no state dict needs it.
        """
        self.moe_mesh = moe_mesh


def _require_own_steps(backend: BackendConfig) -> None:
    """Refuse the settings that only Flax has."""
    if backend.remat != "act":
        found = "in PyTorch the experts keep x, the pre-activation and the routing, neither less nor more"
        do = (
            "leave it out; torch.utils.checkpoint computes the whole layer again, double_backward=True keeps every step"
        )
        raise Unsupported(f"remat={backend.remat!r}", found, do)
    own, counted = "in PyTorch this step is moebius' own alone", "in PyTorch ranks count what travels, and drop nothing"
    flax_alone = {"permute": own, "route": own, "dispatcher_bound": counted, "dispatcher_on_overflow": counted}
    for name, found in flax_alone.items():
        asked = getattr(backend, name)
        if asked is not None:
            raise Unsupported(f"{name}={asked!r}", found, "leave it out")


def weighted_activation(config: MoEConfig) -> WeightedActivation:
    """The config's activation as (hidden [R, U], weights [R, 1]) -> [R, I]."""
    return functools.partial(_weighted, of=config.activation)  # which, unlike a closure, can be pickled


def _weighted(hidden_RU: Tensor, weights_R1: Tensor, of: Activation) -> Tensor:
    return activate(hidden_RU, weights_R1[:, 0], of)
