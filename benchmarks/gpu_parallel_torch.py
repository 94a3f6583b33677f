"""One rank of `gpu_parallel`: PyTorch's dispatchers, over NCCL on a GPU of its own or, dry, over gloo.

`python -m benchmarks.gpu_parallel_torch ASKED RANK`: ASKED is the JSON file that gpu_parallel wrote.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import gpu_check
from benchmarks.gpu_meter import clear
from benchmarks.gpu_parallel_bench import (
    ALONE,
    ELEMENT,
    LAYER,
    STILL,
    Clock,
    Lane,
    check,
    entry,
    of_all,
    part,
    reason,
    rounds,
    write,
)
from benchmarks.gpu_problem import Problem, Shape
from moebius.core import MoEConfig
from moebius.torch_frontend import experts
from moebius.torch_frontend.dispatch import DISPATCHERS, Dispatcher, Options, Sent
from moebius.torch_frontend.dispatch_choice import agreed
from moebius.torch_frontend.dispatch_limits import LIMITS

PARAMETERS = ("gate_and_up_projs", "down_projs")


class Still:
    """A dispatcher that moves nothing: what it is handed is what has come already."""

    def __init__(self, ranks: int, rank: int):
        self.ranks, self.rank = ranks, rank

    def dispatch(self, x: Tensor, weights: Tensor, ids: Tensor, mask: Tensor, n_experts: int) -> tuple[Sent, Any]:
        """As it is."""
        return Sent(x, weights, ids), x.dtype

    def combine(self, y: Tensor, state: Any) -> Tensor:
        """Rounded, as it would be on its way."""
        return y.to(state)


class Ranks:
    """This rank's run over shapes.

    Args:
        asked: what gpu_parallel wrote.
    """

    def __init__(self, asked: dict[str, Any]):
        self.asked, self.started = asked, time.monotonic()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.device = "cpu" if asked["dry"] else "cuda"
        self.clock = Clock(wait=self._wait, slowest=self._slowest, rep_ms=asked["rep"], warmup_ms=asked["warmup"])
        self.figures: dict[str, Any] = {"shapes": {}, "results": []}

    def run(self, key: str, shape: Shape) -> None:
        """Everything on one shape."""
        problem = of_all(shape, self.ranks, self.device)
        self.figures["shapes"][key] = entry(shape, self.ranks, problem)
        expected = gpu_check.reference(problem)
        own = Own(problem, self.rank, self.ranks)
        lanes = [Lane(key=name, result={"shape": key, "row": name}) for name in self.asked["rows"]]
        self.figures["results"] += [lane.result for lane in lanes]
        made = [self._made(lane, own, expected) for lane in lanes]
        block = own.x.detach().repeat(self.ranks, 1)
        base = [
            Lane(key=ALONE, steps={LAYER: own.alone(self.asked["experts"])}, result={}),
            Lane(key="all-to-all", steps={LAYER: partial(_swapped, block, torch.empty_like(block))}, result={}),
        ]
        rounds([*lanes, *base], self.clock, self.asked["rounds"], self._over)
        found = self.figures["shapes"][key]
        found["alone"], swap = (lane.result.get(LAYER) for lane in base)
        if swap is not None:
            found["rate"] = 1e3 * (self.ranks - 1) * shape.tokens * shape.dim * ELEMENT / swap["ms"]  # bytes/s
        for dispatcher in filter(None, made):
            getattr(dispatcher, "close", lambda: None)()
        for lane in lanes:
            if LAYER in lane.result and STILL in lane.result:
                self._say(f"  {lane.key}: {lane.result[LAYER]['ms']:.3f} ms, rows {lane.result[STILL]['ms']:.3f} ms")

    def _made(self, lane: Lane, own: Own, expected: gpu_check.Reference) -> Dispatcher | None:
        """The lane's dispatcher, checked, with its steps; None, and the reason, where any rank cannot."""
        dispatcher, why = None, None
        try:
            dispatcher = self._dispatcher(own.problem.shape, **self.asked["rows"][lane.key])
            lane.result["errors"] = own.checked(dispatcher, self.asked["experts"], expected)
        except Exception as error:  # of one candidate, not of the run
            why = reason(error)
        whys: list[str | None] = [None] * self.ranks
        dist.all_gather_object(whys, why)
        if any(whys):
            told = {text: [r for r, each in enumerate(whys) if each == text] for text in whys if text is not None}
            lane.result["reason"] = "; ".join(f"rank {', '.join(map(str, on))}: {text}" for text, on in told.items())
            self._say(f"  {lane.key}: {lane.result['reason']}")
            return dispatcher
        assert dispatcher is not None
        lane.result["errors"] = self._worst(lane.result["errors"])
        still = own.still(dispatcher, self.asked["experts"])
        lane.steps = {LAYER: own.step(dispatcher, self.asked["experts"]), STILL: still}
        return dispatcher

    def _dispatcher(self, shape: Shape, dispatcher: str, static: bool = False) -> Dispatcher:
        from moebius.core.registry import Problem as Layer

        tokens = shape.tokens // self.ranks
        once = dispatcher in LIMITS and LIMITS[dispatcher].once
        options = Options(
            shape.dim,
            shape.n_experts,
            shape.k,
            num_sms=self.asked["num_sms"],
            max_tokens=tokens if static or once else None,
        )
        layer = Layer(
            device=self.device,
            dtype=shape.dtype,
            dim=shape.dim,
            inter_dim=shape.inter,
            n_experts=shape.n_experts // self.ranks,
            ranks=self.ranks,
        )
        row = agreed(dispatcher, layer, options, dist.group.WORLD)
        made: Dispatcher = DISPATCHERS.implementation(row)(dist.group.WORLD, None, options)
        return made

    def _worst(self, errors: dict[str, float]) -> dict[str, float]:
        """Of all ranks, each of which holds other experts."""
        found: list[dict[str, float]] = [{} for _ in range(self.ranks)]
        dist.all_gather_object(found, errors)
        names = dict.fromkeys(name for one in found for name in one)
        return {name: max(one[name] for one in found if name in one) for name in names}

    def _wait(self, _: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _slowest(self, value: float) -> float:
        largest = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def _over(self) -> bool:
        return self._slowest(time.monotonic() - self.started) > self.asked["budget"]

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)


