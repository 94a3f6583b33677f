"""The shared experts: an MLP that every token visits, times its sigmoid gate where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moebius.compare.noise.activate import activate, activate_vjp
from moebius.compare.noise.matmul import linear, linear_vjp
from moebius.compare.noise.noisy import Model, Noisy, added, scaled
from moebius.compare.problem import Problem
from moebius.core import activations
from moebius.core.activations import Activation
from moebius.core.reference.activate import sigmoid

_GATE = "shared_expert_gate.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """Every stage of the shared experts; `opening_T1` is their gate, None without one."""

    activation: Activation
    hidden_TU: Noisy
    act_TI: Noisy
    mlp_TD: Noisy
    opening_T1: Noisy | None
    out_TD: Noisy


def shared_experts(model: Model, p: Problem, x_TD: Noisy) -> Shared:
    """The shared experts' output, with every stage on the way."""
    activation = activations.resolve(p.config.shared_expert_activation, p.config)
    halves = [project(model, p, name, x_TD) for name in _first_projections(activation)]
    hidden_TU = halves[0] if len(halves) == 1 else _side_by_side(halves)
    act_TI = activate(model, hidden_TU, None, activation)
    mlp_TD = project(model, p, "shared_experts.down_proj", act_TI)
    opening_T1, out_TD = None, mlp_TD
    if p.config.shared_expert_gate:
        z_T1 = linear(model, x_TD, p.exact(_GATE))
        value = sigmoid(z_T1.value)
        opening_T1 = Noisy(value, added(scaled(z_T1.own, value * (1.0 - value)), model.formula(value)))
        out_TD = model.stored(_product(model, mlp_TD, opening_T1))
    return Shared(
        activation=activation,
        hidden_TU=hidden_TU,
        act_TI=act_TI,
        mlp_TD=mlp_TD,
        opening_T1=opening_T1,
        out_TD=out_TD,
    )


def shared_experts_vjp(
    model: Model, p: Problem, x_TD: Noisy, shared: Shared, dout_TD: Noisy
) -> Iterator[tuple[str, Noisy]]:
    """(name, gradient) of every parameter, and of "x": the gradient of the input, rounded."""
    dx = []
    if shared.opening_T1 is not None:
        opening = shared.opening_T1
        dopening_T1 = model.total(_product(model, dout_TD, shared.mlp_TD), axis=-1)
        slope = opening.value * (1.0 - opening.value)
        bend = 1.0 - 2.0 * opening.value
        value = dopening_T1.value[:, None] * slope
        assert dopening_T1.own is not None and opening.own is not None  # sums and formulas round
        own = added(dopening_T1.own[:, None] * slope**2, opening.own * (dopening_T1.value[:, None] * bend) ** 2)
        dz_T1 = model.stored(Noisy(value, added(own, model.formula(dopening_T1.value[:, None] * opening.value))))
        dx_TD, dweight, _ = linear_vjp(model, x_TD, p.exact(_GATE), dz_T1, bias=False)
        dx.append(dx_TD)
        yield _GATE, dweight
        dout_TD = model.stored(_product(model, dout_TD, opening))
    dact_TI, *grads = _project_vjp(model, p, "shared_experts.down_proj", shared.act_TI, dout_TD)
    yield from _named("shared_experts.down_proj", grads)
    dhidden_TU, _ = activate_vjp(model, shared.hidden_TU, None, shared.activation, dact_TI)
    names = _first_projections(shared.activation)
    for part, name in enumerate(names):
        width = dhidden_TU.value.shape[-1] // len(names)
        columns = slice(part * width, (part + 1) * width)
        assert dhidden_TU.own is not None  # stored
        half = Noisy(dhidden_TU.value[:, columns], dhidden_TU.own[:, columns])
        dx_TD, *grads = _project_vjp(model, p, name, x_TD, half)
        dx.append(dx_TD)
        yield from _named(name, grads)
    yield "x", summed(model, dx)


def summed(model: Model, parts: list[Noisy]) -> Noisy:
    """A sum of stored parts, rounded after each addition."""
    out = parts[0]
    for part in parts[1:]:
        out = model.stored(Noisy(out.value + part.value, added(out.variance, part.variance)))
    return out


def project(model: Model, p: Problem, name: str, x_TD: Noisy) -> Noisy:
    """The dense projection of that name."""
    bias = p.exact(f"{name}.bias") if f"{name}.bias" in p.parameters else None
    return linear(model, x_TD, p.exact(f"{name}.weight"), bias)


def _project_vjp(model: Model, p: Problem, name: str, x_TD: Noisy, dout_TF: Noisy) -> tuple[Noisy, Noisy, Noisy | None]:
    return linear_vjp(model, x_TD, p.exact(f"{name}.weight"), dout_TF, bias=f"{name}.bias" in p.parameters)


def _named(name: str, grads: list[Noisy | None]) -> Iterator[tuple[str, Noisy]]:
    for kind, grad in zip(("weight", "bias"), grads, strict=True):
        if grad is not None:
            yield f"{name}.{kind}", grad


def _first_projections(activation: Activation) -> tuple[str, ...]:
    up = "shared_experts.up_proj"
    return ("shared_experts.gate_proj", up) if activation.gated else (up,)


def _side_by_side(halves: list[Noisy]) -> Noisy:
    owns = [half.own for half in halves]
    assert owns[0] is not None and owns[1] is not None  # projections round
    return Noisy(np.concatenate([half.value for half in halves], axis=-1), np.concatenate(owns, axis=-1))  # type: ignore[arg-type]


def _product(model: Model, one: Noisy, other: Noisy) -> Noisy:
    """An elementwise product in the accumulate dtype; broadcasts."""
    value = one.value * other.value
    own = added(
        None if one.variance is None else one.variance * np.square(other.value),
        None if other.variance is None else other.variance * np.square(one.value),
        model.formula(value),
    )
    return Noisy(value, own)
