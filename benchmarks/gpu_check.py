"""Is a candidate right? Before it is timed, its output and gradients against float64 on a slice of the layer.

The slice: 64 tokens (y, dx, gradient of their routing weights) and two experts' whole weight gradients, the busiest
and the idlest. All of y and dx must be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_problem import Candidate, Problem
from moebius.core.activations import ACTIVATIONS

TOLERANCE = 0.02  # bfloat16 operands give 1e-3 to 1e-2; a wrong row, expert or weight gives 0.1 and more
N_TOKENS = 64
TOLERANCES = {"float32": 2e-5}  # of sums over thousands of products; TF32 gives 3e-4
GRADIENTS = ("dup", "ddown", "dup_bias", "ddown_bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Float64 values of a slice: of `tokens`, and of each expert in `experts` its weight gradients."""

    tokens: Tensor
    y: Tensor
    dx: Tensor
    dweights: Tensor
    experts: dict[int, tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a candidate computed: y [T, D], and where it ran backward dx, dweights [T, K] and, by expert, the gradients
    of up [D, 2I], of down [I, D] and, where there are any, of their biases."""

    y: Tensor
    dx: Tensor | None = None
    dweights: Tensor | None = None
    gradients: Callable[[int], tuple[Tensor, ...]] | None = None


def reference(problem: Problem) -> Reference:
    """Each expert over its rows in float64, by autograd."""
    indices, n_tokens = problem.routing.indices, problem.shape.tokens
    chosen = torch.linspace(0, n_tokens - 1, min(N_TOKENS, n_tokens), device=indices.device).long()
    y, dx = (torch.zeros(len(chosen), problem.shape.dim, dtype=torch.float64, device=chosen.device) for _ in range(2))
    dweights = torch.zeros(len(chosen), problem.shape.k, dtype=torch.float64, device=chosen.device)
    for expert in range(problem.shape.n_experts):
        at, slot = (indices[chosen] == expert).nonzero(as_tuple=True)
        if len(at):
            part, (dx_part, dw_part, *_) = _expert(problem, expert, chosen[at], slot)
            y.index_add_(0, at, part)
            dx.index_add_(0, at, dx_part)
            dweights[at, slot] = dw_part
    sizes = torch.bincount(indices.flatten(), minlength=problem.shape.n_experts)
    experts = {}
    for expert in {int(sizes.argmax()), int(sizes.argmin())}:
        token, slot = (indices == expert).nonzero(as_tuple=True)
        experts[expert] = _expert(problem, expert, token, slot)[1][2:]
    return Reference(tokens=chosen, y=y, dx=dx, dweights=dweights, experts=experts)


def left_by(problem: Problem, candidate: Candidate, y: Tensor) -> Found:
    """y, and what a backward pass with dy left in the leaves."""
    dx, dweights = problem.x.grad, problem.routing.weights.grad
    assert dx is not None and dweights is not None
    return Found(y=y, dx=dx, dweights=dweights, gradients=candidate.gradients)


def errors(expected: Reference, found: Found) -> dict[str, float]:
    """Relative error, by norms, of y and of every gradient that was found."""
    chosen, relative = expected.tokens, {"y": _relative(found.y[expected.tokens], expected.y)}
    if found.dx is not None:
        relative["dx"] = _relative(found.dx[chosen], expected.dx)
    if found.dweights is not None:
        relative["dweights"] = _relative(found.dweights[chosen], expected.dweights)
    if found.gradients is not None:
        pairs = [(found.gradients(expert), due) for expert, due in expected.experts.items()]
        for at, name in enumerate(GRADIENTS[: len(pairs[0][1])]):
            relative[name] = max(_relative(gradients[at], due[at]) for gradients, due in pairs)
    if not all(bool(torch.isfinite(values).all()) for values in (found.y, found.dx) if values is not None):
        relative["values that are not finite"] = float("inf")
    return relative


def require(found: dict[str, float], dtype: str = "bfloat16") -> None:
    """Refuse a candidate that is wrong.

    Raises:
        ValueError: a relative error above that dtype's tolerance, or NaN.
    """
    tolerance = TOLERANCES.get(dtype, TOLERANCE)
    wrong = ", ".join(f"{name} {error:.1e}" for name, error in found.items() if not error <= tolerance)
    if wrong:
        raise ValueError(f"relative errors against float64 above {tolerance}: {wrong}")


def _expert(problem: Problem, expert: int, token: Tensor, slot: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One expert's weighted output for some of its rows, and the gradients of x, weight, up, down and the biases."""
    leaves = [
        values.detach().double().requires_grad_()
        for values in (
            problem.x[token],
            problem.routing.weights[token, slot],
            problem.up[expert],
            problem.down[expert],
            *(bias[expert] for bias in problem.biases or ()),
        )
    ]
    x_RD, weight_R, up_DU, down_ID, *biases = leaves
    up_bias, down_bias = biases or (0.0, 0.0)
    y_RD = (_activated(x_RD @ up_DU + up_bias, problem.activation) @ down_ID + down_bias) * weight_R[:, None]
    return y_RD.detach(), torch.autograd.grad(y_RD, leaves, problem.dy[token].double())


def _activated(hidden_RU: Tensor, activation: str) -> Tensor:
    """By the formula of moebius.core.activations, at its defaults."""
    row = ACTIVATIONS[activation]
    gate_RI, value_RI = (hidden_RU[:, ::2], hidden_RU[:, 1::2]) if row.interleaved else hidden_RU.chunk(2, dim=-1)
    if row.limit is not None:
        gate_RI, value_RI = gate_RI.clamp(max=row.limit), value_RI.clamp(-row.limit, row.limit)
    return gate_RI * torch.sigmoid(row.alpha * gate_RI) * (value_RI + row.up_offset)


def _relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; of zeros 0 where they are zeros, else inf; NaN is inf."""
    apart, size = float((found.double() - expected).norm()), float(expected.norm())
    ratio = apart / size if size else (0.0 if apart == 0.0 else float("inf"))
    return ratio if ratio == ratio else float("inf")