class Own:
    """This rank's tokens and experts, as leaves.

    Args:
        problem: of all ranks.
    """

    def __init__(self, problem: Problem, rank: int, ranks: int):
        s = problem.shape
        self.problem, self.rank, self.ranks = problem, rank, ranks
        self.config = MoEConfig(
            n_routed_experts=s.n_experts,
            n_activated_experts=s.k,
            dim=s.dim,
            moe_inter_dim=s.inter,
            dtype=s.dtype,
        )
        tokens, mine = part(s.tokens, rank, ranks), part(s.n_experts, rank, ranks)
        self.held = range(mine.start, mine.stop)
        self.x, self.weights = (
            value.detach()[tokens].clone().requires_grad_() for value in (problem.x, problem.routing.weights)
        )
        self.ids, self.dy = problem.routing.indices[tokens].contiguous(), problem.dy[tokens].contiguous()
        self.parameters = {
            name: value[mine].clone().requires_grad_()
            for name, value in zip(PARAMETERS, (problem.up, problem.down), strict=True)
        }

    def step(self, dispatcher: Dispatcher, backend: str | None) -> Callable[[], object]:
        """Forward and backward of this rank's tokens."""
        return _step(self.parameters, self.x, self.weights, self.ids, self.dy, self.config, backend, dispatcher)

    def still(self, dispatcher: Dispatcher, backend: str | None) -> Callable[[], object]:
        """The same of the rows that come to this rank, with nobody to send them; by all ranks together."""
        with torch.no_grad():
            mask = _whole(self.x)
            sent, _ = dispatcher.dispatch(self.x, self.weights, self.ids, mask, self.config.n_routed_experts)
        x, weights = (value.detach().clone().requires_grad_() for value in (sent.x_SD, sent.weights_SK))
        dy = torch.randn_like(x)
        at = Still(self.ranks, self.rank)
        return _step(self.parameters, x, weights, sent.ids_SK.clone(), dy, self.config, backend, at)

    def alone(self, backend: str | None) -> Callable[[], object]:
        """The same of all ranks' tokens and experts on this device alone."""
        p = self.problem
        own = {name: value.detach().requires_grad_() for name, value in zip(PARAMETERS, (p.up, p.down), strict=True)}
        x, weights = (value.detach().requires_grad_() for value in (p.x, p.routing.weights))
        return _step(own, x, weights, p.routing.indices, p.dy, self.config, backend, None)

    def checked(self, dispatcher: Dispatcher, backend: str | None, expected: gpu_check.Reference) -> dict[str, float]:
        """Relative errors against float64; by all ranks together.

        Raises:
            ValueError: see gpu_parallel_bench.check.
        """
        leaves = [self.x, self.weights, *self.parameters.values()]
        clear(leaves)
        y = experts(
            self.parameters,
            self.x,
            _whole(self.x),
            self.weights,
            self.ids,
            config=self.config,
            backend=backend,
            dispatcher=dispatcher,
        )
        y.backward(self.dy)
        assert self.x.grad is not None and self.weights.grad is not None
        y, dx, dweights = (self._of_all(value) for value in (y.detach(), self.x.grad, self.weights.grad))
        grads = [value.grad for value in self.parameters.values()]
        first = self.held.start
        found = gpu_check.Found(
            y=y, dx=dx, dweights=dweights, gradients=lambda expert: tuple(grad[expert - first] for grad in grads)
        )
        errors = check(expected, found, self.held)
        clear(leaves)
        return errors

    def _of_all(self, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(self.ranks)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)


def _step(
    parameters: dict[str, Tensor],
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    dy: Tensor,
    config: MoEConfig,
    backend: str | None,
    dispatcher: Any,
) -> Callable[[], object]:
    leaves, mask = [x, weights, *parameters.values()], _whole(x)

    def run() -> None:
        clear(leaves)
        y = experts(parameters, x, mask, weights, ids, config=config, backend=backend, dispatcher=dispatcher)
        y.backward(dy)

    return run


def _swapped(rows: Tensor, out: Tensor) -> None:
    """The network's own all-to-all, equal blocks."""
    dist.all_to_all_single(out, rows)


def _whole(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)


def main(arguments: Iterable[str]) -> None:
    """Run the shapes; rank 0 writes the figures after each."""
    file, rank = arguments
    asked: dict[str, Any] = json.loads(Path(file).read_text())
    if asked["dry"]:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(rank))
    store = dist.FileStore(asked["store"], asked["ranks"])
    dist.init_process_group(
        "gloo" if asked["dry"] else "nccl",
        store=store,
        rank=int(rank),
        world_size=asked["ranks"],
        timeout=timedelta(seconds=asked["timeout"]),
    )
    ranks = Ranks(asked)
    for key, sizes in asked["shapes"].items():
        if ranks._over():
            break
        ranks._say(f"PyTorch, {sizes['name']}")
        ranks.run(key, Shape(**sizes))
        if ranks.rank == 0:
            write(asked["figures"], ranks.figures)
        if not asked["dry"]:
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
