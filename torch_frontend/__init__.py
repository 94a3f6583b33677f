"""moebius for PyTorch: the layer as modules, and each of its steps as a function of tensors.

The files carry the names of the steps and are those of `moebius.jax_frontend`, so that what holds for one can be
looked up in the other. The meaning of every step is in `moebius.core`; here it is said in PyTorch.
"""

if __name__ != "moebius.torch_frontend":
    raise ImportError(f"this folder is the package moebius.torch_frontend; import it by that name, not as {__name__!r}")

from importlib.util import find_spec

from moebius.core.errors import BackendUnavailable

if find_spec("torch") is None:
    raise BackendUnavailable(
        "moebius.torch_frontend", "torch is not installed", "pip install '.[torch]' in a clone of moebius"
    )

from moebius.torch_frontend.activate import activate
from moebius.torch_frontend.bias import add_bias
from moebius.torch_frontend.checkpoint import load_moe
from moebius.torch_frontend.dispatch import Dispatcher, Local, Sent
from moebius.torch_frontend.experts import experts
from moebius.torch_frontend.fake_gate import FakeBalancedGate
from moebius.torch_frontend.gate import Gate, set_aux_loss_scale
from moebius.torch_frontend.grouped_experts import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE
from moebius.torch_frontend.losses import aux_loss, seq_aux_loss, z_loss
from moebius.torch_frontend.matmul import grouped_matmul, linear
from moebius.torch_frontend.moe import MoE, SharedExperts
from moebius.torch_frontend.permute import Permuted, PermuteState, permute, unpermute
from moebius.torch_frontend.route import Routing, expert_load, route, updated_correction_bias
from moebius.torch_frontend.sharding import shard_experts
from moebius.torch_frontend.trace import trace
from moebius.torch_frontend.weights import load_parameters, load_state, parameters, state

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
