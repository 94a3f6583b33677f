"""Stores of ranks that are threads: one that works, one that breaks, one that answers no more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Table:
    """A store in memory."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> str | None:
        return self.values.get(key)


class Broken(Table):
    """A store whose host died."""

    def get(self, *_: str) -> str | None:
        raise ConnectionError("Broken pipe\nframe 0: somewhere")

    set = get  # type: ignore[assignment]


class Silent(Table):
    """A store whose host is frozen, until `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def get(self, *_: str) -> str | None:
        self.release.wait(60.0)
        return None

    set = get  # type: ignore[assignment]


def together(function: Callable[[int], Any], places: list[int]) -> dict[int, Any]:
    """function(place) in a thread each: what it returned or raised."""

    def call(place: int) -> Any:
        try:
            return function(place)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return dict(zip(places, pool.map(call, places), strict=True))
