"""PyTorch: the experts against transformers' own, "eager" and "grouped_mm", forward and forward + backward.

Limit: the FLOPs of the rows, 6 R D I forward and three times that with all gradients, beside the rate of one dense
matmul of the same size in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.harness import THREADS, interleaved
from moebius.core import BackendConfig, MoEConfig
from moebius.torch_frontend import GroupedExperts

ROWS, DIM, INTER, K = 2048, 256, 512, 4


def main(runs: int) -> None:
    """Print the table for E = 8, 64, 128 in float32."""
    torch.set_num_threads(THREADS)
    print(f"\nPyTorch experts, float32, {ROWS} rows (T={ROWS // K}, K={K}), D={DIM}, I={INTER}, SwiGLU, ms")
    print("| E | pass | dense | moebius | moebius loop | HF eager | HF grouped_mm | better HF / moebius |")
    print("|---|---|---|---|---|---|---|---|")
    for n_experts in (8, 64, 128):
        for name, backward in (("forward", False), ("forward+backward", True)):
            print(_row(n_experts, name, backward, runs))


def _row(n_experts: int, name: str, backward: bool, runs: int) -> str:
    torch.manual_seed(0)
    x = torch.randn(ROWS // K, DIM, requires_grad=backward)
    weights, indices = torch.randn(ROWS // K, n_experts).softmax(-1).topk(K)
    weights.requires_grad_(backward)
    mask, dy = torch.ones(ROWS // K, dtype=torch.bool), torch.randn(ROWS // K, DIM)
    calls: dict[str, Callable[[], object]] = {"dense": _dense(backward)}
    for backend in (None, "loop"):
        module = _ours(n_experts, backend)
        calls[f"moebius {backend or ''}".strip()] = _step(module, (x, mask, weights, indices), dy, backward)
    for implementation in ("eager", "grouped_mm"):
        module = _theirs(n_experts, implementation)
        calls[f"HF {implementation}"] = _step(module, (x, indices, weights), dy, backward)
    ms = {kind: 1e3 * seconds for kind, seconds in interleaved(calls, runs).items()}
    ratio = min(ms["HF eager"], ms["HF grouped_mm"]) / ms["moebius"]
    return f"| {n_experts} | {name} | " + " | ".join(f"{value:.2f}" for value in ms.values()) + f" | {ratio:.2f}x |"


def _ours(n_experts: int, backend: str | None) -> GroupedExperts:
    config = MoEConfig(n_routed_experts=n_experts, n_activated_experts=K, dim=DIM, moe_inter_dim=INTER, dtype="float32")
    return GroupedExperts(config, BackendConfig(experts=backend))


def _theirs(n_experts: int, implementation: str) -> Any:
    config = Qwen3MoeConfig(hidden_size=DIM, moe_intermediate_size=INTER, num_experts=n_experts, num_experts_per_tok=K)
    config._experts_implementation = implementation
    module = Qwen3MoeExperts(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)
    return module


def _step(module: Any, inputs: tuple[Any, ...], dy: torch.Tensor, backward: bool) -> Callable[[], object]:
    for parameter in module.parameters():
        parameter.requires_grad_(backward)

    def run() -> None:
        y = module(*inputs)
        if backward:
            for tensor in (*inputs, *module.parameters()):
                tensor.grad = None
            y.backward(dy)

    return run


def _dense(backward: bool) -> Callable[[], object]:
    """The same FLOPs as one dense gated MLP over all rows."""
    rows = torch.randn(ROWS, DIM, requires_grad=backward)
    up, down = torch.randn(DIM, 2 * INTER, requires_grad=backward), torch.randn(INTER, DIM, requires_grad=backward)
    dout = torch.randn(ROWS, DIM)

    def run() -> None:
        out = (rows @ up)[:, :INTER] @ down
        if backward:
            out.backward(dout)

    return run
