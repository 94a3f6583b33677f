"""Steps 1 to 9 and back: what every stage of a correct layer holds, and how far rounding moves it.

`walk` is a generator that is answered: it says what is due at a stage, and goes on from what it is sent. Sent what was
due, it accumulates the noise from the layer's input on; sent a side's own values as exact, each step stands alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moebius.compare.noise import route
from moebius.compare.noise.activate import activate, activate_vjp
from moebius.compare.noise.matmul import (
    add_bias,
    bias_gradient,
    grouped_matmul,
    linear,
    linear_vjp,
    weight_gradients,
)
from moebius.compare.noise.noisy import Model, Noisy, added
from moebius.compare.noise.permute import Routes, permute, permute_weights_vjp, unpermute, unpermute_vjp
from moebius.compare.noise.shared import Shared, project, shared_experts, shared_experts_vjp, summed
from moebius.compare.problem import Problem
from moebius.core.config import MoEConfig
from moebius.core.stages import GRADIENT, INPUT, OUTPUT

Index = tuple[int, slice] | tuple[()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What is due at one stage, or in one region of a parameter's gradient.

    Attributes:
        name: of core.stages, "grad." before it for a gradient.
        index: of the region, (expert, slice of its rows); () for the whole tensor.
        due: value and variance. dtype: that the value is rounded to.
    """

    name: str
    due: Noisy
    dtype: str
    index: Index = ()


