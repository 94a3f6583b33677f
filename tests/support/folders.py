"""Checkpoint folders of every family, written by the safetensors specification with nothing but NumPy.

`CHECKPOINTS` holds, by name, what config.json says and the tensors of one MoE layer, the first of its model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebius.core import layout
from moebius.core.checkpoint import Plan, fill, plan
from moebius.core.errors import CheckpointError
from moebius.core.folder import header, read_folder

Arrays = dict[str, np.ndarray]

E, D, INTER = 3, 4, 4  # 2 INTER != D, yet down_proj is square: only its name tells the orientation
_KINDS = {"float32": "F32", "float64": "F64", "float16": "F16", "uint8": "U8"}
_SIZES = {"num_hidden_layers": 4, "hidden_size": D, "num_experts_per_tok": 2, "hidden_act": "silu"}

MIXTRAL = {**_SIZES, "model_type": "mixtral", "intermediate_size": INTER, "num_local_experts": E}
QWEN = {
    **_SIZES,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": INTER,
    "num_experts": E,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}
QWEN2 = {**QWEN, "model_type": "qwen2_moe", "norm_topk_prob": False, "shared_expert_intermediate_size": 5}
OLMOE = {**_SIZES, "model_type": "olmoe", "intermediate_size": INTER, "num_experts": E, "norm_topk_prob": False}
OSS = {
    **_SIZES,
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "intermediate_size": INTER,
    "num_local_experts": E,
    "swiglu_limit": 7.0,
}
GROUPED = 6  # experts in three groups of two
_DEEPSEEK = {
    **_SIZES,
    "moe_intermediate_size": INTER,
    "n_routed_experts": GROUPED,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
    "n_group": 3,
    "topk_group": 2,
}
DEEPSEEK2 = {
    **_DEEPSEEK,
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
}
DEEPSEEK3 = {
    **_DEEPSEEK,
    "model_type": "deepseek_v3",
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def draw(shape: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """Normal numbers of `dtype`, the same for the same shape and seed."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def apart(block: str, n: int = E, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Arrays:
    """Router and experts, one tensor per expert and projection."""
    tensors = {block + "gate.weight": draw((n, D), 1)}
    for e in range(n):
        tensors[f"{block}experts.{e}.{gate}.weight"] = draw((INTER, D), 10 + e)
        tensors[f"{block}experts.{e}.{up}.weight"] = draw((INTER, D), 20 + e)
        tensors[f"{block}experts.{e}.{down}.weight"] = draw((D, INTER), 30 + e)
    return tensors


def fused(block: str, n: int = E) -> Arrays:
    """Router and experts as `apart` draws them, the experts in two tensors."""
    one = {name.removeprefix(block): value for name, value in apart(block, n).items()}
    gate, up, down = (
        np.stack([one[f"experts.{e}.{part}_proj.weight"] for e in range(n)]) for part in ("gate", "up", "down")
    )
    return {
        block + "gate.weight": one["gate.weight"],
        block + "experts.gate_up_proj": np.concatenate([gate, up], axis=1),
        block + "experts.down_proj": down,
    }


def shared(block: str, width: int) -> Arrays:
    """A shared expert under the full name `block`."""
    return {
        block + "gate_proj.weight": draw((width, D), 41),
        block + "up_proj.weight": draw((width, D), 42),
        block + "down_proj.weight": draw((D, width), 43),
    }


def qwen_tensors(layer: int = 1, prefix: str = "model.") -> Arrays:
    """A Qwen3-MoE layer, as published."""
    return apart(f"{prefix}layers.{layer}.mlp.")


def qwen2_tensors(layer: int = 1) -> Arrays:
    """A Qwen2-MoE layer, as published."""
    block = f"model.layers.{layer}.mlp."
    gate = {block + "shared_expert_gate.weight": draw((1, D), 44)}
    return apart(block) | shared(block + "shared_expert.", 5) | gate


