"""All devices of `gpu_parallel` in one process: Flax's dispatchers inside of jax.shard_map.

`python -m benchmarks.gpu_parallel_flax ASKED`: ASKED is the JSON file that gpu_parallel wrote.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_check, gpu_jax
from benchmarks.gpu_parallel_bench import LAYER, STILL, Clock, Lane, check, entry, of_all, reason, rounds, write
from benchmarks.gpu_problem import Problem, Shape

AXIS = "ep"


@dataclass(frozen=True)
class Still:
    """A dispatcher that moves nothing: what it is handed is what has come already."""

    ranks: int
    rank: int = 0

    def dispatch(self, x: Any, weights: Any, ids: Any, mask: Any, n_experts: int) -> tuple[Any, Any]:
        """As it is."""
        from moebius.jax_frontend import Sent

        return Sent(x, weights, ids), x.dtype

    def combine(self, y: Any, state: Any) -> Any:
        """Rounded, as it would be on its way."""
        return y.astype(state)


class Devices:
    """The run over shapes, on the first devices of this process.

    Args:
        asked: what gpu_parallel wrote.
    """

    def __init__(self, asked: dict[str, Any]):
        import jax
        from jax.sharding import AxisType

        self.asked, self.started, self.ranks = asked, time.monotonic(), asked["ranks"]
        devices = jax.devices()[: self.ranks]
        if len(devices) < self.ranks:
            raise RuntimeError(f"{self.ranks} devices were asked for, JAX has {len(devices)}")
        self.mesh = jax.make_mesh((self.ranks,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        self.device = "cpu" if asked["dry"] else "cuda"
        self.clock = Clock(
            wait=lambda result: jax.block_until_ready(result),
            slowest=lambda value: value,
            rep_ms=asked["rep"],
            warmup_ms=asked["warmup"],
        )
        self.figures: dict[str, Any] = {"shapes": {}, "results": []}

    def run(self, key: str, shape: Shape) -> None:
        """Everything on one shape."""
        problem = of_all(shape, self.ranks, self.device)
        self.figures["shapes"][key] = entry(shape, self.ranks, problem)
        expected, own = gpu_check.reference(problem), self._placed(problem)
        lanes = [Lane(key=name, result={"shape": key, "row": name}) for name in self.asked["rows"]]
        self.figures["results"] += [lane.result for lane in lanes]
        for lane in lanes:
            try:
                lane.steps = self._steps(lane, problem.shape, own, expected)
            except Exception as error:  # of one candidate, not of the run
                lane.result["reason"] = reason(error)
                print(f"  {lane.key}: {lane.result['reason']}", flush=True)
        rounds(lanes, self.clock, self.asked["rounds"], self.over)
        for lane in lanes:
            if LAYER in lane.result and STILL in lane.result:
                ms = [lane.result[name]["ms"] for name in (LAYER, STILL)]
                print(f"  {lane.key}: {ms[0]:.3f} ms, rows {ms[1]:.3f} ms", flush=True)

    def over(self) -> bool:
        """Whether nothing new is to start."""
        return time.monotonic() - self.started > self.asked["budget"]

    def _placed(self, problem: Problem) -> dict[str, Any]:
        """The problem's arrays, tokens and experts cut over the devices."""
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        given, cut = gpu_jax.inputs(problem), NamedSharding(self.mesh, PartitionSpec(AXIS))
        names = ("x", "weights", "indices", "up", "down", "dy")
        return {name: jax.device_put(getattr(given, name), cut) for name in names}

    def _steps(
        self, lane: Lane, shape: Shape, own: dict[str, Any], expected: gpu_check.Reference
    ) -> dict[str, Callable[[], Any]]:
        """The lane's programs, compiled; the layer's checked."""
        import jax

        from moebius.core import BackendConfig
        from moebius.core.registry import Problem as Layer
        from moebius.jax_frontend.dispatch_ranks import choose_dispatcher

        layer = Layer(
            device=self.device,
            dtype=shape.dtype,
            dim=shape.dim,
            inter_dim=shape.inter,
            n_experts=shape.n_experts // self.ranks,
            ranks=self.ranks,
        )
        name = self.asked["rows"][lane.key]["dispatcher"]
        dispatcher = choose_dispatcher(name, layer, shape.k, AXIS, BackendConfig())
        parameters = {"gate_and_up_projs": own["up"], "down_projs": own["down"]}
        mask = self._over(lambda x: _whole(x))(own["x"])
        given = (parameters, own["x"], mask, own["weights"], own["indices"], own["dy"])
        both = self._both(shape, dispatcher).lower(*given).compile()
        lane.result["errors"] = _checked(both(*given), expected, shape)
        come = self._over(lambda x, mask, w, ids: dispatcher.dispatch(x, w, ids, mask, shape.n_experts)[0])
        sent = come(own["x"], mask, own["weights"], own["indices"])
        dy = jax.random.normal(jax.random.key(0), sent.x_SD.shape, sent.x_SD.dtype)
        dy = jax.device_put(dy, sent.x_SD.sharding)
        there = (parameters, sent.x_SD, self._over(_whole)(sent.x_SD), sent.weights_SK, sent.ids_SK, dy)
        still = self._both(shape, Still(self.ranks)).lower(*there).compile()
        return {LAYER: lambda: both(*given), STILL: lambda: still(*there)}

    def _over(self, each: Callable[..., Any]) -> Callable[..., Any]:
        """On every device, of its own part."""
        import jax
        from jax.sharding import PartitionSpec

        spec = PartitionSpec(AXIS)
        return jax.jit(jax.shard_map(each, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False))

    def _both(self, shape: Shape, dispatcher: Any) -> Any:
        """Output and every gradient, as one program."""
        import jax
        from jax.sharding import PartitionSpec

        from moebius.core import MoEConfig
        from moebius.jax_frontend import experts

        config = MoEConfig(
            n_routed_experts=shape.n_experts,
            n_activated_experts=shape.k,
            dim=shape.dim,
            moe_inter_dim=shape.inter,
            dtype=shape.dtype,
        )
        backend = self.asked["experts"]
        spec, one = PartitionSpec(AXIS), partial(experts, config=config, backend=backend, dispatcher=dispatcher)
        # As the modules do: Transformer Engine's kernels do not say over which axes their results vary.
        layer = jax.shard_map(one, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=backend != "te")

        def both(parameters: Any, x: Any, mask: Any, weights: Any, ids: Any, dy: Any) -> Any:
            y, pullback = jax.vjp(lambda p, x, w: layer(p, x, mask, w, ids), parameters, x, weights)
            return y, pullback(dy)

        return jax.jit(both)


