"""Tiny models of every family that load_moe reads, drawn at random and written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_ATTENTION = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {
    **_ATTENTION,
    "intermediate_size": 16,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_GROUPS = {"n_group": 4, "topk_group": 2}
_QWEN = {"intermediate_size": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}

# name -> (transformers' classes, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 3}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
    "qwen2_moe normalised": ("Qwen2Moe", {**_QWEN, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "norm_topk_prob": True}),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 8,
            "intermediate_size": 24,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            # Small enough to clamp, so that its place shows.
            "swiglu_limit": 1.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v2": ("DeepseekV2", {**_DEEPSEEK, "routed_scaling_factor": 1.5}),
    "deepseek_v2 groups": (
        "DeepseekV2",
        {**_DEEPSEEK, **_GROUPS, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", {**_DEEPSEEK, **_GROUPS}),
    "deepseek_v3 raw": ("DeepseekV3", {**_DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
}


def model(name: str, seed: int = 0, **settings: Any) -> Any:
    """A model of MODELS in float32, in evaluation mode; `settings` replace those of its row.

    Biases are drawn too, the correction bias among them: transformers would leave them at zero, and then nothing
    would show whether they are used.
    """
    import torch
    import transformers

    classes, own = MODELS[name]
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{classes}Config")
    if not hasattr(kind(), "swiglu_limit"):  # older versions of transformers have one limit, in the code
        own = {key: value for key, value in own.items() if key != "swiglu_limit"}
    config = kind(**{**_SIZES, **own, **settings})
    made = getattr(transformers, f"{classes}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in [*made.named_parameters(), *made.named_buffers()]:
            if ".mlp." in key and key.endswith("bias"):
                value.normal_(0.0, 0.3)
    return made


def write(name: str, folder: Path, **settings: Any) -> Any:
    """Save `model(name)` into `folder` as transformers does; returns the model."""
    made = model(name, **settings)
    made.save_pretrained(folder)
    return made
