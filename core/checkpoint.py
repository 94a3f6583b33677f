"""Published checkpoints, read and written: which stored tensor fills which region of which parameter.

`plan` decides by config.json and the tensors' names, never by shapes: where 2 I = D or E = D every orientation fits,
and only the name knows. It judges the headers alone and reports everything that is wrong at once. `fill` then plays
the plan with any framework's arrays, and `export` is its inverse: the same bytes under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from moebius.core import layout, model
from moebius.core.config import MoEConfig
from moebius.core.errors import CheckpointError, MoEError
from moebius.core.families import Family
from moebius.core.folder import CONFIG, Folder, Stored, listed
from moebius.core.precision import DTYPES, dtype_name
from moebius.core.recipes import Piece

# Endings of the names that quantised checkpoints use for packed weights and their scales.
_QUANTISED = ("_blocks", "_scales", "scale_inv", "_scale", ".qweight", ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One stored tensor and the region that it fills: `tensors[target][index]`.

    Attributes:
        transposed, alternating: how the stored columns lie, as in moebius.core.recipes.Piece.
    """

    stored: Stored
    target: str
    index: tuple[Any, ...]
    transposed: bool
    alternating: bool

    def write(self, tensors: Mapping[str, Any], array: Any) -> None:
        """Copy the stored array into its region."""
        region = tensors[self.target][self.index]  # a view
        if self.transposed:
            array = array.swapaxes(-1, -2)
        if not self.alternating:
            region[...] = array
            return
        width = region.shape[-1] // 2
        for half in (0, 1):
            region[..., half * width : (half + 1) * width] = array[..., half::2]

    def read(self, tensors: Mapping[str, Any]) -> Any:
        """The region as it is stored: the inverse of `write`."""
        region = tensors[self.target][self.index]
        if self.alternating:
            *lead, width = region.shape
            region = region.reshape(*lead, 2, width // 2).swapaxes(-1, -2).reshape(*lead, width)
        return region.swapaxes(-1, -2) if self.transposed else region


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How one MoE layer is read: its config, and every tensor with its place.

    Attributes:
        family: row of FAMILIES. recipe: key of its recipes.
        layer: which one. layers: all MoE layers of the model.
        config: dtype as stored (the widest of the experts', gate_dtype where the router's differs) or as asked.
    """

    family: Family
    recipe: str
    layer: int
    layers: tuple[int, ...]
    config: MoEConfig
    placements: tuple[Placement, ...]

    def by_file(self) -> Iterator[tuple[Path, list[Placement]]]:
        """Each file with what is to be read from it."""
        in_order = sorted(self.placements, key=lambda place: str(place.stored.file))
        for file, places in groupby(in_order, key=lambda place: place.stored.file):
            yield file, list(places)


def plan(folder: Folder, layer: int | None = None, *, dtype: Any = None, recipe: str | None = None) -> Plan:
    """Decide how one MoE layer is read, and whether it can be. Reads headers only.

    Args:
        layer: index of the layer; None for the first MoE layer.
        dtype: of the parameters; None for the stored one.
        recipe: name of one of the family's recipes; None for the one that the tensors' names tell.
    Raises:
        CheckpointError: unknown family or recipe, quantised, no such MoE layer, or tensors missing, left over, of the
            wrong shape or dtype, all of them named together.
        ConfigError: config.json contradicts itself.
    """
    family = model.family_of(folder)
    _require_known(recipe, family, folder)
    layers = model.moe_layers(family, folder)
    layer = _chosen(layer, layers, folder)
    config = model.config_of(family, folder)
    prefix, names = _block(family, layer, folder)
    recipe = recipe or _told(family, prefix, config, names, folder)
    config = replace(config, **family.recipes[recipe].changes)
    pieces = family.common + family.recipes[recipe].pieces
    where = f"MoE layer {layer} in {folder.path}, below {prefix}, by the recipe {recipe!r}"
    placements = _placements(pieces, prefix, config, names, where, folder)
    return Plan(
        family=family,
        recipe=recipe,
        layer=layer,
        layers=layers,
        config=_typed(config, placements, dtype),
        placements=placements,
    )


def fill(plan: Plan, buffers: Mapping[str, Any], opened: Callable[[Path], AbstractContextManager[Any]]) -> None:
    """Read every tensor of a plan into its region of `buffers`, one file after the other.

    Args:
        buffers: one writable array per name of `moebius.core.layout.moe(plan.config)` and `layout.state(plan.config)`.
        opened: opens a file; the result has `get_tensor(name)`, as safetensors.safe_open's.
    Raises:
        CheckpointError: a file cannot be opened or read.
    """
    for file, places in plan.by_file():
        try:
            with opened(file) as tensors:
                for place in places:
                    place.write(buffers, tensors.get_tensor(place.stored.name))
        except MoEError:
            raise
        except Exception as error:  # the reader's own errors are classes that core cannot name
            raise CheckpointError(
                f"{len(places)} tensors of {file}", f"{type(error).__name__}: {error}", "download the file again"
            ) from error


def export(
    plan: Plan, tensors: Mapping[str, Any], contiguous: Callable[[Any], Any] = np.ascontiguousarray
) -> dict[str, Any]:
    """The inverse of `fill`: every stored tensor by its name, with the bytes that were read unless dtype was changed.

    Args:
        tensors: one array per parameter and state name.
        contiguous: makes an array contiguous; writers of safetensors store other strides wrongly or refuse them.
    """
    return {place.stored.name: contiguous(place.read(tensors)) for place in plan.placements}


def ranges(numbers: tuple[int, ...]) -> str:
    """
    >>> ranges((0, 1, 2, 5))
    '0-2, 5'
    """
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def _require_known(recipe: str | None, family: Family, folder: Folder) -> None:
    if recipe is not None and recipe not in family.recipes:
        known = ", ".join(map(repr, family.recipes))
        raise CheckpointError(
            f"recipe {recipe!r} for {folder.path}", f"the recipes of {family.model_type}: {known}", "name one of them"
        )


def _chosen(layer: int | None, layers: tuple[int, ...], folder: Folder) -> int:
    if layer in layers or (layer is None and layers):
        return layers[0] if layer is None else layer
    count = folder.config["num_hidden_layers"]
    if layer is None:
        found = f"{count} layers, all of them dense"
    elif 0 <= layer < count:
        found = f"a dense layer; MoE layers: {ranges(layers)}"
    else:
        found = f"layers 0 to {count - 1}; MoE layers: {ranges(layers)}"
    which = "the first MoE layer" if layer is None else f"MoE layer {layer}"
    raise CheckpointError(f"{which} of {folder.path}", found, "choose one of the MoE layers")


def _block(family: Family, layer: int, folder: Folder) -> tuple[str, set[str]]:
    """(prefix of the block's tensors, their names without it)."""
    prefixes = [prefix.format(layer=layer) for prefix in family.prefixes]
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in folder.files)), prefixes[0])
    names = {name.removeprefix(prefix) for name in folder.files if name.startswith(prefix)}
    quantised = sorted(name for name in names if name.endswith(_QUANTISED))
    if quantised:
        found = f"quantised tensors {listed(quantised)}"
        raise CheckpointError(f"layer {layer} of {folder.path}", found, model.DEQUANTISE)
    return prefix, names


