"""Which golden vectors exist: every row of the tables, with every setting that changes what a layer computes.

A new activation or routing rule is here by itself; `moebius.core.vectors` computes and stores what these cases give.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from itertools import product
from typing import Any

from moebius.core import layout
from moebius.core.activations import ACTIVATIONS, CONFIG_ACTIVATIONS
from moebius.core.config import MoEConfig
from moebius.core.errors import MoEWarning
from moebius.core.routing import ROUTING_RULES

Settings = dict[str, Any]

LAYOUTS = {"experts": layout.experts, "gate": layout.gate, "moe": layout.moe}

# (low, span, over) of each kind of array: its numbers are (low ... low + span - 1) / over.
_RECIPES = {
    "x": (-4, 9, 4),
    "weight": (-7, 15, 8),
    "bias": (-15, 31, 32),
    # Reaches below every score, so that it matters whether an excluded group counts as 0 or as -inf.
    "correction": (-31, 63, 32),
    # Coarse, so that some tokens choose between equal logits.
    "router weight": (-3, 7, 2),
    "router bias": (-3, 7, 8),
    "gradient": (-8, 17, 8),
}
_ROUTER = ("weight", "bias", "gate.weight", "gate.bias")
_LITERALS: dict[str, Any] = {
    # A duplicate, -1, the first id past the end, others far out; expert 2 is named by the masked token alone.
    "ids": [[0, 1], [1, 1], [-1, 0], [3, 1], [0, 2], [1, 99], [-7, 3], [1, 0]],
    # One is zero and one negative, both of routes that count.
    "weights": [
        [0.75, 0.375],
        [0.5, 0.0],
        [0.625, 1.0],
        [0.25, 0.875],
        [0.375, 0.5],
        [-0.25, 0.75],
        [1.0, 0.125],
        [0.625, 0.25],
    ],
    "token_mask": [True, True, True, True, False, True, True, True],
    "padding_mask": [[False, False, False, True], [True, False, False, False]],
    "n_sequences": 2,
}
_LITERALS_OF = {"experts": ("ids", "weights", "token_mask"), "gate": ("token_mask",), "moe": ("padding_mask",)}

# Settings that mean a row which no name of a config means alone.
_ACTIVATION_OF = {"swiglu_clamped": "swiglu"}
_RULE_OF = {
    "softmax_before_topk": {"score_func": "softmax", "softmax_before_topk": True},
    "sigmoid_biased_weights": {"score_func": "sigmoid", "router_weight_uses_score_correction_bias": True},
}

# Pre-activations are on both sides of it and none is on it, where the gradient jumps and no bound could be given:
# they are multiples of 1/32. Exact in bfloat16.
_LIMIT = 1.015625

_LOSSES = {"z_loss_coeff": 0.03125, "seq_aux_loss_coeff": 0.5}
_CORRECTED = {"force_e_score_correction_bias": True, "norm_topk_prob": True, "route_scale": 2.5}
_GROUPS = {"n_expert_groups": 2, "n_limited_groups": 1}
_BIASES = {"expert_bias": True, "router_bias": True}
# Named after models whose settings they resemble.
_LAYERS: dict[str, Settings] = {
    "qwen3": {
        **_RULE_OF["softmax_before_topk"],
        "norm_topk_prob": True,
        "aux_loss_coeff": 0.0625,
    },
    "qwen3_next": {
        **_RULE_OF["softmax_before_topk"],
        "n_shared_experts": 1,
        "shared_expert_gate": True,
    },
    "gpt_oss": {
        **_BIASES,
        "expert_activation": "quick_geglu",
        "activation_limit": _LIMIT,
    },
    "deepseek_v2": {
        **_GROUPS,
        "score_func": "softmax_with_groups",
        "route_scale": 16.0,
        "n_shared_experts": 2,
    },
    "deepseek_v3": {
        **_CORRECTED,
        **_GROUPS,
        "score_func": "sigmoid_with_bias",
        "n_shared_experts": 1,
    },
    "deepseek_v3_losses": {
        **_CORRECTED,
        **_GROUPS,
        **_LOSSES,
        "score_func": "sigmoid_with_bias",
        "aux_loss_coeff": 0.0625,
    },
    "deepseek_v4": {
        **_CORRECTED,
        "score_func": "sqrtsoftplus",
        "swiglu_limit": _LIMIT,
        "n_shared_experts": 2,
    },
    "nemotron": {
        **_CORRECTED,
        "score_func": "sigmoid_with_bias",
        "expert_activation": "relu2",
        "moe_latent_size": 4,
        "n_shared_experts": 1,
        "shared_expert_inter_dim": 6,
        "shared_expert_activation": "relu2",
    },
    "kimi": {
        **_CORRECTED,
        **_RULE_OF["sigmoid_biased_weights"],
        "expert_activation": "geglu",
    },
    "everything": {
        **_CORRECTED,
        **_GROUPS,
        **_BIASES,
        "score_func": "softmax_with_bias",
        "aux_loss_coeff": 0.0625,
        "expert_activation": "swigluoai",
        "activation_limit": _LIMIT,
        "apply_router_weight_after_down": True,
        "moe_latent_size": 4,
        "n_shared_experts": 2,
        "shared_expert_gate": True,
    },
}


def declared() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(cases, arrays): each case's name, kind, config and inputs, and the arrays that the inputs name."""
    arrays: dict[str, Any] = {}
    grids = {"experts": _experts(), "gate": _gates(), "moe": _layers()}
    cases = [
        {"name": f"{kind}-{name}", "kind": kind, "config": settings, "inputs": _inputs(kind, settings, arrays)}
        for kind, grid in grids.items()
        for name, settings in grid
    ]
    return cases, dict(sorted(arrays.items()))


