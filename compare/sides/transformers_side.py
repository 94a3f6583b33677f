"""transformers' own block: what the checkpoint's authors run, loaded by transformers itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moebius.compare.hidden import quiet, shortened_config, trying
from moebius.compare.problem import Problem
from moebius.compare.sides import Side
from moebius.compare.sides.answer import Answer, Desk, leaving
from moebius.compare.sides.precise import precise
from moebius.core.errors import CheckpointError, ConfigError
from moebius.core.families import Family
from moebius.core.folder import listed
from moebius.core.recipes import Piece
from moebius.core.stages import GRADIENT, INPUT, OUTPUT

_NOTE = (
    "transformers rounds after every operation where moebius rounds once a step: in 16 bits its column is information"
)


def run(p: Problem, desk: Desk, side: Side) -> Answer:
    """Output, experts, routing weights and gradients of a block of transformers', cast to the problem's dtype.

    It weights the experts after the down projection, and so does its reference. In float32 it counts.
    """
    if side.call is None:
        raise ConfigError("side 'transformers'", "no checkpoint to load its block from", "leave the side out")
    block, family, recipe = side.call
    x_TD = p.tensor(p.x_TD).requires_grad_()
    found: dict[str, torch.Tensor] = {}
    hook = block.experts.register_forward_pre_hook(_keeps_routing(found), with_kwargs=True)
    block = block.to(x_TD.dtype).eval()
    block.zero_grad()
    try:
        with precise():
            y = block(x_TD[None])
            y = y[0] if isinstance(y, tuple) else y
            y.reshape(x_TD.shape).backward(p.tensor(p.dy_TD))
    finally:
        hook.remove()
    assert x_TD.grad is not None
    found |= {OUTPUT: y.detach().reshape(x_TD.shape), GRADIENT + INPUT: x_TD.grad}
    found |= {GRADIENT + name: grad for name, grad in gradients(block, pieces_of(block, family, recipe), p)}
    counts = p.dtype == "float32"
    answer = desk.answer(
        leaving(found), counts=counts, paired=False, weight_after=True, notes=() if counts else (_NOTE,)
    )
    block.zero_grad()
    return answer


def gradients(block: nn.Module, pieces: Mapping[str, Piece], p: Problem) -> list[tuple[str, torch.Tensor]]:
    """(parameter, its gradient) in the problem's layout, of the block's parameters that have one."""
    own = dict(block.named_parameters())
    return [
        (piece.target, _read(own[name].grad, piece))
        for name, piece in pieces.items()
        if piece.target in p.parameters and name in own and own[name].grad is not None
    ]


def pieces_of(block: nn.Module, family: Family, recipe: str) -> dict[str, Piece]:
    """Each of the block's own tensors -> the piece that says which of our parameters it is, and how it lies.

    transformers holds the experts fused, whatever the folder does: where the folder's recipe has another name for them,
    a recipe of the family that has theirs says how they lie.
    """
    others = [found for found in family.recipes.values() if not found.on_request]
    named = {name for name, _ in (*block.named_parameters(), *block.named_buffers())}
    pieces = [piece for found in (*others, family.recipes[recipe]) for piece in found.pieces]  # the last one counts
    return {piece.source: piece for piece in (*family.common, *pieces) if piece.source in named and piece.half is None}


def _read(stored: Any, piece: Piece) -> torch.Tensor:
    """A tensor of the block's in our layout."""
    value: torch.Tensor = stored.swapaxes(-1, -2) if piece.transposed else stored
    return torch.cat([value[..., 0::2], value[..., 1::2]], dim=-1) if piece.alternating else value


def _written(value: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Our tensor as the block holds it: the inverse of `_read`."""
    if piece.alternating:
        value = torch.stack(value.chunk(2, dim=-1), dim=-1).flatten(-2)
    return value.swapaxes(-1, -2) if piece.transposed else value


def _keeps_routing(found: dict[str, torch.Tensor]) -> Any:
    """A hook that keeps the experts and weights which the block hands to its experts."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for value in tensors[1:]:
            if not value.is_floating_point():
                found["ids"] = value.detach()
        for value in tensors[1:]:
            if value.is_floating_point() and "ids" in found and value.shape == found["ids"].shape:
                found["weights"] = value.detach().float()

    return keep


def block_of(folder: Path, layer: int, family: Family, recipe: str, p: Problem) -> nn.Module:
    """The block of a layer around the problem's own tensors, for where the model itself is not run.

    Only its mathematics is then transformers': that the checkpoint is read as it is meant is not checked.
    """
    from transformers import AutoModel

    def drawn() -> Any:
        with quiet(), torch.device("meta"):
            return AutoModel.from_config(shortened_config(folder, layer), attn_implementation="eager")

    block: nn.Module = trying(f"transformers' block of layer {layer} in {folder}", drawn).layers[layer].mlp
    wanted = {name for name, _ in (*block.named_parameters(), *block.named_buffers())}
    tensors = dict(p.parameters)
    if p.correction_bias_E is not None:
        tensors["gate.e_score_correction_bias"] = p.correction_bias_E
    own = {
        name: _written(tensors[piece.target], piece)
        for name, piece in pieces_of(block, family, recipe).items()
        if piece.target in tensors
    }
    if wanted - own.keys():
        raise CheckpointError(
            f"transformers' block of layer {layer} in {folder}",
            f"no recipe names {listed(sorted(wanted - own.keys()))}",
            "leave the side 'transformers' out",
        )
    block.load_state_dict(
        {name: nn.Parameter(value, value.is_floating_point()) for name, value in own.items()}, assign=True
    )
    return block
