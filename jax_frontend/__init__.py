"""moebius for Flax: the layer as NNX modules, and each of its steps as a function of arrays.

The files carry the names of the steps and are those of `moebius.torch_frontend`, so that what holds for one can be
looked up in the other. The meaning of every step is in `moebius.core`; here it is said in JAX. The same layers as Linen
modules are in `moebius.jax_frontend.linen`, which nothing here imports.
"""

if __name__ != "moebius.jax_frontend":
    raise ImportError(f"this folder is the package moebius.jax_frontend; import it by that name, not as {__name__!r}")

from importlib.util import find_spec

from moebius.core.errors import BackendUnavailable

if find_spec("jax") is None or find_spec("flax") is None:
    raise BackendUnavailable(
        "moebius.jax_frontend", "jax or flax is not installed", "pip install '.[jax]' in a clone of moebius"
    )

from moebius.jax_frontend.activate import activate
from moebius.jax_frontend.bias import add_bias
from moebius.jax_frontend.checkpoint import load_moe
from moebius.jax_frontend.dispatch import Dispatcher, Local, Sent
from moebius.jax_frontend.experts import experts
from moebius.jax_frontend.fake_gate import FakeBalancedGate
from moebius.jax_frontend.gate import Gate, set_aux_loss_scale
from moebius.jax_frontend.grouped_experts import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE
from moebius.jax_frontend.losses import aux_loss, seq_aux_loss, z_loss
from moebius.jax_frontend.matmul import grouped_matmul, linear
from moebius.jax_frontend.moe import MoE, SharedExperts
from moebius.jax_frontend.permute import Permuted, PermuteState, permute, unpermute
from moebius.jax_frontend.route import Routing, expert_load, route, updated_correction_bias
from moebius.jax_frontend.sharding import shard_experts
from moebius.jax_frontend.trace import trace
from moebius.jax_frontend.weights import load_parameters, load_state, parameters, state

__all__ = [
    "Dispatcher",
    "FakeBalancedGate",
    "Gate",
    "GroupedExperts",
    "GroupedExpertsDeepEP",
    "GroupedExpertsTE",
    "Local",
    "MoE",
    "PermuteState",
    "Permuted",
    "Routing",
    "Sent",
    "SharedExperts",
    "activate",
    "add_bias",
    "aux_loss",
    "expert_load",
    "experts",
    "grouped_matmul",
    "linear",
    "load_moe",
    "load_parameters",
    "load_state",
    "parameters",
    "permute",
    "route",
    "seq_aux_loss",
    "set_aux_loss_scale",
    "shard_experts",
    "state",
    "trace",
    "unpermute",
    "updated_correction_bias",
    "z_loss",
]
