"""Experts of few rows, played from tapes on a GPU: bit for bit what the steps give; see support/played_cases.py."""

from __future__ import annotations

import shutil
import subprocess
from threading import Thread
from unittest import mock

import played_cases
import pytest
import torch

from moebius.torch_frontend import few, lean

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible")]
DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean._FORWARD, "_found", {})
    monkeypatch.setattr(lean._BACKWARD, "_found", {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", played_cases.CASES)
def test_played_experts_on_a_gpu_have_the_bits_of_the_steps(case: str, dtype: str) -> None:
    played_cases.check(case, "cuda", dtype)


@pytest.mark.parametrize("sizes", [(128, 8, 2048, 768, 1), (32, 4, 512, 320, 64), (8, 2, 1024, 512, 256)])
def test_played_experts_of_real_widths_have_the_bits_of_the_steps(sizes: tuple[int, ...]) -> None:
    names = ("E", "K", "D", "I", "T")
    with mock.patch.multiple(played_cases, **dict(zip(names, sizes, strict=True))):
        *_, tokens = sizes
        experts = played_cases.layer("cuda", "bfloat16")
        calls = [played_cases.given("cuda", "bfloat16", seed, tokens) for seed in range(played_cases.CALLS)]
        played_cases.compare(experts, calls, 2 * (played_cases.CALLS - 2))


def test_played_experts_are_captured_in_a_graph_and_replayed_with_other_values() -> None:
    experts, call = played_cases.layer("cuda", "bfloat16"), played_cases.given("cuda", "bfloat16", 0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(played_cases.CALLS):
            played_cases.both(experts, call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with played_cases.counted() as plays, torch.cuda.graph(graph, stream=side):
        found = played_cases.both(experts, call)
    assert plays == [True, True]
    for seed in (1, 2):
        other = played_cases.given("cuda", "bfloat16", seed)
        with torch.no_grad():
            for name in call:
                call[name].copy_(other[name])
        graph.replay()
        torch.cuda.synchronize()
        with played_cases.step_by_step():
            played_cases.same(found, played_cases.both(experts, other))


def test_played_experts_on_another_stream_wait_for_nothing_else() -> None:
    experts = played_cases.layer("cuda", "bfloat16")
    calls = [played_cases.given("cuda", "bfloat16", seed) for seed in range(12)]
    found = []
    for index, call in enumerate(calls):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(played_cases.both(experts, call))
        if index % 3 == 0:
            stream.synchronize()
    torch.cuda.synchronize()
    with played_cases.step_by_step():
        for each, call in zip(found, calls, strict=True):
            played_cases.same(each, played_cases.both(experts, call))


def test_played_experts_in_several_threads_have_the_bits_of_the_steps() -> None:
    experts = played_cases.layer("cuda", "bfloat16")
    calls = [[played_cases.given("cuda", "bfloat16", 8 * i + j) for j in range(8)] for i in range(4)]
    found: dict[int, list[played_cases.Tensors]] = {}

    def run(i: int) -> None:
        found[i] = [played_cases.both(experts, call) for call in calls[i]]

    threads = [Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    with played_cases.step_by_step():
        for i in range(4):
            for each, call in zip(found[i], calls[i], strict=True):
                played_cases.same(each, played_cases.both(experts, call))


def test_many_rows_are_not_played() -> None:
    tokens = few.ROWS // played_cases.K + 1
    experts = played_cases.layer("cuda", "bfloat16")
    calls = [played_cases.given("cuda", "bfloat16", seed, tokens) for seed in range(played_cases.CALLS)]
    played_cases.compare(experts, calls, 0)
