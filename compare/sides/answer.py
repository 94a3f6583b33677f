"""What a side computed, in one form for all: float32 arrays by stage, large ones on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebius.compare.noise.layer import Index
from moebius.compare.problem import Problem
from moebius.core import stages
from moebius.core.stages import GRADIENT, INPUT, OUTPUT

# Tensors of more bytes wait on disk: a block's gradients are as large as its parameters.
_LARGE = 1 << 26


@dataclass(frozen=True, slots=True)
class Spilled:
    """An array on disk that is read region by region, never mapped: a mapped page would count as memory."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    def __getitem__(self, index: Index) -> np.ndarray:
        """One slab of one expert's matrix, all of the array for ()."""
        shape, start = self.shape, 0
        if index:
            expert, slab = index
            start = (expert * shape[1] + slab.start) * shape[2]
            shape = (slab.stop - slab.start, shape[2])
        dtype = np.dtype(self.dtype)
        array = np.fromfile(self.file, dtype, int(np.prod(shape)), offset=start * dtype.itemsize)
        return array.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a side computed.

    Attributes:
        ids_TK: the experts of each token, ascending; None where the side does not show them.
        tensors: by the names of core.stages, "grad." before a gradient's; routing weights and their gradients in the
            order of ids_TK. float32, which holds every value of the narrower dtypes, float64 of the reference.
        device: where it ran. seconds: that it took.
        counts: whether the verdict counts. paired: to be held against the first side too.
        weight_after: the routing weight comes after the down projection; None for as the config says.
        notes: what a reader should know. dropped: routes that found no room.
    """

    ids_TK: np.ndarray | None
    tensors: Mapping[str, np.ndarray | Spilled]
    device: str = "cpu"
    seconds: float = 0.0
    counts: bool = True
    paired: bool = True
    weight_after: bool | None = None
    notes: tuple[str, ...] = ()
    dropped: int = 0

    @property
    def routed(self) -> bool:
        """Whether the side shows its experts."""
        return self.ids_TK is not None

    @property
    def traced(self) -> bool:
        """Whether the side shows a stage between its input and its output, so that steps can stand alone."""
        return bool({"rows", "up", "activation", "down"} & self.tensors.keys())

    def part(self, name: str, index: Index = ()) -> np.ndarray | None:
        """A tensor or a region of it; None where the side has none of that name."""
        value = self.tensors.get(name)
        if value is None:
            return None
        return value[index] if index or isinstance(value, Spilled) else value

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return tuple(self.tensors[name].shape)


@dataclass
class Desk:
    """Where answers are put down: a temporary folder for what is large, gone when the comparison is."""

    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="moebius-compare-")
    )
    _count: int = 0

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *error: object) -> None:
        self.folder.cleanup()

    def kept(self, value: torch.Tensor) -> np.ndarray | Spilled:
        """A tensor of any device and dtype as a float32 array, on disk where it is large."""
        value = value.detach()
        if value.numel() * 4 <= _LARGE:
            array: np.ndarray = value.cpu().to(torch.float32).numpy()
            return array.copy()
        self._count += 1
        file = Path(self.folder.name) / f"{self._count}.bin"
        with file.open("wb") as stream:
            for part in value:  # a part at a time: a transposed or narrower tensor is copied here
                part.cpu().to(torch.float32).contiguous().numpy().tofile(stream)
        return Spilled(file, tuple(value.shape), "float32")

    def answer(self, found: Iterable[tuple[str, torch.Tensor]], **about: Any) -> Answer:
        """An answer of tensors by name; "ids" gives the experts, and the order of everything that goes by slot."""
        ids_TK, tensors = None, dict[str, np.ndarray | Spilled]()
        for name, value in found:
            if name == "ids":
                ids_TK = value.detach().cpu().numpy().astype(np.int64)
            else:
                tensors[name] = self.kept(value)
        if ids_TK is None:
            return Answer(ids_TK=None, tensors=tensors, **about)
        order_TK = np.argsort(ids_TK, axis=-1, kind="stable")
        for name in ("weights", GRADIENT + "weights"):
            held = tensors.get(name)
            if isinstance(held, np.ndarray) and held.shape == ids_TK.shape:
                tensors[name] = np.take_along_axis(held, order_TK, axis=-1)
        return Answer(ids_TK=np.take_along_axis(ids_TK, order_TK, axis=-1), tensors=tensors, **about)


def leaving(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of a trace that forgets each as it is handed on, so that two copies of all are never held."""
    while found:
        name = next(iter(found))
        yield name, found.pop(name)


def shape_of(key: str, p: Problem) -> tuple[int, ...] | None:
    """The shape that a stage or a gradient has for this problem; None for a name that this layer does not have."""
    c, name = p.config, key.removeprefix(GRADIENT)
    is_gradient = key != name
    if name in p.parameters:
        return tuple(p.parameters[name].shape) if is_gradient else None
    if name == INPUT:
        return (p.tokens, c.dim) if is_gradient else None
    axes = {stage.name: stage.axes for stage in stages.of(c) if stage.differentiable or not is_gradient}.get(name)
    k, inter = c.n_activated_experts, c.moe_inter_dim
    sizes = {"T": p.tokens, "E": c.n_routed_experts, "K": k, "R": p.tokens * k, "I": inter}
    sizes |= {"U": c.activation.up_width(inter), "D": c.dim if name in (OUTPUT, "shared") else c.expert_dim}
    return None if axes is None else tuple(sizes[axis] for axis in axes)
