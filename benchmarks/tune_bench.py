"""A kernel's variants compiled, held against the plan's own launch and timed in turns; and a stand-in without a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from benchmarks import gpu_meter, tune_variants
from benchmarks.gpu_floors import Ceilings
from benchmarks.tune_cases import Case
from moebius.core.kernels.plan import Launch
from moebius.core.kernels.plan_grouped import Device
from moebius.torch_frontend import play

PLAN = "the plan"
_LEAST_ROUNDS = 3

Figures = dict[str, Any]


class Lost(RuntimeError):
    """The device answers no more."""


class Bench:
    """What both kinds do alike."""

    device: str
    target: Device
    limit: int  # bytes of shared memory of a program

    def ceilings(self) -> Ceilings:
        """The device's rates."""
        raise NotImplementedError

    def compile(self, launches: Iterable[Launch], case: Case) -> None:
        """Compile what is going to be played."""

    def check(self, case: Case, launch: Launch) -> list[float]:
        """How far each result is from that of the plan's launch, which comes first."""
        raise NotImplementedError

    def times(self, case: Case, launches: Mapping[str, Launch]) -> dict[str, list[float]]:
        """Milliseconds of a call, by variant and round."""
        raise NotImplementedError

    def alive(self) -> bool:
        """Whether the device still answers."""
        return True

    def release(self) -> None:
        """Give back the memory of the case before."""


class Cuda(Bench):
    """Groups of calls between two events; a group lasts about rep_ms.

    Kernels that take less than their launch takes the host, some 20 us, are not told apart.

    Args:
        seconds: a case's groups last so long together at most, but for the least number of rounds.
        threads: that compile.
    """

    device = "cuda"

    def __init__(self, rounds: int, rep_ms: float, seconds: float, threads: int):
        self.rounds, self.rep_ms, self.seconds, self.threads = rounds, rep_ms, seconds, threads
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.target = Device((found.major, found.minor), found.multi_processor_count)
        self.limit = shared_memory(torch.cuda.current_device())
        self._results: dict[Any, list[Tensor]] = {}

    def ceilings(self) -> Ceilings:
        """See Bench."""
        return gpu_meter.Cuda(warmup_ms=10, rep_ms=40).ceilings()

    def compile(self, launches: Iterable[Launch], case: Case) -> None:
        """See Bench; several at once. What fails here fails again when it is played, and says why there."""
        launches = list(launches)
        given = [self._arguments(case, launch) for launch in launches]  # drawn here, not in a thread

        def compiled(launch: Launch, arguments: list[Any]) -> None:
            given = [play.descriptor(a, block) for a, block in zip(arguments, launch.blocks, strict=False)]
            given += arguments[len(given) :]
            kernel = play.kernel_of(launch.kernel)
            with suppress(Exception):
                kernel.warmup(*given, grid=(launch.programs,), **launch.constants, **launch.options())

        compiled(launches[0], given[0])  # alone: it makes what all compilations share
        with ThreadPoolExecutor(self.threads) as threads:
            list(threads.map(compiled, launches[1:], given[1:]))

    def check(self, case: Case, launch: Launch) -> list[float]:
        """See Bench; results are NaN before."""
        results = self._written(case, launch)
        for result in results:
            result.fill_(float("nan"))
        play.run(launch, *self._arguments(case, launch))
        torch.cuda.synchronize()
        found, expected = case.compared(results), case.compared(self._written(case, case.launch))
        if launch == case.launch:
            return [0.0 if bool(result.isfinite().all()) else float("inf") for result in found]
        return [difference(one, other) for one, other in zip(found, expected, strict=True)]

    def times(self, case: Case, launches: Mapping[str, Launch]) -> dict[str, list[float]]:
        """See Bench; every second round backwards."""
        given = {name: (launch, self._arguments(case, launch)) for name, launch in launches.items()}

        def group(name: str, n: int) -> float:
            launch, arguments = given[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(n):
                play.run(launch, *arguments)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / n

        once = {name: max(group(name, 2), 1e-3) for name in given}
        n = max(1, min(200, round(self.rep_ms / once[PLAN])))
        affordable = int(1e3 * self.seconds / (n * sum(once.values())))
        found: dict[str, list[float]] = {name: [] for name in given}
        for turn in range(max(_LEAST_ROUNDS, min(self.rounds, affordable))):
            for name in list(given)[:: -1 if turn % 2 else 1]:
                found[name].append(group(name, n))
        return found

    def alive(self) -> bool:
        """See Bench."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def release(self) -> None:
        """See Bench."""
        self._results.clear()
        torch.cuda.empty_cache()

    def _arguments(self, case: Case, launch: Launch) -> list[Any]:
        return [*case.inputs(launch), *self._written(case, launch)]

    def _written(self, case: Case, launch: Launch) -> list[Tensor]:
        """What a launch writes: the plan's own, or memory that all variants with results of these sizes share."""
        sizes = case.outputs(launch)
        key = launch == case.launch, sizes
        if key not in self._results:
            self._results[key] = [torch.empty(size, dtype=dtype, device=self.device) for size, dtype in sizes]
        return self._results[key]


class Dry(Bench):
    """Nothing is compiled or played; times are made up, the same ones in every run."""

    device = "meta"
    target = Device((9, 0), 132)
    limit = 227 * 1024

    def ceilings(self) -> Ceilings:
        """See Bench."""
        return Ceilings(flops=790e12, bytes=4.3e12)

    def check(self, case: Case, launch: Launch) -> list[float]:
        """See Bench; what is handed over is made, without memory."""
        assert all(tensor.is_meta for tensor in case.inputs(launch) if isinstance(tensor, Tensor))
        results = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in case.outputs(launch)]
        return [0.0] * len(case.compared(results))

    def times(self, case: Case, launches: Mapping[str, Launch]) -> dict[str, list[float]]:
        """See Bench."""
        made_up = {name: 1 + crc32(f"{case.kernel} {name}".encode()) % 100 / 500 for name in launches}
        return {name: [ms, ms * 1.01, ms * 0.99] for name, ms in made_up.items()}


