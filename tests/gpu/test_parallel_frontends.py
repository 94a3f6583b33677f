"""PyTorch's ranks and Flax's devices on the same two GPUs, by NCCL: as near to each other as rounding allows."""

from __future__ import annotations

from functools import cache

import on_gpu
import pytest
import spread
import torch

pytestmark = [
    *on_gpu.MARKS,
    pytest.mark.gpu2,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
DISPATCHERS = (("allgather", "allgather"), ("alltoall", "alltoall"), ("alltoall", "ragged_all_to_all"))
EXPERTS = ("loop", "triton")
CASES = [spread.Case(name, *both, experts) for name in spread.SETTINGS for both in DISPATCHERS for experts in EXPERTS]
in_torch, in_flax = cache(lambda: spread.in_torch(CASES, "cuda")), cache(lambda: spread.in_flax(CASES, "cuda"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpus_of_pytorch_and_of_flax_agree_in_output_and_every_gradient(case: spread.Case) -> None:
    on_gpu.require("triton")
    spread.agree(case, in_torch(), in_flax())
