"""Time, memory and host synchronisations of a call: on a GPU, and a stand-in for dry runs on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_floors import Ceilings

Call = Callable[[], object]
POISON_BYTES = 8 << 30


class Memory(NamedTuple):
    """Bytes above what was allocated before: highest in forward, kept from forward for backward (without y), highest
    over both passes."""

    forward: int
    kept: int
    both: int


class Meter:
    """What both meters do alike."""

    device: str
    warmup_ms: float
    rep_ms: float

    def fresh(self) -> None:
        """Forget what was compiled, so that each shape compiles for itself, and give memory back."""
        torch._dynamo.reset()
        self.release()

    def release(self) -> None:
        """Give back the memory that nothing holds."""
        gc.collect()

    def once(self, call: Call) -> float:
        """Milliseconds of one call until its work is done, by the host's clock."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def wait(self) -> None:
        """Until the device is done."""

    def poison(self) -> None:
        """Leave NaN in the memory that is handed out next."""

    def poison_jax(self) -> None:
        """Leave NaN in the memory that XLA hands out next."""

    def times(self, call: Call, leaves: Sequence[Tensor], least_runs: int) -> list[float]:
        """Milliseconds of each of several calls, gradients of `leaves` cleared before each."""
        raise NotImplementedError

    def memory(self, forward: Callable[[], Tensor], dy: Tensor, leaves: Sequence[Tensor]) -> Memory | None:
        """Of one forward and backward pass; None where it cannot be told."""
        raise NotImplementedError

    def syncs(self, call: Call) -> list[str]:
        """file:line of each point in one call where the host waited for the device."""
        raise NotImplementedError

    def capture(self, call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Call, Tensor]:
        """What replays a call's kernels from a graph, and the tensor that it returned, which each replay fills anew.

        The leaves hold afterwards the gradients that each replay fills.
        """
        raise NotImplementedError

    def ceilings(self) -> Ceilings:
        """This device's rates, measured."""
        raise NotImplementedError


class Cuda(Meter):
    """triton.testing.do_bench, PyTorch's allocator and its sync debug mode."""

    device = "cuda"

    def __init__(self, warmup_ms: float, rep_ms: float):
        self.warmup_ms, self.rep_ms = warmup_ms, rep_ms

    def release(self) -> None:
        """See Meter."""
        super().release()
        torch.cuda.empty_cache()

    def wait(self) -> None:
        """See Meter."""
        torch.cuda.synchronize()

    def poison(self) -> None:
        """See Meter: bytes of 255 are NaN in bfloat16 and float32, -1 in integers."""
        free, _ = torch.cuda.mem_get_info()
        torch.full((min(POISON_BYTES, free // 4),), 255, dtype=torch.uint8, device=self.device)

    def poison_jax(self) -> None:
        """See Meter."""
        import jax
        import jax.numpy as jnp

        self.release()
        free, _ = torch.cuda.mem_get_info()
        jax.block_until_ready(jnp.full(min(POISON_BYTES, free // 4) // 4, jnp.nan, jnp.float32)).delete()

    def times(self, call: Call, leaves: Sequence[Tensor], least_runs: int) -> list[float]:
        """See Meter; do_bench empties the L2 cache before each call."""
        from triton.testing import do_bench

        call()
        clear(leaves)
        # do_bench counts its runs by an estimate in which gradients add up: a fifth more, so that there are enough.
        rep = max(self.rep_ms, 1.2 * least_runs * self.once(call))
        found: list[float] = do_bench(
            call, warmup=self.warmup_ms, rep=rep, grad_to_none=list(leaves), return_mode="all"
        )
        clear(leaves)
        return found

    def memory(self, forward: Callable[[], Tensor], dy: Tensor, leaves: Sequence[Tensor]) -> Memory:
        """See Meter."""
        clear(leaves)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = forward()
        torch.cuda.synchronize()
        high, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() - y.untyped_storage().nbytes()
        y.backward(dy)
        torch.cuda.synchronize()
        both = torch.cuda.max_memory_allocated()
        clear(leaves)
        return Memory(forward=high - before, kept=kept - before, both=both - before)

    def syncs(self, call: Call) -> list[str]:
        """See Meter; PyTorch sees its own alone, not those inside a library."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]

    def capture(self, call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Call, Tensor]:
        """See Meter; what a capture asks for first, calls on another stream, included."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                clear(leaves)
                call()
        torch.cuda.current_stream().wait_stream(aside)
        clear(leaves)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        return graph.replay, found

    def ceilings(self) -> Ceilings:
        """See Meter: an 8192-cubed product of random bfloat16, a copy of 4 GiB."""
        return _ceilings(self, 8192, 4 << 30)


class Dry(Meter):
    """The same calls on a CPU: they run, their figures mean nothing."""

    device = "cpu"

    def __init__(self, warmup_ms: float, rep_ms: float):
        self.warmup_ms, self.rep_ms = warmup_ms, rep_ms

    def times(self, call: Call, leaves: Sequence[Tensor], least_runs: int) -> list[float]:
        """See Meter."""
        found = []
        for _ in range(2):
            clear(leaves)
            found.append(self.once(call))
        clear(leaves)
        return found

    def memory(self, forward: Callable[[], Tensor], dy: Tensor, leaves: Sequence[Tensor]) -> None:
        """See Meter."""
        forward().backward(dy)
        clear(leaves)

    def capture(self, call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Call, Tensor]:
        """See Meter; here the replay is the call again, into the same memory."""
        clear(leaves)
        found = call()
        held = [leaf.grad for leaf in leaves]

        def replay() -> None:
            clear(leaves)
            again = call()
            with torch.no_grad():
                found.copy_(again)
                for leaf, old in zip(leaves, held, strict=True):
                    if old is not None and leaf.grad is not None:
                        old.copy_(leaf.grad)
                    leaf.grad = old

        return replay, found

    def syncs(self, call: Call) -> list[str]:
        """See Meter."""
        call()
        return []

    def ceilings(self) -> Ceilings:
        """See Meter."""
        return _ceilings(self, 256, 1 << 20)


def clear(leaves: Iterable[Tensor]) -> None:
    """Set every gradient to None."""
    for leaf in leaves:
        leaf.grad = None


def _ceilings(meter: Meter, size: int, n_bytes: int) -> Ceilings:
    # Its own: after a graph capture that failed PyTorch's default generator may be out of order.
    generator = torch.Generator(meter.device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=meter.device, dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(meter.times(lambda: a @ b, (), 10))
    source = torch.randint(0, 255, (n_bytes,), generator=generator, dtype=torch.uint8, device=meter.device)
    target = torch.empty_like(source)
    copy = statistics.median(meter.times(lambda: target.copy_(source), (), 10))
    return Ceilings(flops=2 * size**3 / product * 1e3, bytes=2 * n_bytes / copy * 1e3)
