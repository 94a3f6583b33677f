"""PyTorch's ranks and Flax's devices on the same tokens and weights: as near to each other as rounding allows."""

from __future__ import annotations

from functools import cache

import pytest
import spread

CASES = [spread.Case(name, each, each) for name in spread.SETTINGS for each in ("allgather", "alltoall")]
in_torch, in_flax = cache(lambda: spread.in_torch(CASES, "cpu")), cache(lambda: spread.in_flax(CASES, "cpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_of_pytorch_and_devices_of_flax_agree_in_output_and_every_gradient(case: spread.Case) -> None:
    spread.agree(case, in_torch(), in_flax())
