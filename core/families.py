"""Families of published checkpoints as data: one row each.

A row says how the family's config.json reads as an MoEConfig, which layers are MoE layers, and its recipes. A recipe
is a list of pieces; a piece says that a stored tensor is, transposed or not, one region of a canonical parameter
(`moebius.core.layout.moe`). Stacking experts is a region per expert, concatenating halves a region per half, renaming
the pair of names. A map from tensors to regions reads both ways, so loading and exporting are one definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One stored tensor, or one per expert where the name has {expert}.

    Attributes:
        source: name after the block's prefix. target: the parameter that it is part of.
        half: 0 or 1 for the first or second half of the last axis, None for all of it.
        transposed: the last two axes are stored in the other order.
    """

    source: str
    target: str
    half: int | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of model.

    Attributes:
        model_type: as config.json names it. source: where the layout is written down.
        settings: MoEConfig field -> the keys of config.json that hold it, first found counts.
        defaults: values of keys that config.json may leave out.
        constants: MoEConfig fields that are the same for the whole family.
        requires: key of config.json -> the one value that this family's mathematics has.
        dense_layers, sparse_step: keys that say which layers are dense; None where all are MoE layers.
        prefixes: of the block's tensors; the first that occurs counts.
        router: pieces of every recipe. recipes: name -> pieces of the experts; names of tensors tell which.
    """

    model_type: str
    source: str
    settings: Mapping[str, tuple[str, ...]]
    router: tuple[Piece, ...]
    recipes: Mapping[str, tuple[Piece, ...]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: str | None = None
    sparse_step: str | None = None
    prefixes: tuple[str, ...] = ("model.layers.{layer}.mlp.", "layers.{layer}.mlp.")


_UP, _DOWN = "experts.gate_and_up_projs", "experts.down_projs"

_ROWS = (
    Family(
        model_type="qwen3_moe",
        source="Qwen3, arXiv:2505.09388; transformers models/qwen3_moe",
        settings={
            # transformers 5 writes num_local_experts where the published checkpoints have num_experts
            "n_routed_experts": ("num_experts", "num_local_experts"),
            "n_activated_experts": ("num_experts_per_tok",),
            "dim": ("hidden_size",),
            "moe_inter_dim": ("moe_intermediate_size",),
            "norm_topk_prob": ("norm_topk_prob",),
        },
        defaults={"norm_topk_prob": False, "hidden_act": "silu", "mlp_only_layers": [], "decoder_sparse_step": 1},
        constants={"score_func": "softmax", "softmax_before_topk": True, "expert_activation": "swiglu"},
        requires={"hidden_act": "silu"},
        dense_layers="mlp_only_layers",
        sparse_step="decoder_sparse_step",
        router=(Piece(source="gate.weight", target="gate.weight"),),
        recipes={
            "one tensor per expert and projection": (
                Piece(source="experts.{expert}.gate_proj.weight", target=_UP, half=0, transposed=True),
                Piece(source="experts.{expert}.up_proj.weight", target=_UP, half=1, transposed=True),
                Piece(source="experts.{expert}.down_proj.weight", target=_DOWN, transposed=True),
            ),
            "experts fused, gate rows then up rows": (
                Piece(source="experts.gate_up_proj", target=_UP, transposed=True),
                Piece(source="experts.down_proj", target=_DOWN, transposed=True),
            ),
        },
    ),
    Family(
        model_type="gpt_oss",
        source="GPT-OSS, arXiv:2508.10925; transformers models/gpt_oss",
        settings={
            "n_routed_experts": ("num_local_experts", "num_experts"),
            "n_activated_experts": ("num_experts_per_tok", "experts_per_token"),
            "dim": ("hidden_size",),
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
        requires={"hidden_act": "silu"},
        router=(
            Piece(source="router.weight", target="gate.weight"),
            Piece(source="router.bias", target="gate.bias"),
        ),
        recipes={
            "experts fused, input-major, gate and up interleaved": (
                Piece(source="experts.gate_up_proj", target=_UP),
                Piece(source="experts.down_proj", target=_DOWN),
                Piece(source="experts.gate_up_proj_bias", target="experts.gate_up_proj_bias"),
                Piece(source="experts.down_proj_bias", target="experts.down_proj_bias"),
            ),
        },
    ),
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
