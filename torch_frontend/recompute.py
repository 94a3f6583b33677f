"""Activation checkpointing runs a forward pass a second time, inside the backward pass: how to tell, and count once."""

from __future__ import annotations

import torch
from torch import Tensor


def recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass: then it repeats one that was run, and counted, before.

    Both kinds of torch.utils.checkpoint recompute there, from a function or hook that the autograd engine calls.
    While torch.compile traces there is no backward pass: False.
    """
    # torch.utils.checkpoint asks the same. Nothing that is public tells.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def once(counts: Tensor) -> Tensor:
    """`counts` where this forward pass is the first, zeros where it is a repetition; an integer tensor."""
    counted: Tensor = _once(counts)
    return counted


# An operator, so that a compiled gate asks when it runs and not when it is traced.
@torch.library.custom_op("moebius::once", mutates_args=(), schema="(Tensor counts) -> Tensor")
def _once(counts: Tensor) -> Tensor:
    return torch.zeros_like(counts) if recomputing() else counts.clone()


@_once.register_fake
def _(counts: Tensor) -> Tensor:
    return torch.empty_like(counts)