def oss_tensors(layer: int = 0) -> Arrays:
    """A GPT-OSS layer, as transformers writes it dequantised."""
    block = f"model.layers.{layer}.mlp."
    return {
        block + "router.weight": draw((E, D), 1),
        block + "router.bias": draw((E,), 2),
        block + "experts.gate_up_proj": draw((E, D, 2 * INTER), 3),
        block + "experts.gate_up_proj_bias": draw((E, 2 * INTER), 4),
        block + "experts.down_proj": draw((E, INTER, D), 5),
        block + "experts.down_proj_bias": draw((E, D), 6),
    }


def deepseek_tensors(layer: int = 2, *, correction: bool) -> Arrays:
    """A DeepSeek layer, as published; `correction` for V3's bias."""
    block = f"model.layers.{layer}.mlp."
    bias = {block + "gate.e_score_correction_bias": draw((GROUPED,), 45)} if correction else {}
    return apart(block, GROUPED) | bias | shared(block + "shared_experts.", 2 * INTER)


CHECKPOINTS: dict[str, tuple[dict[str, Any], Arrays]] = {
    "mixtral": (MIXTRAL, apart("model.layers.0.block_sparse_moe.", E, "w1", "w3", "w2")),
    "mixtral fused": (MIXTRAL, fused("model.layers.0.mlp.")),
    "qwen2_moe": (QWEN2, qwen2_tensors()),
    "qwen3_moe": (QWEN, qwen_tensors()),
    "qwen3_moe fused": (QWEN, fused("model.layers.1.mlp.")),
    "olmoe": (OLMOE, apart("model.layers.0.mlp.")),
    "gpt_oss": (OSS, oss_tensors()),
    "deepseek_v2": (DEEPSEEK2, deepseek_tensors(correction=False)),
    "deepseek_v3": (DEEPSEEK3, deepseek_tensors(correction=True)),
}


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file with these tensors."""
    entries, data = {}, b""
    for name, array in tensors.items():
        entries[name] = {
            "dtype": _KINDS[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head + data


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """A folder with one file of tensors; returns it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def write_sharded(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], n_shards: int = 3
) -> Path:
    """A folder with an index and its shards; returns it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for shard in range(n_shards):
        part, file = names[shard::n_shards], f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class _Reader:
    """safetensors.safe_open in six lines, which keeps what was asked for."""

    def __init__(self, file: Path, asked: list[str]):
        self.raw, self.entries, self.asked = file.read_bytes(), header(file), asked
        self.start = 8 + int.from_bytes(self.raw[:8], "little")
        self.places = json.loads(self.raw[8 : self.start])

    def get_tensor(self, name: str) -> np.ndarray:
        self.asked.append(name)
        begin, end = self.places[name]["data_offsets"]
        flat = np.frombuffer(self.raw[self.start + begin : self.start + end], self.entries[name].dtype)
        return flat.reshape(self.entries[name].shape)


@contextmanager
def opened(file: Path, asked: list[str] | None = None) -> Iterator[_Reader]:
    """Opens a file for `fill`; puts the names of the tensors that are read into `asked`."""
    yield _Reader(file, [] if asked is None else asked)


def load(folder: Path, layer: int | None = None, **settings: Any) -> tuple[Plan, Arrays]:
    """(the plan, its parameters and state); what the plan leaves out stays NaN."""
    made = plan(read_folder(folder), layer, **settings)
    rows = layout.moe(made.config) + layout.state(made.config)
    buffers = {row.name: np.full(row.shape, np.nan, row.dtype) for row in rows}
    fill(made, buffers, opened)
    return made, buffers


def error_of(folder: Path, layer: int | None = None, **settings: Any) -> CheckpointError:
    """The error of `plan`, which says what was asked, found, and what to do."""
    with pytest.raises(CheckpointError) as caught:
        plan(read_folder(folder), layer, **settings)
    assert all((caught.value.asked, caught.value.found, caught.value.do))
    return caught.value
