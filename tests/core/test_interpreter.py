"""Launches in Triton's interpreter, as far as they need no Triton; tests/cross/test_interpreted.py has the kernels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moebius.core.kernels import interpreter
from moebius.core.kernels.plan import Launch

LAUNCH = Launch(kernel="file.function", programs=3, constants={})


class Kernel:
    """Fills what it is given; on the way it waits a moment for another call to be inside as well."""

    def __init__(self) -> None:
        self.barrier, self.met = Barrier(2), 0

    def __getitem__(self, grid: tuple[int, ...]) -> Kernel:
        return self

    def __call__(self, written: np.ndarray, **_: Any) -> None:
        try:
            self.barrier.wait(timeout=0.5)
            self.met += 1
        except BrokenBarrierError:
            written[:] = 1


def test_play_from_two_threads_at_once_has_one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(interpreter, "import_module", lambda name: SimpleNamespace(function=kernel))
    monkeypatch.setattr(interpreter, "mend", lambda: None)
    monkeypatch.setattr(interpreter, "_pointer", lambda array: array)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda _: interpreter.play(LAUNCH, [], [((4,), "float32")]), range(2)))
    assert kernel.met == 0
    assert all(array.tolist() == [1.0] * 4 for (array,) in results)


def test_play_after_a_kernel_that_failed_plays_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(array: np.ndarray) -> np.ndarray:
        raise ValueError("no such pointer")

    kernel = Kernel()
    kernel.barrier.abort()
    monkeypatch.setattr(interpreter, "import_module", lambda name: SimpleNamespace(function=kernel))
    monkeypatch.setattr(interpreter, "mend", lambda: None)
    monkeypatch.setattr(interpreter, "_pointer", failing)
    with pytest.raises(ValueError, match="no such pointer"):
        interpreter.play(LAUNCH, [], [((4,), "float32")])
    monkeypatch.setattr(interpreter, "_pointer", lambda array: array)
    (array,) = interpreter.play(LAUNCH, [], [((4,), "float32")])
    assert array.tolist() == [1.0] * 4