def _told(family: Family, prefix: str, config: MoEConfig, names: set[str], folder: Folder) -> str:
    """The recipe whose names occur; the family's first where none does, so that its names are reported missing."""
    present = [
        name
        for name, recipe in family.recipes.items()
        if not recipe.on_request
        and any(stored in names for piece in recipe.pieces for stored, _ in _expanded(piece, config))
    ]
    if len(present) > 1:
        raise CheckpointError(
            f"one recipe for {prefix}* of {folder.path}", f"tensors of {present}", "keep one set of them"
        )
    return present[0] if present else next(iter(family.recipes))


def _expanded(piece: Piece, config: MoEConfig) -> list[tuple[str, tuple[Any, ...]]]:
    """(name, region) of each tensor that a piece stands for."""
    inter = config.moe_inter_dim
    last = slice(None) if piece.half is None else slice(piece.half * inter, (piece.half + 1) * inter)
    if "{expert}" not in piece.source:
        return [(piece.source, (..., last))]
    return [(piece.source.format(expert=e), (e, ..., last)) for e in range(config.n_routed_experts)]


def _placements(
    pieces: tuple[Piece, ...], prefix: str, config: MoEConfig, names: set[str], where: str, folder: Folder
) -> tuple[Placement, ...]:
    shapes = {row.name: row.shape for row in layout.moe(config) + layout.state(config)}
    # A config without shared experts has no place for theirs.
    pieces = tuple(piece for piece in pieces if piece.target in shapes)
    wanted = [(piece, name, index) for piece in pieces for name, index in _expanded(piece, config)]
    stored = folder.stored(prefix + name for _, name, _ in wanted)
    missing, wrong, placements = [], [], []
    for piece, name, index in wanted:
        place = stored.get(prefix + name)
        if place is None:
            missing.append(name)
            continue
        due = _stored_shape(shapes[piece.target], index, piece.transposed)
        if place.shape != due:
            wrong.append(f"{name} {list(place.shape)} where {list(due)} is due")
        if place.dtype not in DTYPES:
            wrong.append(f"{name} of dtype {place.dtype}")
        turned = {"transposed": piece.transposed, "alternating": piece.alternating}
        placements.append(Placement(stored=place, target=piece.target, index=index, **turned))
    left = sorted(names - {name for _, name, _ in wanted})
    if missing or wrong or left:
        faults = (("missing", missing), ("wrong", wrong), ("left over", left))
        raise CheckpointError(
            f"the tensors of {where}",
            "; ".join(f"{what}: {listed(found)}" for what, found in faults if found),
            f"download it again, or correct {CONFIG}: {config.n_routed_experts} experts, hidden size {config.dim}, "
            f"expert width {config.moe_inter_dim}",
        )
    return tuple(placements)


def _stored_shape(shape: tuple[int, ...], index: tuple[Any, ...], transposed: bool) -> tuple[int, ...]:
    region = np.broadcast_to(np.int8(0), shape)[index].shape  # a view: no memory however large
    return (*region[:-2], region[-1], region[-2]) if transposed else region


def _typed(config: MoEConfig, placements: tuple[Placement, ...], dtype: Any) -> MoEConfig:
    """The config with the dtypes of its parameters: as asked, or the widest stored of the experts and of the router."""
    if dtype is not None:
        return replace(config, dtype=dtype_name(dtype))
    parameters = {row.name for row in layout.moe(config)}
    found: dict[bool, str] = {}
    for place in placements:
        if place.target in parameters:
            is_gate, stored = place.target.startswith("gate."), place.stored.dtype
            found[is_gate] = min(found.get(is_gate, stored), stored, key=list(DTYPES).index)
    return replace(config, dtype=found[False], gate_dtype=None if found[True] == found[False] else found[True])
