"""`python -m moebius.compare.demo`: two small checkpoints, written by transformers, compared on our documents.

The models are drawn, not trained. A freshly drawn GPT-OSS would prove little: its biases are zero and nothing reaches
the clamp, so the biases are drawn too and the first projection is scaled until a share of its results clamps.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from moebius.compare import text as texts
from moebius.core.errors import MoEError

# Of the pre-activations, over both layers: inside the 1 to 10 % at which a clamp matters and does not rule.
CLAMPED = 0.04
_TOKENS = 256
# Bytes are the vocabulary: no tokenizer has to be written.
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}


def write_qwen3_moe(folder: Any, seed: int = 0) -> Path:
    """A Qwen3-MoE of two layers, 16 experts of width 96, 4 per token; returns the folder."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **_COMMON, intermediate_size=96, moe_intermediate_size=96, num_experts=16, norm_topk_prob=True
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return Path(folder)


def write_gpt_oss(folder: Any, text: str, seed: int = 0) -> tuple[Path, list[float]]:
    """A GPT-OSS of two layers, 8 experts of width 96, 4 per token, with biases, that clamps on `text`.

    Returns:
        The folder, and the share of pre-activations beyond the limit in each layer, measured on the text.
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    config = GptOssConfig(
        **_COMMON,
        intermediate_size=96,
        num_local_experts=8,
        sliding_window=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0.0, 0.3)
        ids = torch.tensor([list(text.encode()[:_TOKENS])])
        shares = [_scale_until_clamped(model, block.mlp.experts, ids) for block in model.model.layers]
    model.save_pretrained(folder)
    return Path(folder), shares


def _scale_until_clamped(model: Any, experts: Any, ids: Any) -> float:
    """Scale one block's first projection, bias included, until CLAMPED of its results on `ids` are beyond the limit."""
    import torch

    seen: list[Any] = []
    hook = experts.register_forward_pre_hook(lambda module, args, kwargs: seen.extend((args, kwargs)), with_kwargs=True)
    model(input_ids=ids)
    hook.remove()
    x_TD, ids_TK = seen[0][0], seen[0][1]
    hidden = torch.einsum("td,tkdu->tku", x_TD, experts.gate_up_proj[ids_TK]) + experts.gate_up_proj_bias[ids_TK]
    beyond = torch.cat([hidden[..., 0::2].flatten(), hidden[..., 1::2].abs().flatten()])
    scale = experts.limit / torch.quantile(beyond.double(), 1.0 - CLAMPED)
    experts.gate_up_proj.mul_(scale)
    experts.gate_up_proj_bias.mul_(scale)
    return float((beyond * scale > experts.limit).double().mean())


def demo(folder: Any) -> bool:
    """Write both checkpoints into `folder`, compare them, print the tables; returns whether both passed."""
    from rich.console import Console

    from moebius.compare.hidden import quiet
    from moebius.compare.numerics import report

    text, _ = texts.own()
    passed, console = [], Console(stderr=True)
    with console.status("writing two checkpoints") as spinner:
        with quiet():
            checkpoints = [write_qwen3_moe(Path(folder) / "qwen3_moe")]
            path, shares = write_gpt_oss(Path(folder) / "gpt_oss", text)
        checkpoints.append(path)
        for checkpoint in checkpoints:
            found = report(checkpoint, tokens=_TOKENS, say=spinner.update)
            passed.append(found.passed)
            print(found.table(color=sys.stdout.isatty()), end="\n\n", flush=True)
    print(f"gpt_oss was scaled to clamp: {', '.join(f'{share:.1%} in layer {i}' for i, share in enumerate(shares))}")
    print(f"{sum(passed)} of {len(passed)} checkpoints inside the bounds")
    return all(passed)


def main() -> int:
    """Parse --folder and run; returns the exit code: 0 inside the bounds, 1 outside, 2 bad input."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m moebius.compare.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here; a temporary folder if left out")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        if arguments.folder is not None:
            return 0 if demo(arguments.folder) else 1
        with tempfile.TemporaryDirectory(prefix="moebius-") as folder:
            return 0 if demo(folder) else 1
    except MoEError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
