"""Families of published checkpoints as data: one row each.

A row says how the family's config.json reads as an MoEConfig, which layers are MoE layers, and its recipes
(`moebius.core.recipes`): which stored tensor is which part of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moebius.core.recipes import CORRECTION, FUSED, ROUTER, Piece, Recipe, gpt_oss, per_expert, shared


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """What one value of a key of config.json adds to its family.

    Attributes:
        settings, constants: as those of a Family.
    """

    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of model.

    Attributes:
        model_type: as config.json names it. source: where the layout is written down.
        settings: MoEConfig field -> the keys of config.json that hold it, first found counts.
        defaults: values of keys that config.json may leave out.
        constants: MoEConfig fields that are the same for the whole family.
        choices: key of config.json -> the values that this family's mathematics has, with what each means.
        dense_layers, dense_first: keys of the dense layers' indices, and of how many layers at the start are dense.
        sparse_step: key of a step: layer i is an MoE layer where (i + step_offset) is a multiple of it.
        prefixes: of the block's tensors; the first that occurs counts.
        common: pieces of every recipe: router and shared experts, for as far as the config has them.
        recipes: name -> recipe of the experts; the first one's names are the published ones.
    """

    model_type: str
    source: str
    settings: Mapping[str, tuple[str, ...]]
    recipes: Mapping[str, Recipe]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Mapping[Any, Meaning]] = field(default_factory=dict)
    dense_layers: str | None = None
    dense_first: str | None = None
    sparse_step: str | None = None
    step_offset: int = 0
    prefixes: tuple[str, ...] = ("model.layers.{layer}.mlp.", "layers.{layer}.mlp.")
    common: tuple[Piece, ...] = ROUTER


_APART, _FUSED = "one tensor per expert and projection", "experts fused, gate rows then up rows"
_RECIPES = {_APART: per_expert("gate_proj", "up_proj", "down_proj"), _FUSED: FUSED}
_SWIGLU = {"expert_activation": "swiglu"}
_SILU = {"hidden_act": {"silu": Meaning()}}
_EARLY = {"score_func": "softmax", "softmax_before_topk": True}

_SIZES = {
    # transformers 5 writes one of these names where published checkpoints of the same family have the other
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "n_activated_experts": ("num_experts_per_tok",),
    "dim": ("hidden_size",),
}
_QWEN_SETTINGS = {**_SIZES, "moe_inter_dim": ("moe_intermediate_size",), "norm_topk_prob": ("norm_topk_prob",)}
_QWEN_DEFAULTS = {"norm_topk_prob": False, "hidden_act": "silu", "mlp_only_layers": [], "decoder_sparse_step": 1}
_DEEPSEEK_SETTINGS = {
    **_SIZES,
    "n_routed_experts": ("n_routed_experts", "num_experts", "num_local_experts"),
    "n_shared_experts": ("n_shared_experts",),
    "moe_inter_dim": ("moe_intermediate_size",),
    "route_scale": ("routed_scaling_factor",),
}
_GROUPS = {"n_expert_groups": ("n_group",), "n_limited_groups": ("topk_group",)}

