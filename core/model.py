"""A published model as its config.json describes it: its family, its MoE layers, and what an MoE layer of it is."""

from __future__ import annotations

from typing import Any

from moebius.core.config import MoEConfig
from moebius.core.errors import CheckpointError
from moebius.core.families import FAMILIES, Family
from moebius.core.folder import CONFIG, Folder

DEQUANTISE = "quantised weights are not supported yet: load with transformers, dequantise, and call save_pretrained"


def family_of(folder: Folder) -> Family:
    """The row of FAMILIES that config.json names.

    Raises:
        CheckpointError: an unknown family, or quantised weights.
    """
    name, asked = folder.config.get("model_type"), f"an MoE layer of {folder.path}"
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            asked,
            f"model_type {name!r}, architectures {folder.config.get('architectures')!r}",
            f"use a checkpoint of a known family: {', '.join(FAMILIES)}",
        )
    quantised = folder.config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(asked, f"weights quantised by {method!r} (quantization_config in {CONFIG})", DEQUANTISE)
    return FAMILIES[name]


def config_of(family: Family, folder: Folder) -> MoEConfig:
    """The config that every MoE layer of a model has, before its tensors say of which dtype they are.

    Raises:
        CheckpointError: a value is missing, of another type, or of another mathematics than the family's.
        ConfigError: values contradict each other.
    """
    settings, constants = dict(family.settings), dict(family.constants)
    for key, meanings in family.choices.items():
        value = _value(family, folder, key)
        if value not in meanings:
            raise CheckpointError(
                f"{key} among {', '.join(map(repr, meanings))}, which {family.model_type} is computed with",
                f"{key}={value!r} in {folder.path / CONFIG}",
                "use a checkpoint with one of them",
            )
        settings |= meanings[value].settings
        constants |= meanings[value].constants
    fields = {name: _value(family, folder, *keys) for name, keys in settings.items()}
    if fields.get("norm_topk_prob") and fields["n_activated_experts"] == 1:
        # MoEConfig leaves a single weight as it is; every family that normalises makes a 1 of it.
        raise CheckpointError(
            f"one expert per token of {folder.path}, its weight normalised to 1",
            "norm_topk_prob normalises two or more",
            "use a checkpoint with norm_topk_prob=false or more experts per token",
        )
    return MoEConfig(**fields, **constants)


def moe_layers(family: Family, folder: Folder) -> tuple[int, ...]:
    """Indices of the layers that are MoE layers."""
    dense = _value(family, folder, family.dense_layers) if family.dense_layers else []
    first = _value(family, folder, family.dense_first) if family.dense_first else 0
    step = max(_value(family, folder, family.sparse_step), 1) if family.sparse_step else 1
    count = _value(family, folder, "num_hidden_layers")
    return tuple(i for i in range(first, count) if i not in dense and (i + family.step_offset) % step == 0)


def _value(family: Family, folder: Folder, *keys: str) -> Any:
    """What config.json says under one of these keys, else the family's default."""
    found = {key: folder.config[key] for key in keys if folder.config.get(key) is not None}
    default = family.defaults.get(keys[0])
    asked = f"{' or '.join(keys)} in {folder.path / CONFIG}"
    if not found and (default is None or (default and any(key in folder.config for key in keys))):
        # A null counts as left out where the default is false, 0 or empty, as null is to the families' own code.
        what = "null" if any(key in folder.config for key in keys) else "no such key"
        raise CheckpointError(asked, what, f"complete it: {family.model_type} needs it")
    value, *others = [*found.values()] or [default]
    if any(other != value for other in others):
        raise CheckpointError(asked, f"{found}, which differ", "leave only one of them")
    kinds = (int, float) if isinstance(default, float) else (type(default) if default is not None else int,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise CheckpointError(asked, repr(value), f"write a value of type {kinds[-1].__name__}")
    return value
