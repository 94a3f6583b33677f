"""A stand-in for Transformer Engine's expert parallelism in JAX, in JAX's own operations on the CPU.

It has what one device calls inside of jax.shard_map. As strict as the library: what it asserts of shapes and dtypes is
an AssertionError here; what it would trap on the device makes every number NaN. What it leaves unwritten is NaN. Routes
lie in the memory of a handle, and an expert's rows come in an order that is not that of the tokens. Like the library's,
its results do not say over which mesh axes they vary, and there is no derivative.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from fakes import forget

CALLS: list[Any] = []  # of this process, while it traces
_resource: MeshResource | None = None
_config: EpConfig | None = None
_axis = ""  # of the mesh
_pinned = False
_top_k: int | None = None


# ----------------------------------------------------------------------------------------------- made once, and unmade
@dataclass(frozen=True)
class MeshResource:
    """Which axis of the mesh is for what."""

    ep_resource: str | None = None


@contextmanager
def global_shard_guard(resource: MeshResource) -> Any:
    """As the package's."""
    global _resource
    _resource = resource
    try:
        yield
    finally:
        _resource = None


@dataclass(frozen=True)
class EpConfig:
    """As the package's."""

    world_size: int
    rank: int
    ep_size: int
    num_ep_groups: int
    num_experts: int
    num_local_experts: int
    max_tokens_per_rank: int
    recv_capacity_per_rank: int
    hidden_dim: int


def ep_bootstrap(
    world_size: int | None,
    rank: int | None,
    num_experts: int,
    max_tokens_per_rank: int,
    recv_capacity_per_rank: int,
    hidden_dim: int,
    max_token_dtype: Any = jnp.bfloat16,
    max_num_sms: int = 0,
    drop_on_overflow: bool = False,
) -> None:
    """As the package's."""
    global _config, _axis
    from jax._src.mesh import thread_resources

    CALLS.append("ep_bootstrap")
    mesh = thread_resources.env.physical_mesh
    assert world_size is None and rank is None and not drop_on_overflow and max_token_dtype == jnp.bfloat16
    assert _resource is not None and not mesh.empty, "must run inside an active jax.sharding.Mesh and a guard"
    assert _config is None, "EP already initialized"
    ranks = mesh.shape[_resource.ep_resource]
    held = num_experts // ranks
    assert num_experts % ranks == 0 and held & (held - 1) == 0 and num_experts % 4 == 0 and ranks > 1
    assert 2 * hidden_dim % 16 == 0 and max_tokens_per_rank * ranks % 4 == 0
    assert recv_capacity_per_rank >= max_tokens_per_rank > 0
    sizes = (num_experts, held, max_tokens_per_rank, recv_capacity_per_rank, hidden_dim)
    _config, _axis = EpConfig(mesh.size, jax.process_index(), ranks, 1, *sizes), str(_resource.ep_resource)


def ep_finalize() -> None:
    """As the package's."""
    global _config, _top_k
    CALLS.append("ep_finalize")
    jax.clear_caches()
    _config = _top_k = None


def get_ep_config() -> EpConfig:
    """As the package's."""
    if _config is None:
        raise RuntimeError("EpConfig has not been set. Did you call ep_bootstrap()?")
    return _config