def _whole(x: Any) -> Any:
    import jax.numpy as jnp

    return jnp.ones(x.shape[0], bool)


def _checked(result: Any, expected: gpu_check.Reference, shape: Shape) -> dict[str, float]:
    """Relative errors against float64.

    Raises:
        ValueError: see gpu_parallel_bench.check.
    """
    import jax

    from moebius.compare.bridge import to_torch

    y, (gradients, dx, dweights) = jax.device_put(result, jax.devices()[0])
    up, down = (to_torch(gradients[name]) for name in ("gate_and_up_projs", "down_projs"))
    found = gpu_check.Found(
        y=to_torch(y),
        dx=to_torch(dx),
        dweights=to_torch(dweights),
        gradients=lambda expert: (up[expert], down[expert]),
    )
    return check(expected, found, range(shape.n_experts))


def main(arguments: Iterable[str]) -> None:
    """Run the shapes; the figures are written after each."""
    (file,) = arguments
    asked: dict[str, Any] = json.loads(Path(file).read_text())
    if asked["dry"]:
        torch.set_num_threads(1)
    gpu_jax.start()
    devices = Devices(asked)
    for key, sizes in asked["shapes"].items():
        if devices.over():
            break
        print(f"Flax, {sizes['name']}", flush=True)
        devices.run(key, Shape(**sizes))
        write(asked["figures"], devices.figures)


if __name__ == "__main__":
    main(sys.argv[1:])
