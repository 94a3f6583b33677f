"""SonicMoE's experts, where its package and the CUTLASS DSL below it can be imported."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_problem import Candidate, Problem

NEEDED = ("sonicmoe", "quack", "cutlass")
# Of the tiles that its tuners compile and time for each shape, some forty a product and minutes in all, those that they
# may take here: on Hopper, with the larger tiles.
TILES = ((128, 256), (256, 128), (256, 192), (128, 192), (128, 128))


def build(problem: Problem) -> Candidate:
    """moe_general_routing_inputs on given routes; matrices output-major, gate and up in one half each.

    Raises:
        ImportError: a package is not there.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}; sonic-moe 0.1.2 asks for torch 2.9.1 at most")
    function = import_module("sonicmoe.functional").moe_general_routing_inputs
    few()
    swiglu = import_module("sonicmoe.enums").ActivationType.SWIGLU
    s, device = problem.shape, problem.up.device
    up, down = (nn.Parameter(weight.mT.contiguous()) for weight in (problem.up, problem.down))
    tokens = torch.arange(s.tokens, dtype=torch.int32, device=device).repeat_interleave(s.k)

    def call(x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        ids, w1, w2 = indices.reshape(-1).int(), up.permute(1, 2, 0), down.permute(1, 2, 0)
        found = function(
            x, weights.reshape(-1), tokens, ids, w1, None, w2, None, s.n_experts, stream, swiglu, concat_layout=True
        )
        y: torch.Tensor = found[0]
        return y

    return Candidate(
        call=call,
        parameters=(up, down),
        gradients=lambda expert: (up.grad[expert].mT, down.grad[expert].mT),  # type: ignore[index]
        note="sonic-moe, the larger ones of its tiles",
    )


def few() -> None:
    """Leave the tuners of its products the tiles in TILES, two blocks side by side along the rows."""
    for tuner in vars(import_module("quack.gemm_interface")).values():
        if hasattr(tuner, "configs") and hasattr(tuner, "fn"):
            tuner.configs = [config for config in tuner.configs if _kept(config.kwargs["config"])] or tuner.configs


def _kept(config: Any) -> bool:
    hopper = config.device_capacity == 9 and not config.swap_ab
    return hopper and (config.cluster_m, config.cluster_n) == (2, 1) and (config.tile_m, config.tile_n) in TILES
