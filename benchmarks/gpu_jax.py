"""JAX in the GPU benchmark: inputs that are PyTorch's memory, and programs that are compiled ahead."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import Found
from benchmarks.gpu_machine import versions
from benchmarks.gpu_problem import Problem
from benchmarks.gpu_tables import PASSES

SHARE = 0.6  # of the device's memory that a program's temporaries may take
PACKAGES = ("jax", "flax", "tokamax", "jax-triton", "transformer-engine-jax")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An implementation in JAX.

    Attributes:
        call: (x [T, D], weights [T, K], indices [T, K] int32, up [E, D, 2I], down [E, I, D]) -> y [T, D].
        note: what it is, in a few words.
        host: what the host waits for in each call; "" for nothing.
        least: bytes of temporaries that a pass is known to need before XLA has said so; it is not compiled in vain.
    """

    call: Callable[..., Any]
    note: str
    host: str = ""
    least: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A problem's arrays in JAX, of the same memory. `how` says so."""

    x: Any
    weights: Any
    indices: Any
    up: Any
    down: Any
    dy: Any
    how: str


@dataclass(kw_only=True)
class Program:
    """A peer's two passes over one problem: lowered, then compiled. What would not fit is not, for `reason`."""

    peer: Peer
    inputs: Inputs
    lowered: dict[str, Any] = field(default_factory=dict)
    compiled: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    def lower(self) -> None:
        """Trace both passes; kernels of Triton are compiled here already."""
        import jax

        for name, function in zip(PASSES, self._functions(), strict=True):
            start = time.perf_counter()
            self.lowered[name] = jax.jit(function).lower(*self._arguments(name))
            self.seconds[name] = time.perf_counter() - start

    def compile(self, memory: int | None = None) -> None:
        """Compile what was lowered, the forward pass first; nothing whose temporaries would not fit is kept.

        Args:
            memory: bytes of the device; None for no limit.
        Raises:
            whatever XLA raises of the forward pass; of both passes that is the `reason`.
        """
        for name in PASSES:
            start = time.perf_counter()
            if self._too_large(name, self.peer.least.get(name, 0), memory, "compiled: out of memory, it needs"):
                return
            try:
                self.compiled[name] = self.lowered.pop(name).compile()
            except Exception as error:
                if not self.compiled:
                    raise
                self.drop(name, "compiled", error)
                return
            self.seconds[name] += time.perf_counter() - start
            if self._too_large(name, self.memory(name)["temporary"], memory, "run: out of memory, XLA asks for"):
                del self.compiled[name]
                return

    def _too_large(self, name: str, needed: int, memory: int | None, words: str) -> bool:
        """Whether temporaries would not fit, and then the reason."""
        if memory is None or needed <= SHARE * memory:
            return False
        self.reason = f"{name} not {words} {needed / 2**30:.0f} of {memory / 2**30:.0f} GiB in temporaries"
        return True

    def drop(self, name: str, step: str, error: Exception) -> None:
        """Go on without a pass."""
        self.compiled.pop(name, None)
        self.reason = f"{name} not {step}: {type(error).__name__}: {' '.join(str(error).split())}"[:300]

    def memory(self, name: str) -> dict[str, int]:
        """Bytes by XLA's own account: temporaries, outputs, and apart from them the arguments."""
        found = self.compiled[name].memory_analysis()
        sizes = {"temporary": "temp", "output": "output", "arguments": "argument"}
        return {key: int(getattr(found, f"{own}_size_in_bytes", 0)) for key, own in sizes.items()}

    def call(self, name: str) -> Callable[[], Any]:
        """The compiled pass on the problem's inputs; returns before it is done."""
        compiled, arguments = self.compiled[name], self._arguments(name)
        return lambda: compiled(*arguments)

    def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        import jax

        call = self.peer.call

        def both(x: Any, weights: Any, indices: Any, up: Any, down: Any, dy: Any) -> Any:
            y, pullback = jax.vjp(lambda x, w, up, down: call(x, w, indices, up, down), x, weights, up, down)
            return y, pullback(dy)

        return call, both

    def _arguments(self, name: str) -> tuple[Any, ...]:
        i = self.inputs
        given = (i.x, i.weights, i.indices, i.up, i.down)
        return (*given, i.dy) if name == "both" else given


def start() -> dict[str, str]:
    """Import JAX, after torch, and make ready what its packages expect; versions of those that are there.

    The first to load cuDNN decides its version, so torch, which pins one, comes first.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's log of what its autotuner tried; failures are raised
    from moebius.jax_frontend import older_triton

    with suppress(ImportError):
        older_triton.name_tf32()  # before anything imports jax-triton
    without_xprof()
    with suppress(ImportError):
        from absl import logging

        logging.set_verbosity(logging.ERROR)  # tokamax warns of each shape that it has no tuning for
    return versions(PACKAGES)


def without_xprof() -> None:
    """An empty module in the place of a missing xprof: tokamax imports it for profiles, its kernels never call it."""
    name = "xprof.cli.tools.get_kernel_stats_tool"
    with suppress(ImportError):
        import_module(name)
        return
    parts = name.split(".")
    for at, part in enumerate(parts):
        path = ".".join(parts[: at + 1])
        module = sys.modules[path] = ModuleType(path)
        module.__spec__, module.__path__ = ModuleSpec(path, None, is_package=True), []
        if at:
            setattr(sys.modules[path.rpartition(".")[0]], part, module)


def inputs(problem: Problem) -> Inputs:
    """The problem's tensors as JAX arrays that share their memory; copied where that cannot be."""
    import jax

    from moebius.compare.bridge import to_jax

    tensors = {
        "x": problem.x,
        "weights": problem.routing.weights,
        "indices": problem.routing.indices.to(torch.int32),
        "up": problem.up,
        "down": problem.down,
        "dy": problem.dy,
    }
    if problem.x.is_cuda:
        torch.cuda.synchronize()
    found, copied = {}, []
    for name, tensor in tensors.items():
        try:
            found[name] = to_jax(tensor, alias=True)
        except Exception:
            copied.append(name)
            found[name] = to_jax(tensor)
    jax.block_until_ready(found)
    return Inputs(**found, how=f"copied: {', '.join(copied)}" if copied else "inputs shared over dlpack")


def found(name: str, result: Any) -> Found:
    """What a pass returned, as tensors of the same memory."""
    from moebius.compare.bridge import to_torch

    if name == "forward":
        return Found(y=to_torch(result, alias=True))
    y, (dx, dweights, dup, ddown) = result
    up, down = to_torch(dup, alias=True), to_torch(ddown, alias=True)
    return Found(
        y=to_torch(y, alias=True),
        dx=to_torch(dx, alias=True),
        dweights=to_torch(dweights, alias=True),
        gradients=lambda expert: (up[expert], down[expert]),
    )


def device_bytes(tensor: Tensor) -> int | None:
    """Memory of the tensor's GPU; None on a CPU."""
    return int(torch.cuda.mem_get_info()[1]) if tensor.is_cuda else None