_ROWS = (
    Family(
        model_type="mixtral",
        source="Mixtral, arXiv:2401.04088; transformers models/mixtral. A softmax over all experts, normalised over"
        " the chosen, is a softmax over the chosen",
        settings={**_SIZES, "moe_inter_dim": ("intermediate_size",)},
        defaults={"hidden_act": "silu"},
        constants={**_SWIGLU, "score_func": "softmax", "router_weights_fp32": True},
        choices=_SILU,
        prefixes=(
            "model.layers.{layer}.block_sparse_moe.",
            "layers.{layer}.block_sparse_moe.",
            "model.layers.{layer}.mlp.",  # in the memory of transformers 5
            "layers.{layer}.mlp.",
        ),
        recipes={_APART: per_expert("w1", "w3", "w2"), _FUSED: FUSED},
    ),
    Family(
        model_type="qwen2_moe",
        source="Qwen2, arXiv:2407.10671; transformers models/qwen2_moe",
        settings={**_QWEN_SETTINGS, "shared_expert_inter_dim": ("shared_expert_intermediate_size",)},
        defaults=_QWEN_DEFAULTS,
        constants={**_SWIGLU, **_EARLY, "n_shared_experts": 1, "shared_expert_gate": True},
        choices=_SILU,
        dense_layers="mlp_only_layers",
        sparse_step="decoder_sparse_step",
        step_offset=1,
        common=(
            *ROUTER,
            *shared("shared_expert"),
            Piece(source="shared_expert_gate.weight", target="shared_expert_gate.weight"),
        ),
        recipes=_RECIPES,
    ),
    Family(
        model_type="qwen3_moe",
        source="Qwen3, arXiv:2505.09388; transformers models/qwen3_moe",
        settings=_QWEN_SETTINGS,
        defaults=_QWEN_DEFAULTS,
        constants={**_SWIGLU, **_EARLY},
        choices=_SILU,
        dense_layers="mlp_only_layers",
        sparse_step="decoder_sparse_step",
        step_offset=1,
        recipes=_RECIPES,
    ),
    Family(
        model_type="gpt_oss",
        source="GPT-OSS, arXiv:2508.10925; transformers models/gpt_oss",
        settings={
            **_SIZES,
            "n_activated_experts": ("num_experts_per_tok", "experts_per_token"),
            "moe_inter_dim": ("intermediate_size",),
            "activation_alpha": ("swiglu_alpha",),
            "activation_limit": ("swiglu_limit",),
        },
        defaults={"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "hidden_act": "silu"},
        constants={
            "score_func": "softmax",
            "expert_activation": "quick_geglu",
            "router_bias": True,
            "expert_bias": True,
        },
        choices=_SILU,
        common=(
            Piece(source="router.weight", target="gate.weight"),
            Piece(source="router.bias", target="gate.bias"),
        ),
        recipes={
            "experts fused, input-major, gate and up interleaved": Recipe(pieces=gpt_oss(alternating=False)),
            "gate and up de-interleaved": Recipe(
                pieces=gpt_oss(alternating=True), changes={"expert_activation": "swigluoai"}, on_request=True
            ),
        },
    ),
    Family(
        model_type="deepseek_v2",
        source="DeepSeek-V2, arXiv:2405.04434; transformers models/deepseek_v2, which computes the router in float32:"
        " BackendConfig(gate_precision='float32')",
        settings=_DEEPSEEK_SETTINGS,
        defaults={
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "mlp_bias": False,
            "hidden_act": "silu",
        },
        constants={**_SWIGLU, "router_weights_fp32": True},
        choices={
            **_SILU,
            "scoring_func": {"softmax": Meaning()},
            "topk_method": {
                "greedy": Meaning(constants=_EARLY),
                "group_limited_greedy": Meaning(settings=_GROUPS, constants={"score_func": "softmax_with_groups"}),
            },
            # Normalised, the authors' code leaves out the scale and transformers leaves out the normalisation.
            "norm_topk_prob": {False: Meaning()},
            # Would be a bias of the shared experts alone.
            "mlp_bias": {False: Meaning()},
        },
        dense_first="first_k_dense_replace",
        sparse_step="moe_layer_freq",
        common=(*ROUTER, *shared("shared_experts")),
        recipes=_RECIPES,
    ),
    Family(
        model_type="deepseek_v3",
        source="DeepSeek-V3, arXiv:2412.19437; transformers models/deepseek_v3, which computes the router in float32:"
        " BackendConfig(gate_precision='float32')",
        settings={**_DEEPSEEK_SETTINGS, **_GROUPS, "norm_topk_prob": ("norm_topk_prob",)},
        defaults={
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "moe_layer_freq": 1,
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "hidden_act": "silu",
        },
        constants={
            **_SWIGLU,
            "score_func": "sigmoid_with_bias",
            "force_e_score_correction_bias": True,
            "router_weights_fp32": True,
        },
        choices={**_SILU, "scoring_func": {"sigmoid": Meaning()}, "topk_method": {"noaux_tc": Meaning()}},
        dense_first="first_k_dense_replace",
        sparse_step="moe_layer_freq",
        common=(*ROUTER, *CORRECTION, *shared("shared_experts")),
        recipes=_RECIPES,
    ),
    Family(
        model_type="olmoe",
        source="OLMoE, arXiv:2409.02060; transformers models/olmoe",
        settings={**_SIZES, "moe_inter_dim": ("intermediate_size",), "norm_topk_prob": ("norm_topk_prob",)},
        defaults={"norm_topk_prob": False, "hidden_act": "silu"},
        constants={**_SWIGLU, **_EARLY},
        choices=_SILU,
        recipes=_RECIPES,
    ),
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
