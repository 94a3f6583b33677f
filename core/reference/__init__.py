"""The executable specification: NumPy, float64, loops, no cleverness.

One file a step, under the name that the step has in both frontends. Each function stands beside its vector-Jacobian
product `*_vjp`, which takes the same inputs and the gradient of the result. No frontend imports this at run time.

`arithmetic` says what a rounding does: `EXACT` nothing; `Noise(dtype, seed)` perturbs at every place where a frontend
rounds, so that the spread of a few runs is the error that a correct implementation in that dtype may have.
"""

from moebius.core.reference.activate import activate, activate_vjp
from moebius.core.reference.bias import add_bias, add_bias_vjp
from moebius.core.reference.dispatch import Tokens, combine, combine_vjp, dispatch, dispatch_vjp
from moebius.core.reference.experts import ExpertsTrace, experts, experts_vjp
from moebius.core.reference.losses import (
    aux_loss,
    aux_loss_vjp,
    losses,
    losses_vjp,
    seq_aux_loss,
    seq_aux_loss_vjp,
    z_loss,
    z_loss_vjp,
)
from moebius.core.reference.matmul import grouped_matmul, grouped_matmul_vjp, linear, linear_vjp
from moebius.core.reference.moe import MoETrace, gate, gate_vjp, moe, moe_vjp, quiet, shared_experts, shared_experts_vjp
from moebius.core.reference.permute import Permuted, permute, permute_vjp, unpermute, unpermute_vjp
from moebius.core.reference.route import Routing, expert_load, route, route_vjp, score, updated_correction_bias

__all__ = [
    "ExpertsTrace",
    "MoETrace",
    "Permuted",
    "Routing",
    "Tokens",
    "activate",
    "activate_vjp",
    "add_bias",
    "add_bias_vjp",
    "aux_loss",
    "aux_loss_vjp",
    "combine",
    "combine_vjp",
    "dispatch",
    "dispatch_vjp",
    "expert_load",
    "experts",
    "experts_vjp",
    "gate",
    "gate_vjp",
    "grouped_matmul",
    "grouped_matmul_vjp",
    "linear",
    "linear_vjp",
    "losses",
    "losses_vjp",
    "moe",
    "moe_vjp",
    "permute",
    "permute_vjp",
    "quiet",
    "route",
    "route_vjp",
    "score",
    "seq_aux_loss",
    "seq_aux_loss_vjp",
    "shared_experts",
    "shared_experts_vjp",
    "unpermute",
    "unpermute_vjp",
    "updated_correction_bias",
    "z_loss",
    "z_loss_vjp",
]
