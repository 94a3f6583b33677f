"""One run of the Flax benchmark: programs compiled in the background, and candidates of both frameworks timed alike."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

from benchmarks import gpu_check, gpu_jax
from benchmarks.gpu_bench import Lane
from benchmarks.gpu_problem import Problem, Routing
from benchmarks.gpu_tables import PASSES
from benchmarks.gpu_wall import Calls, WallBench


class FlaxBench(WallBench):
    """See WallBench; rows whose module ends in "_jax" are programs of JAX, the others candidates of PyTorch."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.figures["machine"] |= gpu_jax.start()

    def _prepare_all(self, lanes: Sequence[Lane], problem: Problem, expected: gpu_check.Reference) -> None:
        """See Bench. Programs are traced one after the other, and compile beside each other meanwhile."""
        programs = [lane for lane in lanes if lane.row.module.endswith("_jax")]
        inputs = gpu_jax.inputs(problem)
        compiling: list[tuple[Lane, Future[None]]] = []
        with ThreadPoolExecutor(self.options.threads) as pool:
            for lane in programs:
                self._try(lane, "traced", partial(self._trace, lane, problem, inputs))
                if lane.program is not None:
                    compiling.append((lane, pool.submit(lane.program.compile, gpu_jax.device_bytes(problem.x))))
            for lane in lanes:
                if lane not in programs:
                    self._try(lane, "built", partial(self._prepare, lane, problem, expected))
            for lane, future in compiling:
                self._try(lane, "compiled", future.result)
        for lane in programs:
            if lane.program is not None:
                self._try(lane, "checked", partial(self._check, lane, expected))

    def _trace(self, lane: Lane, problem: Problem, inputs: gpu_jax.Inputs) -> None:
        peer = import_module(f"benchmarks.peers.{lane.row.module}").build(problem, **lane.row.options)
        program = gpu_jax.Program(peer=peer, inputs=inputs)
        lane.result |= {"note": peer.note, "host": peer.host, "inputs": inputs.how}
        program.lower()
        lane.program = program

    def _check(self, lane: Lane, expected: gpu_check.Reference) -> None:
        """What each program computes, against the reference, and what it needs."""
        program = lane.program
        lane.result["compile_s"] = program.seconds
        if not program.compiled:
            raise MemoryError(program.reason)
        found: dict[str, float] = {}
        lane.result["errors"] = found
        for name in list(program.compiled):
            try:
                errors = self._errors(program, name, expected)
            except Exception as error:
                if name != "both":
                    raise
                program.drop(name, "run", error)
                continue
            found |= errors if name == "both" else {f"{key} of forward alone": e for key, e in errors.items()}
        if program.reason:
            lane.result["reason"] = program.reason
        gpu_check.require(found)
        sizes = {name: program.memory(name) for name in program.compiled}
        lane.result["memory"] = {name: size["temporary"] + size["output"] for name, size in sizes.items()}
        lane.result["xla_bytes"] = sizes
        seconds = " + ".join(f"{program.seconds[name]:.1f}" for name in PASSES)
        self._say_checked(lane, f"compiled in {seconds} s, {program.reason or lane.result['inputs']}")

    def _errors(self, program: gpu_jax.Program, name: str, expected: gpu_check.Reference) -> dict[str, float]:
        self.meter.poison_jax()
        return gpu_check.errors(expected, gpu_jax.found(name, program.call(name)()))

    def _rerouted(self, lane: Lane, problem: Problem, routing: Routing) -> Lane:
        """See Bench. Routes are arguments of a program: it is compiled already."""
        found = super()._rerouted(lane, problem, routing)
        if lane.program is not None:
            found.program = replace(lane.program, inputs=gpu_jax.inputs(replace(problem, routing=routing)))
        return found

    def _calls(self, lane: Lane, problem: Problem, routing: Routing) -> Calls:
        """See WallBench."""
        if lane.program is None:
            return super()._calls(lane, problem, routing)
        import jax

        return {name: (lane.program.call(name), jax.block_until_ready) for name in lane.program.compiled}