# Says what is due, is sent what to go on with.
Walk = Generator[Expected, Noisy, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forward:
    """What the backward pass needs of the forward pass."""

    x: Noisy
    logits: Noisy
    weights: Noisy
    latent: Noisy
    rows: Noisy
    row_weights: Noisy
    hidden: Noisy
    act: Noisy
    out: Noisy
    combined: Noisy
    shared: Shared | None


class _Layer:
    """One layer's walk: the steps, with what all of them share."""

    def __init__(self, p: Problem, ids_TK: np.ndarray, config: MoEConfig):
        self.p, self.c, self.ids_TK = p, config, ids_TK
        self.model = Model.of(p.dtype)
        self.routes = Routes.of(ids_TK, config.n_routed_experts)
        self.has_latent = config.moe_latent_size is not None

    def expected(self, name: str, due: Noisy, index: Index = (), dtype: str | None = None) -> Expected:
        return Expected(name=name, due=due, index=index, dtype=dtype or self.p.dtype)

    def placed(self, row_weights: Noisy) -> tuple[Noisy | None, Noisy | None]:
        """(row weights before the down projection, after it): one of them is None."""
        return (None, row_weights) if self.c.apply_router_weight_after_down else (row_weights, None)

    def experts_bias(self, name: str) -> np.ndarray | None:
        return self.p.exact(f"experts.{name}") if self.c.expert_bias else None

    def forward(self) -> Generator[Expected, Noisy, _Forward]:
        p, c, model, routes = self.p, self.c, self.model, self.routes
        x = Noisy(p.x_TD)
        bias = p.exact("gate.bias") if c.router_bias else None
        logits = yield self.expected("logits", linear(model, x, p.exact("gate.weight"), bias))
        due = route.weights(model, logits, self.ids_TK, c, p.correction_bias)
        weights = yield self.expected("weights", due, dtype=route.weights_dtype(model, c))
        latent = x
        if self.has_latent:
            latent = yield self.expected("latent", project(model, p, "fc1_latent_proj", x))
        rows, row_weights = permute(latent, weights, routes)
        rows = yield self.expected("rows", rows)
        before, after = self.placed(row_weights)
        width = c.activation.up_width(c.moe_inter_dim)
        due = grouped_matmul(model, rows, self.weight("gate_and_up_projs"), width, routes.sizes_e)
        due = add_bias(model, due, self.experts_bias("gate_up_proj_bias"), routes.sizes_e)
        hidden = yield self.expected("up", due)
        act = yield self.expected("activation", activate(model, hidden, before, c.activation))
        due = grouped_matmul(model, act, self.weight("down_projs"), c.expert_dim, routes.sizes_e)
        out = yield self.expected(
            "down", add_bias(model, due, self.experts_bias("down_proj_bias"), routes.sizes_e, before)
        )
        plain = not self.has_latent and not c.n_shared_experts
        combined = yield self.expected(OUTPUT if plain else "combine", unpermute(model, out, routes, after))
        y = project(model, p, "fc2_latent_proj", combined) if self.has_latent else combined
        shared = None
        if c.n_shared_experts:
            shared = shared_experts(model, p, x)
            out_shared = yield self.expected("shared", shared.out_TD)
            y = model.stored(Noisy(y.value + out_shared.value, added(y.variance, out_shared.variance)))
        if not plain:
            yield self.expected(OUTPUT, y)
        return _Forward(
            x=x,
            logits=logits,
            weights=weights,
            latent=latent,
            rows=rows,
            row_weights=row_weights,
            hidden=hidden,
            act=act,
            out=out,
            combined=combined,
            shared=shared,
        )

    def backward(self, f: _Forward) -> Walk:
        p, c, model, routes = self.p, self.c, self.model, self.routes
        before, after = self.placed(f.row_weights)
        dy, dx = Noisy(p.dy_TD), []
        if f.shared is not None:
            for name, due in shared_experts_vjp(model, p, f.x, f.shared, dy):
                if name == INPUT:
                    dx.append(due)
                else:
                    yield self.expected(GRADIENT + name, due)
        dcombine = dy
        if self.has_latent:
            due = yield from self.projected_back("fc2_latent_proj", f.combined, dy)
            dcombine = yield self.expected(GRADIENT + "combine", due)
        due, dweight_sum = unpermute_vjp(model, f.out, routes, dcombine, after)
        dout = yield self.expected(GRADIENT + "down", due)
        sums = [] if dweight_sum is None else [dweight_sum]
        if c.expert_bias:
            yield self.expected(GRADIENT + "experts.down_proj_bias", bias_gradient(model, dout, routes.sizes_e, before))
            if before is not None:
                sums.append(self.bias_products(dout))
        yield from self.matrices("down_projs", f.act, dout)
        due = grouped_matmul(model, dout, self.turned("down_projs"), c.moe_inter_dim, routes.sizes_e)
        dact = yield self.expected(GRADIENT + "activation", due)
        due, more = activate_vjp(model, f.hidden, before, c.activation, dact)
        if before is not None:
            sums.append(more)
        dhidden = yield self.expected(GRADIENT + "up", due)
        if c.expert_bias:
            yield self.expected(GRADIENT + "experts.gate_up_proj_bias", bias_gradient(model, dhidden, routes.sizes_e))
        yield from self.matrices("gate_and_up_projs", f.rows, dhidden)
        due = grouped_matmul(model, dhidden, self.turned("gate_and_up_projs"), c.expert_dim, routes.sizes_e)
        drows = yield self.expected(GRADIENT + "rows", due)
        yield from self.router_and_input(f, drows, sums, dx)

    def router_and_input(self, f: _Forward, drows: Noisy, sums: list[Noisy], dx: list[Noisy]) -> Walk:
        """The rest of the backward pass: the routing weights, the router, the layer's input."""
        p, c, model, routes = self.p, self.c, self.model, self.routes
        total = Noisy(sum((part.value for part in sums), np.zeros(1)), added(*(part.own for part in sums)))
        dtype = route.weights_dtype(model, c)
        due = permute_weights_vjp(model, total, routes, dtype)
        dweights = yield self.expected(GRADIENT + "weights", due, dtype=dtype)
        dlatent = unpermute(model, drows, routes)
        if self.has_latent:
            dlatent = yield self.expected(GRADIENT + "latent", dlatent)
            dlatent = yield from self.projected_back("fc1_latent_proj", f.x, dlatent)
        dx.append(dlatent)
        due = route.logits_gradient(model, f.logits, self.ids_TK, c, dweights, p.correction_bias)
        dlogits = yield self.expected(GRADIENT + "logits", due)
        dgate, dweight, dbias = linear_vjp(model, f.x, p.exact("gate.weight"), dlogits, bias=c.router_bias)
        yield self.expected(GRADIENT + "gate.weight", dweight)
        if dbias is not None:
            yield self.expected(GRADIENT + "gate.bias", dbias)
        yield self.expected(GRADIENT + INPUT, summed(model, [*dx, dgate]))

    def weight(self, name: str) -> Any:
        """expert -> its matrix."""
        return lambda expert: self.p.exact(f"experts.{name}", expert)

    def turned(self, name: str) -> Any:
        """expert -> its matrix, transposed."""
        return lambda expert: self.p.exact(f"experts.{name}", expert).T

    def matrices(self, name: str, rows: Noisy, dout: Noisy) -> Walk:
        """The gradient of the experts' matrices, one expert after the other."""
        for index, due in weight_gradients(self.model, rows, dout, self.routes.sizes_e):
            yield self.expected(f"{GRADIENT}experts.{name}", due, index)

    def projected_back(self, name: str, x: Noisy, dout: Noisy) -> Generator[Expected, Noisy, Noisy]:
        """The gradient of a dense projection's input, on the way that of its parameters."""
        has_bias = f"{name}.bias" in self.p.parameters
        dx, dweight, dbias = linear_vjp(self.model, x, self.p.exact(f"{name}.weight"), dout, bias=has_bias)
        yield self.expected(f"{GRADIENT}{name}.weight", dweight)
        if dbias is not None:
            yield self.expected(f"{GRADIENT}{name}.bias", dbias)
        return dx

    def bias_products(self, dout: Noisy) -> Noisy:
        """[R]: each row's gradient times its expert's bias, summed: the part of the weight that scales the bias."""
        bias_eD = self.experts_bias("down_proj_bias")
        assert bias_eD is not None
        bias_RD = np.repeat(bias_eD, self.routes.sizes_e, axis=0)
        variance = None if dout.variance is None else dout.variance * np.square(bias_RD)
        return self.model.total(Noisy(dout.value * bias_RD, variance), axis=-1)


def walk(p: Problem, ids_TK: np.ndarray, config: MoEConfig | None = None, *, backward: bool = True) -> Walk:
    """Every stage of the layer, then every gradient.

    Args:
        p: the problem. ids_TK: the experts of each token, all in range.
        config: in place of the problem's, where a side places the routing weight otherwise.
        backward: go on to the gradients.
    Yields:
        Expected; is to be sent the Noisy to go on with, for regions of a parameter's gradient anything.
    """
    layer = _Layer(p, ids_TK, config or p.config)
    forward = yield from layer.forward()
    if backward:
        yield from layer.backward(forward)


def accumulated(p: Problem, ids_TK: np.ndarray, config: MoEConfig | None = None) -> Iterator[Expected]:
    """The walk that goes on from what is due: noise of all stages before included."""
    steps = walk(p, ids_TK, config)
    try:
        expected = next(steps)
        while True:
            yield expected
            expected = steps.send(expected.due)
    except StopIteration:
        return
