"""The dispatchers over NCCL in a group of one rank: what they compute, when the host waits, and CUDA graphs.

A group of one rank enters the collectives that several enter, so one GPU shows all but the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import ranks
import torch
from sides import Arrays, Problem, cached_problem, reference_over_ranks
from trips import waits

from moebius.core.tolerance import Bound, bounds, within
from moebius.torch_frontend import experts
from moebius.torch_frontend.dispatch import DISPATCHERS, Options

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible")]
T, D, E, K = 40, 64, 8, 2
# Dispatcher and its max_tokens.
KINDS = [("alltoall", None), ("allgather", None), ("allgather", T), ("allgather", T + 9)]


@cache
def _problem(seed: int) -> Problem:
    settings = {"tokens": T, "dim": D, "inter": 32, "n_experts": E, "k": K}
    return cached_problem(**settings, expert_bias=True, dtype="bfloat16", seed=seed)


class _Layer:
    """Experts and tokens on the GPU, where a problem can be put in the place of another.

    Args:
        dispatcher: over the group.
    """

    def __init__(self, p: Problem, dispatcher: Any):
        self.config, self.dispatcher = p.config, dispatcher
        self.parameters = {
            name: torch.from_numpy(value).to("cuda", torch.bfloat16).requires_grad_()
            for name, value in p.parameters.items()
        }
        self.x, self.dy = (torch.from_numpy(value).to("cuda", torch.bfloat16) for value in (p.x, p.dy))
        self.weights = torch.from_numpy(p.weights).float().cuda()
        self.ids, self.mask = torch.from_numpy(p.ids).cuda(), torch.from_numpy(p.token_mask).cuda()
        self.x.requires_grad_()
        self.weights.requires_grad_()

    @torch.no_grad()
    def put(self, p: Problem) -> None:
        """That problem's values where this one's are."""
        for name, value in p.parameters.items():
            self.parameters[name].copy_(torch.from_numpy(value))
        here = (self.x, self.dy, self.weights, self.ids, self.mask)
        for mine, value in zip(here, (p.x, p.dy, p.weights, p.ids, p.token_mask), strict=True):
            mine.copy_(torch.from_numpy(value))

    def forward(self) -> torch.Tensor:
        """The output."""
        own = (self.x, self.mask, self.weights, self.ids)
        return experts(self.parameters, *own, config=self.config, backend="grouped_mm", dispatcher=self.dispatcher)

    def both(self) -> torch.Tensor:
        """The output, after a backward pass into gradients that are none."""
        self.clear()
        y = self.forward()
        y.backward(self.dy)
        return y.detach()

    def clear(self) -> None:
        """No gradients."""
        for leaf in (self.x, self.weights, *self.parameters.values()):
            leaf.grad = None

    def found(self, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """y and every gradient, on the host."""
        grads = {name: value.grad for name, value in self.parameters.items()}
        every: dict[str, Any] = {"y": y, "dx": self.x.grad, "dweights": self.weights.grad, **grads}
        return {name: value.cpu() for name, value in every.items()}


def _made(name: str, max_tokens: int | None) -> Any:
    options = Options(D, E, K, max_tokens=max_tokens)
    return DISPATCHERS.implementation(DISPATCHERS[name])(torch.distributed.group.WORLD, None, options)


# ----------------------------------------------------------------------------------------------------- what a rank does
def _computed() -> list[tuple[dict[str, torch.Tensor], tuple[int, ...], bool]]:
    """Of each kind: what it computes; how often the host waits in dispatch, combine and backward; what it declares."""
    found = []
    for name, max_tokens in KINDS:
        dispatcher = _made(name, max_tokens)
        layer = _Layer(_problem(0), dispatcher)
        values = layer.found(layer.both())  # also sets NCCL up
        found.append((values, _waited(layer), dispatcher.reads_host))
    return found


def _waited(layer: _Layer) -> tuple[int, ...]:
    """Of the dispatcher alone: what computes between is not asked."""
    layer.clear()
    (sent, state), out = waits(
        lambda: layer.dispatcher.dispatch(layer.x, layer.weights, layer.ids, layer.mask, layer.config.n_routed_experts)
    )
    y_SD = sent.x_SD.float() * sent.weights_SK.sum(1, keepdim=True)
    y, home = waits(lambda: layer.dispatcher.combine(y_SD, state))
    _, backward = waits(lambda: y.backward(layer.dy))
    return out, home, backward


def _replayed() -> list[dict[str, torch.Tensor]]:
    """Both passes captured with one problem's values, replayed with others' and then with the first's again."""
    layer = _Layer(_problem(0), _made("allgather", T + 9))
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            layer.both()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    time.sleep(2.0)  # until NCCL's watchdog has seen that what was called before is done
    layer.clear()
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's watchdog among them, may go on asking the device.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = layer.both()
    found = []
    for seed in (1, 2, 0):
        layer.put(_problem(seed))
        graph.replay()
        torch.cuda.synchronize()
        found.append(layer.found(y))
    return found


# ------------------------------------------------------------------------------------------------- what is due of them
@cache
def _of_kinds() -> list[tuple[dict[str, torch.Tensor], tuple[int, ...], bool]]:
    return _alone(_computed)


def _alone(function: Callable[[], Any]) -> Any:
    (answer,) = ranks.run(function, 1, transport="nccl")
    return answer


@cache
def _expected(seed: int) -> tuple[Arrays, dict[str, Bound]]:
    p = _problem(seed)
    exact = reference_over_ranks(p, (T,))
    return exact, bounds(lambda arithmetic: reference_over_ranks(p, (T,), arithmetic), exact, p.dtype)


def _assert_within(found: dict[str, torch.Tensor], seed: int) -> None:
    exact, limits = _expected(seed)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert within(value.double().numpy(), exact[name], limits[name]), name


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[f"{name} {most}" for name, most in KINDS])
def test_experts_over_a_group_of_one_agree_with_reference(kind: int) -> None:
    _assert_within(_of_kinds()[kind][0], 0)


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[f"{name} {most}" for name, most in KINDS])
def test_dispatchers_wait_for_the_device_as_they_declare_and_in_dispatch_alone(kind: int) -> None:
    _, waited, reads_host = _of_kinds()[kind]
    assert waited == (int(reads_host), 0, 0)
    assert reads_host == (KINDS[kind][1] is None)


def test_allgather_that_counts_nothing_replays_other_routes_from_a_cuda_graph() -> None:
    for seed, found in zip((1, 2, 0), _alone(_replayed), strict=True):
        _assert_within(found, seed)
