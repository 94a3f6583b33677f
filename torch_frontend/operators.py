"""Operators of torch.library that torch.func transforms too.

torch.library tells an operator's gradient to autograd alone: under torch.func.grad the operator fails, and in forward
mode its tangent is silently zero (torch 2.13). There the same operator is called through an autograd.Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

from moebius.core.errors import Unsupported

_FUNCTIONS: dict[Any, type[Function]] = {}


def differentiate(op: Any, backward: Callable[..., Any], save: Callable[..., Any] | None = None) -> None:
    """`op.register_autograd(backward, setup_context=save)`, and the same for `call`."""
    op.register_autograd(backward, setup_context=save)

    class Transformed(Function):
        """`op` for torch.func: derivatives by the same functions; a batch one after the other."""

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if save is not None:
                save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            dims = list(zip(args, in_dims, strict=True))
            found = [
                Transformed.apply(*(value.select(dim, i) if isinstance(dim, int) else value for value, dim in dims))
                for i in range(info.batch_size)
            ]
            if isinstance(found[0], Tensor):
                return torch.stack(found), 0
            return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise _no_forward_mode(op)

    _FUNCTIONS[op] = Transformed


def call(op: Any, *args: Any) -> Any:
    """op(*args), under torch.func's transforms too.

    Raises:
        Unsupported: an argument has a tangent: forward-mode differentiation.
    """
    if torch.compiler.is_compiling():  # which traces the operator itself
        return op(*args)
    if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
        raise _no_forward_mode(op)
    return _FUNCTIONS[op].apply(*args) if torch._C._are_functorch_transforms_active() else op(*args)


def unwatched(*args: Any) -> bool:
    """Whether these are ordinary tensors in an eager call that nothing but autograd follows, so that an operator may be
    passed by: its way through torch.library takes as long on the host as several kernels of a small layer do.

    Not while torch.compile or torch.jit traces, under torch.func, forward-mode differentiation or a mode that sees
    operators (fake tensors, selective checkpointing), nor for tensors of a subclass.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    return all(type(value) in (Tensor, Parameter) for value in args if isinstance(value, Tensor))


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _no_forward_mode(op: Any) -> Unsupported:
    do = "use reverse mode: backward(), torch.autograd.grad, or torch.func's grad, vjp and jacrev"
    return Unsupported(f"forward-mode differentiation of {op._qualname}", "a backward pass alone", do)
