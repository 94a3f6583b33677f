"""A function of tensors that only launches kernels, recorded once and played again on other tensors of the same kind.

Of a layer of few tokens the host sets the pace: what the kernels take 60 us for is called for in 300. Nearly all of
that is spent on what is the same each time: plans looked up, tensors made, shapes checked. A tape keeps what is left
of it: which kernels, in which order, and at which place of which tensor each argument lies. What the function makes
for itself lies in one piece of memory, its results in pieces of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moebius.core.kernels.plan import Launch
from moebius.torch_frontend import play

Inputs = Sequence[Tensor | None]
Returned = tuple[Inputs, Any]

_APART = 256  # bytes: where a tensor begins in the memory of a tape; torch's own allocator has 512
_ALIGNED = 15  # an address with one of these bits lies between 16 bytes, and other code may serve it
_ALLOCATES = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Place(NamedTuple):
    """Where a tensor lies: `offset` bytes into one of the inputs, the memory or the results, counted in this order."""

    base: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Step(NamedTuple):
    """One launch; an argument is a place or an integer."""

    launch: Launch
    arguments: tuple[Place | int, ...]
    compiled: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Tape:
    """What `record` found.

    Attributes:
        steps: the launches. work: bytes of the memory. results: (shape, dtype) of each, None for none. other: what
            else the function returned.
    """

    steps: tuple[Step, ...]
    work: int
    results: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    other: Any
    quick: tuple[tuple[Any, ...], ...] | None

    def play(self, inputs: Inputs) -> list[Tensor | None] | None:
        """The results, as the function would give them; None where an input begins between 16 bytes.

        Args:
            inputs: of the shapes, strides, dtypes and device of those that were recorded; the first is a tensor, and
                its device the current one.
        """
        first: Any = inputs[0]
        made = [like and first.new_empty(like[0], dtype=like[1]) for like in self.results]
        tensors = (*inputs, first.new_empty(self.work, dtype=torch.uint8), *made)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        for address in addresses:
            if address & _ALIGNED:
                return None
        if self.quick is None or play.watched():
            for launch, arguments, _ in self.steps:
                play.run(launch, *(at if isinstance(at, int) else _tensor(tensors, at) for at in arguments))
        else:
            _play(self.quick, addresses, first.device.index)
        return made


def record(function: Callable[[], Returned], inputs: Inputs) -> tuple[Returned, Tape | None]:
    """What `function` returns, (tensors or None each, anything else), and its tape.

    No tape, where it does anything but to allocate, to look at tensors in other shapes and to launch kernels by
    `play.run`; where two inputs share memory; or where a result does not fill memory of its own.

    Args:
        function: of `inputs` alone, and of what is the same in each call.
    """
    with _Watch() as seen, play.listening() as heard:
        results, other = function()
    return (results, other), None if seen.others else _tape(heard, inputs, seen.made, results, other)


class _Watch(TorchDispatchMode):
    """Every operator of torch: what it allocates, and those that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _ALLOCATES:
            self.made.append(found)  # held, so that no two of them have one address
        elif not func.is_view:
            self.others.append(str(func))
        return found


def _tape(
    heard: Sequence[play.Heard], inputs: Inputs, made: Sequence[Tensor], results: Inputs, other: Any
) -> Tape | None:
    spans, work = _spans(inputs, made, results)
    if work < 0 or not _whole(results, made):
        return None
    steps = tuple(
        Step(launch, tuple(a if isinstance(a, int) else _place(spans, a) for a in arguments), compiled)
        for launch, compiled, arguments in heard
    )
    if any(at is _NOWHERE for step in steps for at in step.arguments):
        return None
    likes = tuple(result if result is None else (result.shape, result.dtype) for result in results)
    return Tape(steps=steps, work=work, results=likes, other=other, quick=_quick(steps))


def _spans(inputs: Inputs, made: Sequence[Tensor], results: Inputs) -> tuple[list[tuple[int, int, int, int]], int]:
    """(first byte, byte after the last, base, offset there) of all memory, in order; bytes of the tape's own, or -1
    where two of them overlap."""
    own = {_start(result): index for index, result in enumerate(results, len(inputs) + 1) if result is not None}
    spans = [(t.data_ptr(), t.data_ptr() + _length(t), base, 0) for base, t in enumerate(inputs) if t is not None]
    work = 0
    for start, size in {_start(t): t.untyped_storage().nbytes() for t in made if t.numel()}.items():
        if start in own:
            spans.append((start, start + size, own[start], 0))
        else:
            spans.append((start, start + size, len(inputs), work))
            work += -(-size // _APART) * _APART
    spans.sort()
    apart = all(end <= after[0] for (_, end, *_), after in pairwise(spans))
    return spans, work if apart else -1


_NOWHERE = Place(-1, 0, torch.uint8, (), ())


def _place(spans: Sequence[tuple[int, int, int, int]], tensor: Tensor) -> Place:
    address = tensor.data_ptr()
    for start, end, base, offset in spans:
        if start <= address < end:
            return Place(base, offset + address - start, tensor.dtype, tuple(tensor.shape), tensor.stride())
    return _NOWHERE


def _start(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _length(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + steps) * tensor.element_size()


def _whole(results: Inputs, made: Sequence[Tensor]) -> bool:
    """Whether each result fills memory that was made for it alone."""
    sizes = {_start(tensor): tensor.untyped_storage().nbytes() for tensor in made}
    there = [result for result in results if result is not None]
    fills = [r.is_contiguous() and sizes.get(r.data_ptr()) == r.numel() * r.element_size() > 0 for r in there]
    return all(fills) and len({r.data_ptr() for r in there}) == len(there)


def _tensor(tensors: Inputs, at: Place) -> Tensor:
    base: Any = tensors[at.base]
    size = at.dtype.itemsize
    start = (base.storage_offset() * base.element_size() + at.offset) // size
    # Storages are counted in bytes: a view in another dtype, which torch has of whole tensors alone.
    return torch.empty(0, dtype=at.dtype, device=base.device).set_(base.untyped_storage(), start, at.shape, at.strides)


def _quick(steps: Sequence[Step]) -> tuple[tuple[Any, ...], ...] | None:
    """Of each step what its compiled kernel is called with: places as (base, offset), integers at base -1."""
    if any(step.compiled is None for step in steps):
        return None  # Triton's interpreter compiles nothing
    quick = []
    for launch, arguments, (kernel, constants) in steps:
        at = tuple((-1, a) if isinstance(a, int) else (a.base, a.offset) for a in arguments)
        described = tuple((i, arguments[i].shape, block) for i, block in enumerate(launch.blocks))  # type: ignore[union-attr]
        quick.append((kernel.run, launch.programs, *play.handles(kernel), at, described, constants))
    return tuple(quick)


def _play(quick: Sequence[tuple[Any, ...]], addresses: list[int], device: int) -> None:
    stream = torch._C._cuda_getCurrentRawStream(device)
    addresses.append(0)  # what integers are counted from
    for run, programs, function, metadata, at, described, constants in quick:
        given: list[Any] = [addresses[base] + offset for base, offset in at]
        for place, shape, block in described:
            given[place] = play.described(given[place], shape, block)
        run(programs, 1, 1, stream, function, metadata, None, None, None, *given, *constants)
