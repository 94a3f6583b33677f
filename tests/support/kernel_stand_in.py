"""A kernel that stands in for one of Triton's, and what it compiles: both keep what they are called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moebius.core.kernels.plan import Launch
from moebius.torch_frontend import play


class Compiled:
    """What Triton compiled: called as its CompiledKernel is."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, calls: list[Any]):
        self.calls = calls
        self.watched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.watched.append((grid, arguments))

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert rest[:5] == ("function", "metadata", None, None, None)
        self.calls.append(((x, y, z), rest[5:]))


class Kernel:
    """Stands in for a kernel of Triton: what it compiles tells of its calls."""

    arg_names = ("rows", "R", "out", "WIDE", "DEEP")

    def __init__(self, interpreted: bool = False):
        self.first: list[Any] = []
        self.later: list[Any] = []
        self.interpreted = interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*arguments: Any, **constants: Any) -> Any:
            self.first.append((grid, arguments, constants))
            self.compiled = None if self.interpreted else Compiled(self.later)
            return self.compiled

        return call


def installed(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One that is every kernel, on a device whose stream is 7; nothing is compiled yet."""
    made = Kernel()
    monkeypatch.setattr(play, "kernel_of", lambda name: made)
    monkeypatch.setattr(play, "_compiled", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return made


def launch(programs: int = 3, deep: int = 64, blocks: tuple[tuple[int, ...], ...] = ()) -> Launch:
    # In another order than the kernel declares them.
    return Launch(kernel="file.name", programs=programs, constants={"DEEP": deep, "WIDE": 8}, blocks=blocks)
