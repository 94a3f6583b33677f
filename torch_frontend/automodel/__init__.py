"""The documented API of NeMo Automodel's `nemo_automodel.components.moe.experts`: every name, with its signature.

A drop-in: `from moebius.torch_frontend.automodel import GroupedExperts` where the original was imported. Nothing is
computed here. The functions are views of moebius' steps, the classes add the documented methods to moebius' modules;
private names are among them because callers of the original use them.
"""

from moebius.torch_frontend.automodel.activation import (
    get_expert_activation_for_deepep,
    is_gated_activation,
    quick_geglu_deepep,
    relu2_deepep,
    swiglu_clamped_deepep,
    swiglu_oai_deepep,
    weighted_bias_geglu_impl,
    weighted_bias_swiglu_impl,
)
from moebius.torch_frontend.automodel.experts import GroupedExperts, GroupedExpertsDeepEP, _init_weights
from moebius.torch_frontend.automodel.grouped import (
    _apply_bias,
    _permute_tokens_for_grouped_mm,
    _torch_mm_experts_fwd,
)
from moebius.torch_frontend.automodel.te import GroupedExpertsTE
from moebius.torch_frontend.dispatch_allgather import _AllGatherConcatVarlenFn

__all__ = [
    "GroupedExperts",
    "GroupedExpertsDeepEP",
    "GroupedExpertsTE",
    "_AllGatherConcatVarlenFn",
    "_apply_bias",
    "_init_weights",
    "_permute_tokens_for_grouped_mm",
    "_torch_mm_experts_fwd",
    "get_expert_activation_for_deepep",
    "is_gated_activation",
    "quick_geglu_deepep",
    "relu2_deepep",
    "swiglu_clamped_deepep",
    "swiglu_oai_deepep",
    "weighted_bias_geglu_impl",
    "weighted_bias_swiglu_impl",
]
