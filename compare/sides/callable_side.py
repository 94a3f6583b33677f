"""A callable of the user's: PyTorch by default, JAX where it is wrapped in `InJax`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebius.compare.bridge import to_jax, to_torch
from moebius.compare.problem import Problem
from moebius.compare.sides import Side
from moebius.compare.sides.answer import Answer, Desk, leaving, shape_of
from moebius.compare.sides.precise import precise
from moebius.compare.sides.torch_side import traced
from moebius.core import stages
from moebius.core.errors import ConfigError, DTypeError, MoEError, ShapeError
from moebius.core.stages import GRADIENT, INPUT, OUTPUT
from moebius.torch_frontend import MoE

DROPPED = "dropped"  # routes that found no room, of a dispatcher with a bound
_RETURNS = "return the output [T, dim], or a mapping of moebius.core.stages' names to tensors with 'output' among them"
_CALLED = (
    "it is called with x [T, dim] and the parameters by name, an nn.Module with x alone; wrap a function of JAX arrays "
    "in moebius.compare.InJax"
)


@dataclass(frozen=True)
class InJax:
    """A function of JAX arrays as a side: f(x [T, dim], parameters) -> output, or a mapping by stage.

    Over devices with a bound, let it return "dropped" too, the count of its dispatcher.
    """

    function: Callable[..., Any]

    def __call__(self, x: Any, parameters: Mapping[str, Any]) -> Any:
        """The function itself."""
        return self.function(x, parameters)


def run(p: Problem, desk: Desk, side: Side) -> Answer:
    """What a callable computes, and by the framework's own differentiation every gradient that it lets through.

    A moebius MoE is traced as it stands. Another nn.Module is called with x alone; its parameters that go by the names
    of core.layout are compared too. Anything else is called with (x, parameters): x [T, dim] and the problem's
    parameters by name, in the problem's dtype, on the CPU; the parameters lead to gradients. Gradients that it returns
    itself, as "grad.x" or "grad.experts.down_projs", count instead of autograd's. A stage that is returned detached has
    no gradient; one that does not lead to the output has a gradient of zero. Integers that it returns as "dropped",
    routes that found no room, fail the comparison where they are not zero.

    Raises:
        ConfigError, ShapeError, DTypeError: it raises, or returns something else than a layer would.
    """
    call = side.call
    if isinstance(call, MoE):
        return traced(call, p, desk)
    x_TD = p.tensor(p.x_TD).requires_grad_()
    if isinstance(call, InJax):
        return _answer(desk, _in_jax(p, side, call.function))
    if isinstance(call, nn.Module):
        inputs: dict[str, Tensor] = {n: value for n, value in call.named_parameters() if n in p.parameters}
        device = next(call.parameters(), x_TD).device
        x_TD = x_TD.detach().to(device).requires_grad_()
        with precise():
            found = checked(_called(side, call, x_TD), p, side.name)
            found = _with_gradients(found, {INPUT: x_TD, **inputs}, p, side)
    else:
        # copies: what a callable writes into them is its own affair
        inputs = {name: value.detach().clone().requires_grad_() for name, value in p.parameters.items()}
        with precise():
            found = checked(_called(side, call, x_TD, inputs), p, side.name)
            found = _with_gradients(found, {INPUT: x_TD, **inputs}, p, side)
    return _answer(desk, found)


def _answer(desk: Desk, found: dict[str, Tensor]) -> Answer:
    dropped = found.pop(DROPPED, None)
    return desk.answer(leaving(found), dropped=0 if dropped is None else int(dropped.sum()))


def checked(found: Any, p: Problem, name: str) -> dict[str, Tensor]:
    """What a callable returned, by stage.

    Raises:
        ConfigError, ShapeError, DTypeError: it is not what a layer returns; says what it is.
    """
    if not isinstance(found, Mapping):
        found = {OUTPUT: found}
    integers = ("ids", DROPPED)
    unknown = [key for key in found if not isinstance(key, str) or (key not in integers and shape_of(key, p) is None)]
    if unknown or OUTPUT not in found:
        have = f"the names {', '.join(map(str, found)) or 'none'}"
        known = ", ".join(stage.name for stage in stages.of(p.config))
        raise ConfigError(f"the output of side {name!r}", have, f"{_RETURNS}; names: {known}, grad.x, {DROPPED}")
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{key!r} of side {name!r}", f"a {type(value).__module__}.{type(value).__name__}", _RETURNS
            )
        if not value.is_floating_point() and key not in integers:
            raise DTypeError(f"{key!r} of side {name!r}", f"dtype {value.dtype}", "return a floating dtype")
        due = shape_of(key, p)
        if due is not None and tuple(value.shape) != due:
            raise ShapeError(f"{key!r} of side {name!r} of shape {due}", f"shape {tuple(value.shape)}", _RETURNS)
    for key in integers:
        if key in found and (found[key].is_floating_point() or found[key].dtype == torch.bool):
            raise DTypeError(f"{key!r} of side {name!r}", f"dtype {found[key].dtype}", "return integers")
    by_slot = [key for key in ("weights", GRADIENT + "weights") if key in found]
    if by_slot and "ids" not in found:
        raise ConfigError(f"{by_slot[0]!r} of side {name!r}", "no 'ids', so that no slot has an expert", "return both")
    return dict(found)


def _called(side: Side, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except MoEError as error:
        raise type(error)(f"side {side.name!r}: {error.asked}", error.found, error.do) from error
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ConfigError(f"side {side.name!r} on {side.call!r:.80}", words, _CALLED) from error


def _with_gradients(found: dict[str, Tensor], inputs: dict[str, Tensor], p: Problem, side: Side) -> dict[str, Tensor]:
    """`found` with the gradients that autograd gives; a side that lets none through has none."""
    out = found[OUTPUT]
    tensors = {name: value.detach() for name, value in found.items()}
    if not out.requires_grad:
        return tensors
    on_the_way = {s.name: found[s.name] for s in stages.STAGES if s.differentiable and s.name in found}
    wanted = {name: value for name, value in {**on_the_way, **inputs}.items() if value.requires_grad}
    dy_TD = p.tensor(p.dy_TD).to(out.device, out.dtype)
    grads = _called(side, lambda: torch.autograd.grad(out, tuple(wanted.values()), dy_TD, materialize_grads=True))
    return {GRADIENT + name: grad for name, grad in zip(wanted, grads, strict=True)} | tensors


def _in_jax(p: Problem, side: Side, function: Callable[..., Any]) -> dict[str, Tensor]:
    """Output, stages and the gradients of x and the parameters of a JAX function."""
    import jax

    x_TD, dy_TD = to_jax(p.tensor(p.x_TD)), to_jax(p.tensor(p.dy_TD))
    parameters = {name: to_jax(value) for name, value in p.parameters.items()}

    def forward(x: Any, parameters: Any) -> Any:
        found = function(x, parameters)
        by_stage = found if isinstance(found, Mapping) else {OUTPUT: found}
        return by_stage.get(OUTPUT), dict(by_stage)

    with precise():
        out_TD, pullback, found = _called(side, lambda x, w: jax.vjp(forward, x, w, has_aux=True), x_TD, parameters)
        tensors = {key: to_torch(value) if isinstance(value, jax.Array) else value for key, value in found.items()}
        tensors = checked(tensors, p, side.name)
        dx_TD, grads = _called(side, pullback, dy_TD.astype(out_TD.dtype))
    named = {INPUT: dx_TD, **grads}
    return {GRADIENT + name: to_torch(value) for name, value in named.items()} | tensors
