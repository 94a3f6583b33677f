"""Launches played on tensors: Triton's own way once, then the compiled kernel alone."""

from __future__ import annotations

import pickle
import weakref
from typing import Any

import pytest
import torch
from kernel_stand_in import Kernel, installed, launch

from moebius.core.kernels.plan import Launch
from moebius.torch_frontend import play

pytest.importorskip("triton")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return installed(monkeypatch)


ROWS, OUT = torch.zeros(4, 8), torch.zeros(4, 8)


def test_run_a_second_time_calls_the_compiled_kernel_with_constants_in_order(kernel: Kernel) -> None:
    play.run(launch(), ROWS, 4, OUT)
    play.run(launch(programs=5), ROWS, 4, OUT)
    assert [grid for grid, *_ in kernel.first] == [(3,)]
    ((grid, arguments),) = kernel.later
    assert grid == (5, 1, 1) and arguments == (ROWS.data_ptr(), 4, OUT.data_ptr(), 8, 64)


def test_run_without_programs_launches_nothing(kernel: Kernel) -> None:
    play.run(launch(programs=0), ROWS, 4, OUT)
    assert not kernel.first and not kernel.later


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((torch.zeros(4, 8, dtype=torch.bfloat16), 4, OUT), id="a dtype"),
        pytest.param((torch.zeros(33)[1:].view(4, 8), 4, OUT), id="an address between 16 bytes"),
        pytest.param((ROWS, 1 << 31, OUT), id="an integer of 64 bits"),
    ],
)
def test_run_of_arguments_that_triton_tells_apart_goes_its_way_again(kernel: Kernel, other: Any) -> None:
    play.run(launch(), ROWS, 4, OUT)
    play.run(launch(), *other)
    assert len(kernel.first) == 2 and not kernel.later


def test_run_with_an_operand_of_another_kind_of_device_goes_tritons_way_which_refuses_it(kernel: Kernel) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    play.run(launch(), ROWS, 4, OUT)
    play.run(launch(), ROWS, 4, OUT.as_subclass(OnCuda))
    assert len(kernel.first) == 2 and not kernel.later


def test_run_of_another_code_goes_tritons_way_again(kernel: Kernel) -> None:
    play.run(launch(), ROWS, 4, OUT)
    play.run(launch(deep=32), ROWS, 4, OUT)
    assert len(kernel.first) == 2 and not kernel.later


def test_run_under_the_interpreter_goes_tritons_way_each_time(kernel: Kernel) -> None:
    kernel.interpreted = True
    for _ in range(2):
        play.run(launch(), ROWS, 4, OUT)
    assert len(kernel.first) == 2


def test_run_a_second_time_hands_over_the_descriptor_of_the_first(kernel: Kernel) -> None:
    rows, names = torch.zeros(128, 64, dtype=torch.bfloat16), ("shape", "strides", "block_shape", "layout")
    for _ in range(2):
        play.run(launch(blocks=((64, 64),)), rows, 4, OUT)
    ((_, (first, *_), _),), ((_, (later, *_)),) = kernel.first, kernel.later
    assert type(later) is type(first) and later.base.data_ptr() == rows.data_ptr() and later.padding == first.padding
    assert [getattr(later, name) for name in names] == [getattr(first, name) for name in names]


def test_descriptors_that_are_kept_keep_no_operand(kernel: Kernel) -> None:
    rows = torch.zeros(128, 64, dtype=torch.bfloat16)
    for _ in range(2):
        play.run(launch(blocks=((64, 64),)), rows, 4, OUT)
    gone = weakref.ref(rows)
    kernel.first.clear()
    del rows
    assert gone() is None and kernel.later


def test_a_launch_that_was_pickled_has_the_code_of_this_process() -> None:
    one = launch(blocks=((8, 8),))
    again = pickle.loads(pickle.dumps(one))
    assert again == one and again.code == one.code and hash(again) == hash(one)
    far = pickle.dumps(launch(deep=128)).replace(b"file.name", b"file.made")
    assert pickle.loads(far).code == Launch(kernel="file.made", programs=3, constants={"DEEP": 128, "WIDE": 8}).code


def test_launches_of_other_constants_or_options_are_other_code() -> None:
    assert launch().code == launch(programs=9).code
    others = [launch(deep=32), launch(blocks=((8, 8),)), Launch(kernel="file.other", programs=3, constants={})]
    assert len({one.code for one in [launch(), *others]}) == 4


def test_run_under_a_profiler_of_triton_goes_the_way_that_tells_it(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    play.run(launch(), ROWS, 4, OUT)
    hooks = type("Hooks", (), {"launch_enter_hook": print, "launch_exit_hook": None})
    monkeypatch.setattr(play, "_runtime", lambda: hooks)
    play.run(launch(), ROWS, 4, OUT)
    assert not kernel.later and len(kernel.compiled.watched) == 1


def test_compiled_kernels_of_the_installed_triton_are_called_as_here() -> None:
    import inspect

    from triton.compiler.compiler import CompiledKernel

    call = inspect.getsource(CompiledKernel.__getitem__)
    assert "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata" in call
    assert "launch_enter_hook" in call and "launch_exit_hook, *args)" in call
    assert not play.watched()
