"""A stand-in for Transformer Engine's expert parallelism in PyTorch, over gloo on the CPU.

As strict as the library: what it, its C++ side and NCCL EP assert or trap is an error here, on the rank that did it.
What they leave unwritten is NaN. Routes lie in the memory of a handle, so that memory that was written to, or of
another call, is found out; and an expert's rows come in another order in each call.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fakes import forget
from fakes.deep_ep import _all

CALLS: list[str] = []  # of this process
_CHANCE = torch.Generator()  # of which no checkpoint keeps the state
_OPS = "transformer_engine_ep"
_group: Group | None = None
_routes: list[Routes] = []  # by the number in a handle's memory


class Group(NamedTuple):
    """What `ep_bootstrap` was told."""

    group: Any
    num_experts: int
    max_tokens: int
    dim: int
    top_k: int
    capacity: int

    @property
    def held(self) -> int:
        """Experts of a rank."""
        return self.num_experts // int(self.group.size())


class Routes(NamedTuple):
    """Of one call: for each row its local expert, and its token and slot among all ranks' padded ones."""

    experts_R: Tensor
    tokens_R: Tensor
    slots_R: Tensor
    own: int  # tokens of this rank
    ids_TK: Tensor


# ---------------------------------------------------------------------------------------------------- made once, unmade
def ep_bootstrap(
    ep_group: Any,
    num_experts: int,
    max_tokens_per_rank: int,
    hidden_dim: int,
    num_topk: int,
    recv_capacity_per_rank: int | None = None,
    max_num_sms: int = 0,
    zero_copy: bool = False,
    drop_on_overflow: bool = False,
    max_token_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """As the package's."""
    global _group
    CALLS.append("ep_bootstrap")
    if _group is not None:
        raise RuntimeError("ep_bootstrap was already called in this process")
    if ep_group.size() < 2 or num_topk < 1:
        raise ValueError("ep_bootstrap requires ep_group.size() >= 2 and num_topk >= 1")
    held = num_experts // ep_group.size()
    assert recv_capacity_per_rank is not None and not zero_copy and not drop_on_overflow, "not in this stand-in"
    assert max_token_dtype == torch.bfloat16 and max_num_sms >= 0
    assert num_experts % ep_group.size() == 0 and held & (held - 1) == 0, "experts_per_rank must be a power of two"
    assert num_experts % 4 == 0, "experts_per_lsa_team must be multiple of 4"
    assert num_topk <= min(32, num_experts) and 2 * hidden_dim % 16 == 0
    assert recv_capacity_per_rank >= max_tokens_per_rank > 0 and max_tokens_per_rank * ep_group.size() % 4 == 0
    settings = (num_experts, max_tokens_per_rank, hidden_dim, num_topk, recv_capacity_per_rank, max_num_sms)
    said: list[Any] = [None] * ep_group.size()
    dist.all_gather_object(said, settings, group=ep_group)
    assert len(set(said)) == 1, f"ranks were told different things: {said}"
    _group = Group(ep_group, *settings[:5])


def is_ep_bootstrapped() -> bool:
    """As the package's."""
    return _group is not None


def ep_finalize() -> None:
    """As the package's."""
    global _group
    CALLS.append("ep_finalize")
    if _group is not None:
        dist.barrier(group=_group.group)
    _group = None


class EpBuffer:
    """As the package's, of one call."""

    def __init__(
        self,
        top_k: int,
        max_tokens_per_rank: int,
        hidden_dim: int,
        num_local_experts: int,
        recv_capacity_per_rank: int | None = None,
        alignment: int = 0,
        payload_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
        dispatch_fwd_quant_recipe: Any = None,
        combine_bwd_quant_recipe: Any = None,
    ):
        if _group is None:
            raise RuntimeError("EpBuffer requires ep_bootstrap() to be called first.")
        assert dispatch_fwd_quant_recipe is None and combine_bwd_quant_recipe is None and not alignment
        assert top_k == _group.top_k, "disagrees with process-wide cached top_k"
        assert num_local_experts == _group.held and max_tokens_per_rank == _group.max_tokens
        assert recv_capacity_per_rank == _group.capacity and payload_dtype == torch.bfloat16
        assert hidden_dim == _group.dim and device is not None
        self.hidden_dim, self.max_tokens_per_rank = hidden_dim, max_tokens_per_rank
        self.handle_mem = torch.full((64,), 255, dtype=torch.uint8, device=device)
        self.tokens_per_expert = torch.full((num_local_experts,), -1, dtype=torch.int64)


def _read(memory: Tensor) -> tuple[Group, Routes]:
    """What a handle's memory says."""
    assert _group is not None, "EPBackend not initialized"
    number = int(memory[:8].clone().view(torch.int64))
    assert 0 <= number < len(_routes), "call prepare first"
    return _group, _routes[number]


# -------------------------------------------------------------------------------------------------------- the way there
def ep_dispatch(
    buffer: EpBuffer,
    tokens: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    recv_tokens: Tensor | None = None,
    recv_topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the package's, without its autograd."""
    CALLS.append("ep_dispatch")
    if topk_weights.dtype is not torch.float32:
        raise TypeError("topk_weights must be float32")
    if tokens.dtype is not torch.bfloat16:
        raise NotImplementedError("NCCL EP currently supports only bfloat16 or MXFP8 payloads")
    assert recv_tokens is None and recv_topk_weights is None and _group is not None
    assert not torch.is_grad_enabled(), "its autograd keeps a handle that a recomputation would not replace"
    _check(tokens, topk_idx, topk_weights, _group)
    assert (buffer.handle_mem == 255).all(), "a handle serves one call at a time"
    buffer.handle_mem[:8] = torch.tensor([len(_routes)]).view(torch.uint8)
    _routes.append(_planned(topk_idx))
    group, routes = _read(buffer.handle_mem)
    buffer.tokens_per_expert.copy_(torch.bincount(routes.experts_R, minlength=group.held))
    everyone = _all(_filled(tokens, group.max_tokens), group.group).flatten(0, 1)
    theirs = _all(_filled(topk_weights, group.max_tokens), group.group).flatten(0, 1)
    x_R = _filled(everyone[routes.tokens_R], group.capacity)
    weights_R = _filled(theirs[routes.tokens_R, routes.slots_R], group.capacity)
    return x_R, weights_R, buffer.tokens_per_expert


def _check(tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor, group: Group) -> None:
    assert tokens.is_contiguous() and topk_idx.is_contiguous() and topk_weights.is_contiguous()
    assert tokens.dim() == 2 and 0 < len(tokens) <= group.max_tokens and tokens.shape[1] == group.dim
    assert topk_idx.shape == topk_weights.shape == (len(tokens), group.top_k)
    assert topk_idx.dtype in (torch.int32, torch.int64) and (topk_idx < group.num_experts).all()
    for row in topk_idx.tolist():
        named = [expert for expert in row if expert >= 0]
        assert len(set(named)) == len(named), "a token routes to an expert at most once"


def _planned(ids_TK: Tensor) -> Routes:
    assert _group is not None
    padded = torch.full((_group.max_tokens, _group.top_k), -1)
    padded[: len(ids_TK)] = ids_TK
    local = _all(padded, _group.group).flatten(0, 1) - _group.group.rank() * _group.held
    token, slot = ((local >= 0) & (local < _group.held)).nonzero().unbind(1)
    order = torch.randperm(len(token), generator=_CHANCE)
    order = order[local[token, slot][order].argsort(stable=True)]
    assert len(order) <= _group.capacity, "__trap(): recv tokens exceed max_recv_tokens_per_rank"
    token, slot = token[order], slot[order]
    return Routes(local[token, slot], token, slot, len(ids_TK), ids_TK.clone())


def _filled(value: Tensor, rows: int) -> Tensor:
    """More rows, which nobody wrote."""
    return torch.cat([value, value.new_full((rows - len(value), *value.shape[1:]), torch.nan)])


# --------------------------------------------------------------------------------------------------------- the way home
def ep_combine(
    buffer: EpBuffer, expert_out: Tensor, *, num_local_tokens: int | None = None, grad_out: Tensor | None = None
) -> Tensor:
    """As the package's, without its autograd."""
    CALLS.append("ep_combine")
    if expert_out.dtype is not torch.bfloat16:
        raise NotImplementedError("NCCL EP currently supports only bfloat16 or MXFP8 payloads")
    assert grad_out is None and not torch.is_grad_enabled()
    result = expert_out.new_full((num_local_tokens or buffer.max_tokens_per_rank, buffer.hidden_dim), torch.nan)
    _combined(buffer.handle_mem, expert_out, result)
    return result


def _combined(memory: Tensor, rows: Tensor, result: Tensor) -> Routes:
    """A rank's rows of a token are added and rounded, then the ranks' are; a token without routes is not written."""
    group, routes = _read(memory)
    assert rows.is_contiguous() and rows.shape == (group.capacity, group.dim) and rows.dtype == result.dtype
    assert result.shape == (routes.own, group.dim)
    count, size = len(routes.tokens_R), group.max_tokens * group.group.size()
    part = torch.zeros(size, group.dim).index_add_(0, routes.tokens_R, rows[:count].float())
    mine = slice(group.group.rank() * group.max_tokens, group.group.rank() * group.max_tokens + routes.own)
    total = _all(part.to(rows.dtype), group.group).float().sum(0)[mine].to(rows.dtype)
    written = (routes.ids_TK >= 0).any(1)
    result[written] = total[written]
    return routes


def _dispatch_bwd(
    handle_mem: Tensor, grad: Tensor, g_recv_topk_weights: Tensor, grad_tokens: Tensor, grad_topk_weights: Tensor
) -> None:
    CALLS.append("dispatch_bwd")
    grad_tokens.fill_(torch.nan)
    grad_topk_weights.fill_(torch.nan)
    routes = _combined(handle_mem, grad, grad_tokens)
    group, _ = _read(handle_mem)
    assert g_recv_topk_weights.shape == (group.capacity,) and g_recv_topk_weights.is_contiguous()
    assert g_recv_topk_weights.dtype == grad_topk_weights.dtype == torch.float32
    assert grad_topk_weights.shape == (routes.own, group.top_k)
    spread = torch.zeros(group.max_tokens * group.group.size(), group.top_k)
    spread[routes.tokens_R, routes.slots_R] = g_recv_topk_weights[: len(routes.tokens_R)]
    first = group.group.rank() * group.max_tokens
    total, written = _all(spread, group.group).sum(0)[first : first + routes.own], routes.ids_TK >= 0
    grad_topk_weights[written] = total[written]


def _combine_bwd(
    handle_mem: Tensor,
    grad: Tensor,
    grad_expert_out: Tensor,
    grad_scale_inv: Tensor | None = None,
    grad_expert_out_scale_inv: Tensor | None = None,
) -> None:
    CALLS.append("combine_bwd")
    group, routes = _read(handle_mem)
    assert grad_scale_inv is None and grad_expert_out_scale_inv is None
    assert grad.is_contiguous() and grad.dtype == grad_expert_out.dtype == torch.bfloat16
    assert grad.shape == (routes.own, group.dim) and grad_expert_out.shape == (group.capacity, group.dim)
    everyone = _all(_filled(grad, group.max_tokens), group.group).flatten(0, 1)
    grad_expert_out.copy_(_filled(everyone[routes.tokens_R], group.capacity))


# -------------------------------------------------------------------------------------------------------------- install
def install(nccl: bool = True, back: bool = True) -> ModuleType:
    """Make transformer_engine and its module `ep` importable in this process, for a rank, which ends with it.

    Args:
        nccl: whether the NCCL is new enough. back: whether it has the operators of the backward pass.
    """
    places = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ep")
    for place in places:
        module = ModuleType(place)
        module.__spec__, module.__path__ = ModuleSpec(place, None), []
        sys.modules[place] = module
    vars(sys.modules[places[0]]).update(is_nccl_ep_available=lambda: nccl, __version__="9.9")
    public = (EpBuffer, ep_bootstrap, is_ep_bootstrapped, ep_finalize, ep_dispatch, ep_combine)
    vars(sys.modules[places[-1]]).update({each.__name__: each for each in public})
    if back and not hasattr(getattr(torch.ops, _OPS), "dispatch_bwd"):
        wrote = ("grad_tokens", "grad_topk_weights")
        torch.library.custom_op(f"{_OPS}::dispatch_bwd", _dispatch_bwd, mutates_args=wrote)
        wrote = ("grad_expert_out", "grad_expert_out_scale_inv")
        torch.library.custom_op(f"{_OPS}::combine_bwd", _combine_bwd, mutates_args=wrote)
    forget()
    return sys.modules[places[-1]]


def ready() -> None:
    """The package in this process, and dispatchers that take CPU tensors to it."""
    from moebius.torch_frontend import dispatch_limits

    install()
    dispatch_limits.DEVICES = ("cuda", "meta", "cpu")
