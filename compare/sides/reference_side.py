"""The float64 reference itself: holds every parameter in float64, so for layers of moderate size."""

from __future__ import annotations

import numpy as np

from moebius.compare.problem import Problem
from moebius.compare.sides import Side
from moebius.compare.sides.answer import Answer, Desk
from moebius.core import reference
from moebius.core.stages import GRADIENT, INPUT, OUTPUT


def run(p: Problem, desk: Desk, side: Side) -> Answer:
    """Output and gradients of moebius.core.reference, which knows nothing of the noise model."""
    mask_T = np.ones(p.tokens, bool)
    parameters = {name: p.exact(name) for name in p.parameters}
    bias_E = p.correction_bias
    trace = reference.moe(p.x_TD, mask_T, parameters, p.config, correction_bias_E=bias_E)
    dx_TD, grads = reference.moe_vjp(trace, p.x_TD, mask_T, parameters, p.config, p.dy_TD, correction_bias_E=bias_E)
    order_TK = np.argsort(trace.routing.ids_TK, axis=-1, kind="stable")
    tensors = {
        "logits": trace.logits_TE,
        "weights": np.take_along_axis(trace.routing.weights_TK, order_TK, axis=-1),
        OUTPUT: trace.y_TD,
        GRADIENT + INPUT: dx_TD,
    }
    tensors |= {GRADIENT + name: value for name, value in grads.items()}
    ids_TK = np.take_along_axis(trace.routing.ids_TK, order_TK, axis=-1)
    return Answer(ids_TK=ids_TK, tensors=tensors, device="numpy", paired=False)