def tuned(case: Case, bench: Bench) -> list[Figures]:
    """A row of each variant: "variant", and "ms", "gain" and "errors", or "why" it was not timed.

    "gain" is how much faster than the plan's launch: the median of the rounds' ratios, less 1.

    Raises:
        Lost: the device answers no more.
    """
    rows: dict[str, Figures] = {PLAN: {"variant": PLAN}}
    launches = {PLAN: case.launch}
    for change in case.changes:
        name, launch = tune_variants.named(change), case.launched(change)
        rows[name] = {"variant": name}
        if why := tune_variants.against(launch, case.needed(launch.constants), bench.limit):
            rows[name]["why"] = why
        else:
            launches[name] = launch
    bench.compile(launches.values(), case)
    for name, launch in launches.items():
        rows[name] |= _checked(case, launch, bench)
        if name == PLAN and "why" in rows[name]:
            return [rows[name]]
    times = bench.times(case, {name: launches[name] for name in launches if "why" not in rows[name]})
    for name, rounds in times.items():
        gain = statistics.median(plan / own for plan, own in zip(times[PLAN], rounds, strict=True)) - 1
        rows[name] |= {"ms": statistics.median(rounds), "gain": gain, "rounds": rounds}
    return list(rows.values())


def _checked(case: Case, launch: Launch, bench: Bench) -> Figures:
    """{"errors"}, or {"why"} the variant is not timed."""
    try:
        errors = bench.check(case, launch)
    except Exception as error:
        if not bench.alive():
            raise Lost(f"{case.kernel}, {launch.constants}: {error}") from error
        return {"why": f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]}
    worst = max(errors)
    if any(not error <= bound for error, bound in zip(errors, case.bounds, strict=True)):
        said = "results are not finite" if launch == case.launch else f"results differ from the plan's by {worst:.0e}"
        return {"errors": errors, "why": said}
    return {"errors": errors}


def shared_memory(device: int) -> int:
    """Bytes of shared memory that Triton lets a program have."""
    found = import_module("triton.runtime").driver.active.utils.get_device_properties(device)
    return int(found["max_shared_mem"])


def difference(found: Tensor, expected: Tensor) -> float:
    """0 where all bits of finite values are equal; else the norm of the difference over that of the expected."""
    if torch.equal(found, expected):  # NaN equals nothing
        return 0.0
    return float((found.float() - expected.float()).norm() / expected.float().norm())
