"""The comparison across devices: sides on a GPU and on the CPU, held against one reference."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

# isort: split
import problems

from moebius.compare.judge import judge
from moebius.compare.sides import parse, run
from moebius.compare.sides.answer import Desk
from moebius.compare.verdict import FAIL, PASS

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible")]

NAMES = ["torch:grouped_mm@cuda", "torch:loop@cuda", "flax:loop@gpu", "flax:ragged_dot@gpu", "torch:loop@cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_sides_on_a_gpu_and_on_the_cpu_pass_at_every_stage(name: str, dtype: str) -> None:
    p = problems.problem(name, dtype)
    with Desk() as desk:
        answers = {side.name: run(p, side, desk) for side in parse(NAMES)}
        layer = judge(p, answers)
    assert [answer.device.split(":")[0] for answer in answers.values()] == ["cuda", "cuda", "gpu", "gpu", "cpu"]
    z = {row.name: {side: round(score.z_rms, 2) for side, score in row.step.items()} for row in layer.rows}
    print(name, dtype, z)
    assert layer.verdict == PASS, layer.faults


def test_tf32_where_float32_is_due_fails_at_the_first_product() -> None:
    p = problems.problem("swiglu", "float32", dim=512, tokens=128)
    module = problems.Layer(p.config)

    def short(x: torch.Tensor, w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.backends.cuda.matmul.allow_tf32 = True  # inside the side, past what a comparison pins
        try:
            return module(x.cuda(), {name: value.cuda() for name, value in w.items()})
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    with Desk() as desk:
        layer = judge(p, {"mine": problems.answer(p, short, desk)})
    assert next(row.name for row in layer.rows if row.step["mine"].verdict == FAIL) == "logits"
