"""`python -m moebius.compare.demo`: three small checkpoints, written by transformers, compared on our documents.

The models are drawn, not trained. A freshly drawn GPT-OSS would prove little: its biases are zero and nothing reaches
the clamp, so the biases are drawn too and the first projection is scaled until a share of its results clamps.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebius.compare import text as texts
from moebius.core.config import MoEConfig
from moebius.core.errors import MoEError

if TYPE_CHECKING:
    from moebius.compare.result import Report

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


def write_deepseek_v3(folder: Any, seed: int = 0) -> Path:
    """A DeepSeek-V3 of four layers, the first dense, 16 experts in 4 groups, a shared one; returns the folder."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV3Config(
        **{k: v for k, v in _COMMON.items() if k != "head_dim"} | {"num_hidden_layers": 4, "num_key_value_heads": 4},
        intermediate_size=192,
        moe_intermediate_size=64,
        n_routed_experts=16,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    )
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, value in model.named_buffers():
            if "e_score_correction_bias" in name:
                value.normal_(0.0, 0.05)
    model.save_pretrained(folder)
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


def faulty(config: MoEConfig) -> Callable[..., dict[str, Any]]:
    """A layer as a side, in plain steps, with one fault: it clamps the gate from below as well as from above."""
    import torch

    from moebius import torch_frontend as moebius
    from moebius.torch_frontend.dispatch import Sent

    def layer(x: Any, w: Any) -> dict[str, Any]:
        logits = torch.nn.functional.linear(x, w["gate.weight"], w["gate.bias"])
        routing = moebius.route(logits, config)
        weights = routing.weights_TK.to(x.dtype)
        sent = Sent(x, weights.float(), routing.ids_TK)
        rows, row_weights, sizes, experts, state = moebius.permute(sent, config.n_routed_experts)
        up = moebius.grouped_matmul(rows, w["experts.gate_and_up_projs"], sizes)
        up = moebius.add_bias(up, w["experts.gate_up_proj_bias"], experts)
        gate, other = up.unflatten(-1, (-1, 2)).unbind(-1)
        both = torch.stack([gate.clamp(min=-config.activation_limit), other], dim=-1).flatten(-2)  # the fault
        act = moebius.activate(both, row_weights, config.activation)
        out = moebius.grouped_matmul(act, w["experts.down_projs"], sizes)
        out = moebius.add_bias(out, w["experts.down_proj_bias"], experts, row_weights)
        y = moebius.unpermute(out, state)
        stages = {"logits": logits, "weights": weights, "ids": routing.ids_TK, "rows": rows}
        return stages | {"up": up, "activation": act, "down": out, "output": y}

    return layer


def demo(folder: Any) -> bool:
    """Write the checkpoints into `folder`, compare them, print the tables; returns whether all went as it should."""
    from rich.console import Console

    from moebius.compare.files import write_whole
    from moebius.compare.hidden import quiet
    from moebius.compare.numerics import report
    from moebius.compare.plot import save
    from moebius.compare.table import worst_table

    folder, color = Path(folder), sys.stdout.isatty()
    folder.mkdir(parents=True, exist_ok=True)
    text, _ = texts.own()
    with Console(stderr=True).status("writing three checkpoints") as spinner:
        with quiet():
            qwen = write_qwen3_moe(folder / "qwen3_moe")
            deepseek = write_deepseek_v3(folder / "deepseek_v3")
            gpt_oss, shares = write_gpt_oss(folder / "gpt_oss", text)
        passed = []

        def show(title: str, found: Report) -> Report:
            passed.append(found.passed)
            print(f"== {title}\n\n{found.table(color=color)}\n", flush=True)
            return found

        common: dict[str, Any] = {"tokens": _TOKENS, "say": spinner.update}
        show("Qwen3-MoE in float32: transformers' block counts too", report(qwen, **common))
        found = show("GPT-OSS in bfloat16", report(gpt_oss, dtype="bfloat16", **common))
        print(f"It was scaled to clamp: {', '.join(f'{s:.1%} in layer {i}' for i, s in enumerate(shares))}.\n")
        spinner.update("drawing the figure")
        save(found, folder / "gpt_oss.png")
        write_whole(folder / "gpt_oss.html", found.html())
        show("DeepSeek-V3 in float32: every MoE layer", report(deepseek, layer="all", **common))
        side = {"faulty": faulty(found.config), "flax": "flax"}
        seeded = report(gpt_oss, dtype="bfloat16", sides=side, **common)
    print("== A fault, seeded: the gate clamped from below too. First found, and farthest off at that step:\n")
    print(f"{seeded.faults[0] if seeded.faults else 'nothing found'}\n")
    print(worst_table(seeded.worst(5, row="activation", column="faulty", step=True), color=color), end="\n\n")
    caught = not seeded.passed and seeded.faults[0].startswith("activation, faulty")
    print(f"figure and page: {folder / 'gpt_oss.png'}, {folder / 'gpt_oss.html'}")
    print(f"{sum(passed)} of {len(passed)} checkpoints pass; the seeded fault is {'found' if caught else 'NOT found'}")
    return all(passed) and caught


def main() -> int:
    """Parse --folder and run; returns the exit code: 0 all as it should be, 1 it is not, 2 bad input."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m moebius.compare.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep checkpoints, figure and page here; else a temporary folder")
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
