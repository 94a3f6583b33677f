"""What a layer computes on the way: every stage of one pass, and the gradient that reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moebius.core import checks, layout, stages
from moebius.core.stages import GRADIENT, INPUT, OUTPUT, Tap
from moebius.torch_frontend.checks import check_arrays
from moebius.torch_frontend.moe import MoE

if TYPE_CHECKING:
    from jaxtyping import Float

_STATISTICS = ("last_load", "last_aux_loss", "last_z_loss", "last_seq_aux_loss", "cumulative_load")


@contextmanager
def tapped(layer: nn.Module, tap: Tap) -> Iterator[None]:
    """In this context `layer` and every module inside that has a `tap` call this one."""
    modules: list[Any] = [module for module in layer.modules() if hasattr(module, "tap")]
    before = [module.tap for module in modules]
    try:
        for module in modules:
            module.tap = tap
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.tap = own


def trace(layer: MoE, x_TD: Float[Tensor, "T D"], dy_TD: Float[Tensor, "T D"] | None = None) -> dict[str, Tensor]:
    """Every stage of a pass through `layer` and, with an upstream gradient, every gradient; nothing is copied.

    The layer runs as it would without, in its own mode and bit for bit, and is left as it was: no `.grad`, no recorded
    load, its own `tap` out of the way and put back. A gradient of "weights" is what the experts send back; the
    auxiliary loss adds to it inside the gate.

    Args:
        layer: MoE. x_TD: [T, dim]; need not require a gradient.
        dy_TD: gradient of the output, in its shape and dtype; None to run forward alone.
    Returns:
        By name, detached, in the dtypes of the layer at that place: the stages that it has, in the order of
        moebius.core.stages; with `dy_TD` then "grad." before the name of each differentiable stage, "x" and each
        parameter by its dotted name. A frozen parameter has no entry, one that does not matter has zeros.
    Raises:
        ShapeError, DTypeError: an input does not fit.
    """
    check_arrays(x_TD=x_TD, **({} if dy_TD is None else {"dy_TD": dy_TD}))
    checks.tokens(x_TD, layer.config.dim, "x_TD")
    if dy_TD is not None:
        checks.upstream(dy_TD, x_TD.shape, layer.dtype or x_TD.dtype)
    backward = dy_TD is not None
    wanted = {stage.name for stage in stages.STAGES if stage.differentiable and backward}
    seen: dict[str, Tensor] = {}

    def record(name: str, value: Tensor) -> Tensor:
        if name in wanted and not value.requires_grad:  # a fake gate's weights
            value = value.detach().requires_grad_()
        seen[name] = value
        return value

    x_TD = x_TD.detach().requires_grad_(backward)
    with torch.set_grad_enabled(backward), tapped(layer, record), _unrecorded(layer):
        layer(x_TD)
    named = {stage.name: seen[stage.name] for stage in stages.STAGES if stage.name in seen}
    found = {name: value.detach() for name, value in named.items()}
    if dy_TD is None:
        return found
    inputs = {name: value for name, value in named.items() if name in wanted} | {INPUT: x_TD}
    trained = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    inputs |= {row.name: trained[row.name] for row in layout.moe(layer.config) if row.name in trained}
    gradients = torch.autograd.grad(seen[OUTPUT], tuple(inputs.values()), dy_TD, materialize_grads=True)
    return found | {GRADIENT + name: value for name, value in zip(inputs, gradients, strict=True)}


@contextmanager
def _unrecorded(layer: MoE) -> Iterator[None]:
    """Afterwards the gate has recorded nothing of what ran in this context."""
    before = {name: getattr(layer.gate, name) for name in _STATISTICS if hasattr(layer.gate, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(layer.gate, name, value)
