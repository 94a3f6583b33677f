"""How well the noise model holds: z of correct layers in every dtype, over four seeds, beside the theory.

The limit is the theory: one rounding of log-uniform mantissas gives z_rms = sqrt(3 / (8 ln 2)) = 0.7355; float32 steps
that are sums lie below it, since backends add in blocks where the model adds one term after the other.
"""

from __future__ import annotations

import numpy as np
import torch

from moebius.compare import report
from moebius.compare.verdict import THEORY, Layer, Score
from moebius.core import MoEConfig
from moebius.torch_frontend import MoE

SHAPES = {
    "D = 256, I = 128, E = 16, K = 4": {
        "dim": 256,
        "moe_inter_dim": 128,
        "n_routed_experts": 16,
        "n_activated_experts": 4,
    },
    "D = 1024, I = 512, E = 8, K = 2": {
        "dim": 1024,
        "moe_inter_dim": 512,
        "n_routed_experts": 8,
        "n_activated_experts": 2,
    },
}
DTYPES = ("bfloat16", "float16", "float32")
SEEDS, TOKENS = 4, 256


def main(runs: int) -> None:
    """Print a table a shape; `runs` is not used: the figures are no times."""
    for title, sizes in SHAPES.items():
        found = {dtype: [_layer(sizes, dtype, seed) for seed in range(SEEDS)] for dtype in DTYPES}
        print(f"\nz of correct layers, {title}, {TOKENS} tokens, {SEEDS} seeds; theory {THEORY:.4f}\n")
        print(
            "z_rms of PyTorch / Flax from the layer's input on; in brackets of PyTorch's step alone; z_max of either.\n"
        )
        print("| stage |" + "".join(f" {dtype} | z_max |" for dtype in DTYPES))
        print("|---|" + "---|---|" * len(DTYPES))
        for row in found[DTYPES[0]][0].rows:
            print(f"| {_words(row.name)} |" + "".join(_cells(found[dtype], row.name) for dtype in DTYPES))
        for kind, column in (("values", False), ("gradients", True)):
            pairs = [_pooled(found[dtype], column) for dtype in DTYPES]
            print(f"| torch~flax, all {kind} |" + "".join(f" {rms:.2f} | {top:.1f} |" for rms, top in pairs))


def _layer(sizes: dict[str, int], dtype: str, seed: int) -> Layer:
    config = MoEConfig(softmax_before_topk=True, norm_topk_prob=True, dtype=dtype, **sizes)
    torch.manual_seed(seed)
    layer = MoE(config)
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(0.0, value.shape[-2 if value.dim() == 3 else -1] ** -0.5)
    hidden = np.random.default_rng(seed).standard_normal((TOKENS, config.dim)).astype(np.float32)
    return report(layer, hidden=hidden, dtype=dtype, seed=seed, tokens=TOKENS).layers[0]


def _cells(layers: list[Layer], name: str) -> str:
    rows = [layer.row(name) for layer in layers]
    whole = {side: _rms([row.whole[side] for row in rows]) for side in ("torch", "flax")}
    step = _rms([row.step["torch"] for row in rows])
    top = max(row.whole[side].z_max for row in rows for side in ("torch", "flax"))
    return f" {whole['torch']:.2f} / {whole['flax']:.2f} ({step:.2f}) | {top:.1f} |"


def _pooled(layers: list[Layer], gradients: bool) -> tuple[float, float]:
    """(z_rms, z_max) of the pair of sides, over all seeds and either the values or the gradients."""
    scores = [
        row.whole["torch~flax"] for layer in layers for row in layer.rows if row.name.startswith("grad.") == gradients
    ]
    return _rms(scores), max(score.z_max for score in scores)


def _rms(scores: list[Score]) -> float:
    return float(np.sqrt(sum(s.n * s.z_rms**2 for s in scores) / sum(s.n for s in scores)))


def _words(name: str) -> str:
    return f"gradient of {name.removeprefix('grad.').removeprefix('experts.')}" if name.startswith("grad.") else name
