"""The numerics report on a block of Qwen3-30B-A3B's sizes: time and peak memory of each part.

The limits: of memory the parameters and one side's gradients in float32, 2 times the block; of time the products, 9
times the forward pass's FLOPs for one side's reference (values and variances, forward and backward), at the rate of one
dense float64 product timed in the same run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

E, K, D, I, TOKENS = 128, 8, 2048, 768, 512
_CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": E,
    "num_experts_per_tok": K,
    "hidden_size": D,
    "moe_intermediate_size": I,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "vocab_size": 1024,
}


def main(runs: int) -> None:
    """Write the block with random weights, compare it in a process of its own, print the parts; one run."""
    with tempfile.TemporaryDirectory(prefix="moebius-block-") as folder:
        write(Path(folder))
        for dtype in ("float32", "bfloat16"):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.cpu_compare", folder, dtype],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[1],
            )
            _print(json.loads(done.stdout.splitlines()[-1]), dtype)


def write(folder: Path) -> None:
    """config.json, the block's tensors in bfloat16 as published, and hidden states."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    prefix = "model.layers.0.mlp."
    tensors = {f"{prefix}gate.weight": drawn(E, D)}
    for expert in range(E):
        for name, shape in (("gate_proj", (I, D)), ("up_proj", (I, D)), ("down_proj", (D, I))):
            tensors[f"{prefix}experts.{expert}.{name}.weight"] = drawn(*shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"hidden": torch.randn(TOKENS, D, generator=generator)}, folder / "hidden.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG))


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """Parts with their seconds and peak memory in GiB, of this process."""
    import numpy as np

    from moebius.compare import report

    parts: list[dict[str, Any]] = []

    def say(line: str) -> None:
        _close(parts)
        parts.append({"part": line, "started": time.perf_counter()})
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    found = report(folder, hidden=folder / "hidden.safetensors", dtype=dtype, tokens=TOKENS, say=say)
    _close(parts)
    a = np.ones((2048, 2048))
    a @ a
    started = time.perf_counter()
    for _ in range(3):
        a @ a
    rate = 3 * 2 * 2048**3 / (time.perf_counter() - started)
    return {"parts": parts, "verdict": found.verdict, "seconds": dict(found.seconds), "rate": rate}


def _close(parts: list[dict[str, Any]]) -> None:
    if parts:
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        parts[-1] |= {"seconds": time.perf_counter() - parts[-1].pop("started"), "peak": int(peak.split()[1]) / 2**20}


def _print(found: dict[str, Any], dtype: str) -> None:
    block = 4 * (E * 3 * D * I + E * D) / 2**30
    flops = 2 * TOKENS * K * 3 * D * I
    floor = 9 * flops / found["rate"]
    print(f"\nmoebius compare, Qwen3-30B-A3B's block (E={E}, K={K}, D={D}, I={I}), {TOKENS} tokens, {dtype}")
    print(f"verdict: {found['verdict']}; the block is {block:.2f} GiB in float32")
    print(f"float64 products: {found['rate'] / 1e9:.0f} GFLOP/s; floor of one side's reference {floor:.0f} s\n")
    print("| part | s | peak GiB | times the block |")
    print("|---|---|---|---|")
    for part in found["parts"]:
        print(f"| {part['part']} | {part['seconds']:.1f} | {part['peak']:.2f} | {part['peak'] / block:.2f} |")
    total = sum(part["seconds"] for part in found["parts"])
    peak = max(part["peak"] for part in found["parts"])
    print(f"| all | {total:.1f} | {peak:.2f} | {peak / block:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