# --------------------------------------------------------------------------------------------- what one device computes
def _on_collective_stream(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the package's, which annotates what is called with it from JAX 0.11.1 on."""

    def pinned(*given: Any) -> Any:
        global _pinned
        _pinned = True
        try:
            if jax.__version_info__ < (0, 11, 1):
                return function(*given)
            from jax.experimental.compute_on import compute_on

            where = {"compute_type": "gpu_stream:collective", "out_memory_spaces": jax.memory.Space.Device}
            return compute_on(**where)(lambda: function(*given))()
        finally:
            _pinned = False

    return pinned


class _Rows(NamedTuple):
    """Of a handle: the token of each row, among all devices' padded ones, and its slot; which rows there are."""

    token_R: Array
    slot_R: Array
    here_R: Array
    sizes_e: Array
    ids_NK: Array


def _everyone(value: Array) -> Array:
    """All devices' rows, each padded to the most."""
    more = get_ep_config().max_tokens_per_rank - value.shape[0]
    assert more >= 0, "Token count exceeds HT buffer capacity"
    fill = -1 if jnp.issubdtype(value.dtype, jnp.integer) else jnp.nan
    padded = jnp.pad(value, ((0, more), (0, 0)), constant_values=fill)
    return lax.all_gather(padded, _axis, tiled=True)


def _own(value_NX: Array, tokens: int) -> Array:
    """Of all devices' rows added, this one's."""
    config = get_ep_config()
    total = lax.all_gather(value_NX, _axis).astype(jnp.float32).sum(0).astype(value_NX.dtype)
    first = lax.axis_index(_axis) * config.max_tokens_per_rank
    return lax.dynamic_slice_in_dim(total, first, config.max_tokens_per_rank)[:tokens]


def _read(memory: Array, k: int) -> _Rows:
    config = get_ep_config()
    assert memory.shape[0] == 1 and memory.dtype == jnp.uint8 and _top_k == k, "disagrees with cached top_k"
    ids_NK = lax.bitcast_convert_type(memory.reshape(-1, k, 4), jnp.int32)
    local = (ids_NK - lax.axis_index(_axis) * config.num_local_experts).reshape(-1)[::-1]
    here = (local >= 0) & (local < config.num_local_experts)
    key = jnp.where(here, local, config.num_local_experts)
    order = jnp.argsort(key)[: config.recv_capacity_per_rank]
    order = jnp.pad(order, (0, config.recv_capacity_per_rank - len(order)))
    sizes_e = (key[:, None] == jnp.arange(config.num_local_experts)).sum(0, dtype=jnp.int32)
    flat = len(local) - 1 - order
    return _Rows(flat // k, flat % k, jnp.arange(len(order)) < sizes_e.sum(), sizes_e, ids_NK)


def _check(k: int, alignment: int, is_outer: bool = False) -> None:
    assert alignment == 0 and not is_outer, "shapes of all devices, inside of shard_map"
    assert 0 < k <= min(32, get_ep_config().num_experts)


def _piece(operands: int) -> Callable[[Callable[..., Any], Callable[..., Any]], type]:
    """Of what computes a piece on one device, and of what says its results' shapes and dtypes: as the package's class.

    JAX cannot look into it: there is neither a derivative nor a rule for vmap.
    """

    def made(compute: Callable[..., Any], types: Callable[..., Any]) -> type:
        name = compute.__name__.strip("_")
        operator = Primitive(f"te_ep_{name}")
        operator.multiple_results = True
        operator.def_abstract_eval(
            lambda *given, static: [jax.core.ShapedArray(*one) for one in types(*given, *static)]
        )
        mlir.register_lowering(operator, mlir.lower_fun(lambda *given, static: list(compute(*given, *static))))

        def impl(*given: Any) -> Any:
            CALLS.append(name)
            assert _pinned, "XLA's own collectives could run at the same time, on some devices first"
            out = operator.bind(*given[:operands], static=given[operands:])
            return out if len(out) > 1 else out[0]

        return type(compute.__name__, (), {"impl": staticmethod(impl)})

    return made


def _prepare(topk_idx: Array, top_k: int, alignment: int, is_outer: bool) -> Any:
    """Routes of all devices, into a handle's memory."""
    global _top_k
    _check(top_k, alignment, is_outer)
    assert _top_k in (None, top_k), "EP prepare top_k disagrees with process-wide cached top_k"
    assert topk_idx.ndim == 2 and topk_idx.shape[1] == top_k and topk_idx.dtype in (jnp.int32, jnp.int64)
    _top_k = top_k
    ids_NK = _everyone(topk_idx.astype(jnp.int32))
    memory = lax.bitcast_convert_type(ids_NK, jnp.uint8).reshape(1, -1)
    sizes_e = _read(memory, top_k).sizes_e
    return sizes_e[None], sizes_e.sum()[None, None], memory


def _dispatch(memory: Array, ids: Array, x: Array, weights: Array, k: int, al: int, rows: int, is_outer: bool) -> Any:
    """Out."""
    _check(k, al, is_outer)
    config = get_ep_config()
    assert x.dtype == jnp.bfloat16 and weights.dtype == jnp.float32 and rows == config.recv_capacity_per_rank
    assert x.shape == (len(ids), config.hidden_dim) and ids.shape == weights.shape == (len(x), k) and len(x)
    plan = _read(memory, k)
    # An expert twice in a token, or more rows than there is room for: a trap.
    twice = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None] & ~jnp.eye(k, dtype=bool)
    trap = jnp.where(twice.any() | (plan.sizes_e.sum() > rows) | (ids >= config.num_experts).any(), jnp.nan, 0)
    x_R = jnp.where(plan.here_R[:, None], _everyone(x)[plan.token_R], jnp.nan)
    weights_R = jnp.where(plan.here_R, _everyone(weights)[plan.token_R, plan.slot_R], jnp.nan)
    return (x_R + trap.astype(x_R.dtype))[None], (weights_R + trap)[None]


def _combine(memory: Array, rows: Array, k: int, alignment: int, leading: tuple[int, ...], spec: Any) -> Any:
    """Home: a device's rows of a token are added and rounded, then the devices' are."""
    _check(k, alignment)
    config, plan = get_ep_config(), _read(memory, k)
    assert spec is None and rows.dtype == jnp.bfloat16
    assert rows.shape == (1, config.recv_capacity_per_rank, config.hidden_dim)
    part = jnp.zeros((len(plan.ids_NK), config.hidden_dim)).at[plan.token_R]
    (tokens,) = leading
    total = _own(part.add(jnp.where(plan.here_R[:, None], rows[0], 0)).astype(rows.dtype), tokens)
    return (jnp.where((_own_ids(plan, tokens) >= 0).any(1, keepdims=True), total, jnp.nan),)


def _dispatch_bwd(memory: Array, rows: Array, weights: Array, k: int, al: int, leading: Any, spec: Any) -> Any:
    """Home, with the weights' gradients."""
    plan = _read(memory, k)
    assert weights.shape == rows.shape[:2] and weights.dtype == jnp.float32
    spread = jnp.zeros(plan.ids_NK.shape).at[plan.token_R, plan.slot_R].add(jnp.where(plan.here_R, weights[0], 0))
    total = jnp.where(_own_ids(plan, leading[0]) >= 0, _own(spread, leading[0]), jnp.nan)
    return (*_combine(memory, rows, k, al, leading, spec), total)


def _combine_bwd(memory: Array, dy: Array, k: int, alignment: int, rows: int, is_outer: bool) -> Any:
    """Out again."""
    _check(k, alignment, is_outer)
    config, plan = get_ep_config(), _read(memory, k)
    assert dy.dtype == jnp.bfloat16 and dy.ndim == 2 and rows == config.recv_capacity_per_rank
    assert dy.shape[1] == config.hidden_dim and len(dy)
    return (jnp.where(plan.here_R[:, None], _everyone(dy)[plan.token_R], jnp.nan)[None],)


def _prepared(topk_idx: Any, top_k: int, alignment: int, is_outer: bool) -> Any:
    config = get_ep_config()
    size = config.max_tokens_per_rank * config.ep_size * top_k * 4
    return ((1, config.num_local_experts), jnp.int32), ((1, 1), jnp.int32), ((1, size), jnp.uint8)


EpPreparePrimitive = _piece(1)(_prepare, _prepared)
EpDispatchPrimitive = _piece(4)(
    _dispatch,
    lambda memory, ids, x, weights, k, al, rows, outer: (
        ((1, rows, x.shape[-1]), x.dtype),
        ((1, rows), jnp.float32),
    ),
)
EpCombinePrimitive = _piece(2)(
    _combine, lambda memory, rows, k, al, leading, spec: (((*leading, rows.shape[-1]), rows.dtype),)
)
EpDispatchBwdPrimitive = _piece(3)(
    _dispatch_bwd,
    lambda memory, rows, weights, k, al, leading, spec: (
        ((*leading, rows.shape[-1]), rows.dtype),
        ((*leading, k), jnp.float32),
    ),
)
EpCombineBwdPrimitive = _piece(2)(
    _combine_bwd, lambda memory, dy, k, al, rows, outer: (((1, rows, dy.shape[-1]), dy.dtype),)
)


def _own_ids(plan: _Rows, tokens: int) -> Array:
    config = get_ep_config()
    first = lax.axis_index(_axis) * config.max_tokens_per_rank
    return lax.dynamic_slice_in_dim(plan.ids_NK, first, config.max_tokens_per_rank)[:tokens]


# -------------------------------------------------------------------------------------------------------------- install
def install(nccl: bool = True) -> None:
    """Make transformer_engine and what is called of it importable in this process.

    Args:
        nccl: whether the NCCL is new enough.
    """
    content: dict[str, dict[str, Any]] = {
        "transformer_engine": {"is_nccl_ep_available": lambda: nccl, "__version__": "9.9"},
        "transformer_engine.jax": {},
        "transformer_engine.jax.ep": {"ep_bootstrap": ep_bootstrap, "ep_finalize": ep_finalize},
        "transformer_engine.jax.sharding": {"MeshResource": MeshResource, "global_shard_guard": global_shard_guard},
        "transformer_engine.jax.cpp_extensions": {},
        "transformer_engine.jax.cpp_extensions.ep": {
            "get_ep_config": get_ep_config,
            "_on_collective_stream": _on_collective_stream,
            "EpPreparePrimitive": EpPreparePrimitive,
            "EpDispatchPrimitive": EpDispatchPrimitive,
            "EpCombinePrimitive": EpCombinePrimitive,
            "EpDispatchBwdPrimitive": EpDispatchBwdPrimitive,
            "EpCombineBwdPrimitive": EpCombineBwdPrimitive,
        },
    }
    for name, names in content.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(names)
        sys.modules[name] = module
    forget()