def config_of(settings: Settings) -> MoEConfig:
    """The config of a case, without the warning of settings that its rule ignores: some cases are about those."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoEWarning)
        return MoEConfig(**settings)


def _sizes(experts: int, k: int, dim: int, inter: int) -> Settings:
    sizes = {"n_routed_experts": experts, "n_activated_experts": k, "dim": dim, "moe_inter_dim": inter}
    return sizes | {"dtype": "float32"}


def _experts() -> Iterator[tuple[str, Settings]]:
    odd = {"expert_bias": True, "dim": 5, "moe_inter_dim": 3}
    for row in ACTIVATIONS.values():
        base = _sizes(3, 2, 8, 8) | {"expert_activation": _ACTIVATION_OF.get(row.name, row.name)}
        if row.limit_field is not None:
            base[row.limit_field] = _LIMIT
        for bias, after in product((False, True), repeat=2):
            words = [row.name, *["bias"] * bias, *["after_down"] * after]
            yield "-".join(words), base | {"expert_bias": bias, "apply_router_weight_after_down": after}
        if row.limit_field is not None and row.name in CONFIG_ACTIVATIONS:
            yield f"{row.name}-limit_zero", base | odd | {row.limit_field: 0.0}
        if row.gated and row.limit is None:
            yield f"{row.name}-odd_widths", base | odd


def _gates() -> Iterator[tuple[str, Settings]]:
    for name in ROUTING_RULES:
        base = _sizes(8, 3, 4, 8) | {"route_scale": 2.5, "aux_loss_coeff": 0.0625}
        base |= _RULE_OF.get(name, {"score_func": name})
        for norm, bias, groups in product((False, True), repeat=3):
            words = [name, *["norm"] * norm, *["bias"] * bias, *["groups"] * groups]
            settings: Settings = {"norm_topk_prob": norm, "force_e_score_correction_bias": bias}
            settings |= {"n_expert_groups": 4, "n_limited_groups": 2} if groups else {}
            yield "-".join(words), base | settings
        base |= {"norm_topk_prob": True, "router_bias": True}
        yield f"{name}-one_expert", base | {"n_activated_experts": 1}
        yield f"{name}-all_experts", base | {"n_activated_experts": 8}
        corrected = {"force_e_score_correction_bias": True, "n_expert_groups": 4, "n_limited_groups": 2}
        yield f"{name}-losses", base | corrected | _LOSSES


def _layers() -> Iterator[tuple[str, Settings]]:
    for name, settings in _LAYERS.items():
        yield name, _sizes(4, 2, 8, 4) | settings


def _inputs(kind: str, settings: Settings, arrays: dict[str, Any]) -> dict[str, str]:
    """{input: id of its array}; puts the arrays that are new into `arrays`."""
    config, n_tokens = config_of(settings), len(_LITERALS["token_mask"])
    tokens = (2, n_tokens // 2) if kind == "moe" else (n_tokens,)
    slots = (*tokens, config.n_activated_experts)
    chosen = {"x": _drawn("x", "x", (*tokens, config.dim), arrays)}
    if kind != "experts" and config.has_correction_bias:
        chosen["correction_bias"] = _drawn("correction_bias", "correction", (config.n_routed_experts,), arrays)
    if kind == "gate":
        chosen["dweights"] = _drawn("dweights", "gradient", slots, arrays)
    else:
        chosen["dy"] = _drawn("dy", "gradient", (*tokens, config.dim), arrays)
    for row in LAYOUTS[kind](config):
        recipe = "bias" if row.zeros else "weight"
        recipe = f"router {recipe}" if row.name in _ROUTER else recipe
        chosen[row.name] = _drawn(row.name, recipe, row.shape, arrays)
    sequences = ("n_sequences",) if kind == "gate" and config.seq_aux_loss_coeff else ()
    for name in (*_LITERALS_OF[kind], *sequences):
        arrays[name] = {"values": _LITERALS[name]}
        chosen[name] = name
    return chosen


def _drawn(name: str, recipe: str, shape: tuple[int, ...], arrays: dict[str, Any]) -> str:
    key = f"{name} {'x'.join(map(str, shape))}"
    low, span, over = _RECIPES[recipe]
    seed = 1 + zlib.crc32(key.encode()) % 2147483646
    arrays[key] = {"shape": list(shape), "seed": seed, "low": low, "span": span, "over": over}
    return key
