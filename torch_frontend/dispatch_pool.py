"""Communication buffers: made by all ranks of a group together, shared by layers, destroyed by all ranks together.

The only thing that outlives a call, and no setting of any. A buffer is never destroyed by the garbage collector or at
exit: that is a collective too, and ranks do not collect garbage in step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

from moebius.core.errors import ConfigError

Sizes = tuple[int, ...]


class Generation:
    """A buffer as it was made.

    Attributes:
        buffer: the library's object. open: whether it was not destroyed yet.
    """

    def __init__(self, buffer: Any):
        self.buffer, self.open = buffer, True

    def destroy(self) -> None:
        """Destroy it, with all ranks; HybridEP's have no such call."""
        self.open, buffer = False, self.buffer
        self.buffer = None
        getattr(buffer, "destroy", lambda: None)()


class _Shelf:
    """What holders of one key share. A larger buffer takes the place of a smaller one, which stays for its handles."""

    def __init__(self) -> None:
        self.sizes: Sizes = ()
        self.generations: list[Generation] = []
        self.holders = 0


_SHELVES: dict[Hashable, _Shelf] = {}


class Lease:
    """A layer's hold on a buffer that is as large as it needs.

    Args:
        key: holders of equal keys share a buffer; None shares with nobody. Groups in it are compared by identity.
        sizes: that it must serve. make: (sizes) -> the library's object; called by all ranks together.
    """

    def __init__(self, key: Hashable, sizes: Sizes, make: Callable[[Sizes], Any]):
        self._key, self._make = key, make
        self._shelf: _Shelf | None = _Shelf() if key is None else _SHELVES.setdefault(key, _Shelf())
        self._shelf.holders += 1
        try:
            self.grow(sizes)
        except BaseException:
            self.close()  # nobody has this lease who could
            raise

    def again(self) -> Lease:
        """Another hold on the same buffer; nothing is made."""
        other = copy.copy(self)
        if other._shelf is not None:
            other._shelf.holders += 1
        return other

    def grow(self, sizes: Sizes) -> Generation:
        """The buffer, after a larger one is made where it has to be; all ranks ask for the same."""
        shelf = self._held()
        wanted = tuple(map(max, zip(sizes, shelf.sizes or sizes, strict=True)))
        if wanted != shelf.sizes:
            shelf.generations.append(Generation(self._make(wanted)))
            shelf.sizes = wanted
        return shelf.generations[-1]

    @property
    def sizes(self) -> Sizes:
        """Of the buffer."""
        return self._held().sizes

    def close(self) -> None:
        """Give it back; the last holder destroys it. Called by all ranks together, any number of times."""
        shelf, self._shelf = self._shelf, None
        if shelf is None:
            return
        shelf.holders -= 1
        if shelf.holders == 0:
            if self._key is not None:
                del _SHELVES[self._key]
            for generation in shelf.generations:
                generation.destroy()

    def _held(self) -> _Shelf:
        if self._shelf is None:
            raise ConfigError("a dispatcher's buffer", "it was closed", "build the dispatcher again")
        return self._shelf
