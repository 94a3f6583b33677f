"""Launches recorded once and played again: what is handed to the compiled kernels, and what is not recorded."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from kernel_stand_in import Kernel, installed, launch

from moebius.torch_frontend import play
from moebius.torch_frontend.tape import Tape, record

pytest.importorskip("triton")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return installed(monkeypatch)


def rows() -> torch.Tensor:
    return torch.randn(4, 8)


def steps(x: torch.Tensor, other: torch.Tensor | None = None) -> Any:
    """Two launches by way of memory of its own, into a result."""
    between, y = torch.empty(3, 8), torch.empty(4, 8)
    play.run(launch(), x, 4, between)
    play.run(launch(programs=5), between[1:], 1 << 33, y)
    return [y, None], "other"


def recorded(function: Any, *inputs: torch.Tensor | None) -> Tape | None:
    return record(lambda: function(*inputs), inputs)[1]


def taped(function: Any, *inputs: torch.Tensor | None) -> Tape:
    found = recorded(function, *inputs)
    assert found is not None
    return found


def test_record_returns_what_the_function_returns(kernel: Kernel) -> None:
    y = torch.empty(4, 8)
    (results, other), tape = record(lambda: ([y], 3), [rows()])
    assert results[0] is y and other == 3
    assert tape is None  # y was made elsewhere


def test_play_calls_the_compiled_kernels_with_the_addresses_of_new_tensors(kernel: Kernel) -> None:
    tape, x = taped(steps, rows(), None), rows()
    assert len(kernel.first) == 2 and not kernel.later and tape.other == "other"
    results = tape.play([x, None])
    assert results is not None and results[1] is None
    y = results[0]
    assert y is not None and (y.shape, y.dtype) == ((4, 8), torch.float32)
    ((first, given), (second, then)) = kernel.later
    assert (first, second) == ((3, 1, 1), (5, 1, 1)) and len(kernel.first) == 2
    assert given[:2] == (x.data_ptr(), 4) and given[3:] == then[3:] == (8, 64)
    assert then[:3] == (given[2] + 32, 1 << 33, y.data_ptr())  # a row further than what the first wrote
    assert given[2] not in (x.data_ptr(), y.data_ptr())


def test_play_gives_memory_of_its_own_to_each_result(kernel: Kernel) -> None:
    tape, x = taped(steps, rows()), rows()
    played = [tape.play([x]) for _ in range(3)]
    assert len({results[0].data_ptr() for results in played if results and results[0] is not None}) == 3


def test_play_counts_an_argument_from_the_input_that_it_lies_in(kernel: Kernel) -> None:
    def inner(x: torch.Tensor, w: torch.Tensor) -> Any:
        y = torch.empty(4, 8)
        play.run(launch(), w.mT[2:], 4, y)
        return [y], None

    tape = taped(inner, rows(), torch.randn(8, 16).mT)
    x, w = rows(), torch.randn(8, 16).mT
    tape.play([x, w])
    (_, given) = kernel.later[-1]
    assert given[0] == w.data_ptr() + 2 * 16 * 4


def test_play_hands_over_a_descriptor_of_the_new_address(kernel: Kernel) -> None:
    def described(x: torch.Tensor) -> Any:
        y = torch.empty(4, 8)
        play.run(launch(blocks=((64, 64),)), x, 4, y)
        return [y], None

    tape = taped(described, torch.zeros(128, 64, dtype=torch.bfloat16))
    x = torch.zeros(128, 64, dtype=torch.bfloat16)
    tape.play([x])
    (_, (descriptor, *_)) = kernel.later[-1]
    assert descriptor.base.data_ptr() == x.data_ptr() and descriptor.shape == [128, 64]


def test_play_of_an_input_between_16_bytes_is_refused(kernel: Kernel) -> None:
    tape = taped(steps, rows())
    assert tape.play([torch.zeros(33)[1:].view(4, 8)]) is None and not kernel.later


def test_play_tells_each_launch_to_a_profiler_of_triton(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    tape, x = taped(steps, rows()), rows()
    monkeypatch.setattr(play, "watched", lambda: True)
    tape.play([x])
    told = [call for compiled, _ in play._compiled.values() for call in compiled.watched]
    assert not kernel.later and [grid for grid, _ in told] == [(3, 1, 1), (5, 1, 1)]
    assert told[0][1][0].data_ptr() == x.data_ptr() and told[0][1][0].shape == x.shape


def test_record_sees_nothing_of_another_thread(kernel: Kernel) -> None:
    elsewhere = rows(), 4, rows()

    def both(x: torch.Tensor) -> Any:
        y = torch.empty(4, 8)
        other = Thread(target=play.run, args=(launch(), *elsewhere))
        other.start()
        other.join()
        play.run(launch(), x, 4, y)
        return [y], None

    assert len(taped(both, rows()).steps) == 1


def computes(x: torch.Tensor) -> Any:
    return steps(x + 1)


def gives_back_its_input(x: torch.Tensor) -> Any:
    return [x], None


def gives_back_a_view(x: torch.Tensor) -> Any:
    (y, _), _ = steps(x)
    return [y[1:]], None


def gives_one_twice(x: torch.Tensor) -> Any:
    (y, _), _ = steps(x)
    return [y, y], None


def gives_nothing_at_all(x: torch.Tensor) -> Any:
    return [torch.empty(0)], None


_ELSEWHERE = torch.zeros(4, 8)


def reads_something_else(x: torch.Tensor) -> Any:
    y = torch.empty(4, 8)
    play.run(launch(), _ELSEWHERE, 4, y)
    return [y], None


@pytest.mark.parametrize(
    "function",
    [computes, gives_back_its_input, gives_back_a_view, gives_one_twice, gives_nothing_at_all, reads_something_else],
)
def test_record_of_what_a_tape_cannot_hold_gives_none(kernel: Kernel, function: Any) -> None:
    assert recorded(function, rows()) is None


def test_record_of_inputs_that_share_memory_gives_none(kernel: Kernel) -> None:
    x = rows()
    assert recorded(steps, x, x[1:]) is None and recorded(steps, x, rows()) is not None


def test_record_after_an_error_can_record_again(kernel: Kernel) -> None:
    def fails(x: torch.Tensor) -> Any:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        recorded(fails, rows())
    assert recorded(steps, rows()) is not None
