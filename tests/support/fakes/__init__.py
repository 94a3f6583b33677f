"""Stand-ins for packages that need a GPU: they compute, record calls and are as strict as the package.

`install` puts modules where `import` finds them; a monkeypatch takes them away again.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moebius.core import registry

if TYPE_CHECKING:
    import torch


def install(monkeypatch: Any, modules: dict[str, dict[str, Any]]) -> None:
    """Make each dotted name importable, holding what its dictionary says; parents are packages."""
    for name, content in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    forget()


def forget() -> None:
    """Let the registry look again at what is installed."""
    registry._absent.cache_clear()


def as_pointer(tensor: torch.Tensor) -> torch.Tensor:
    """What a library sees that takes the address and the shape and not the strides."""
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.insert(0, step)
        step *= size
    return tensor.detach().as_strided(tensor.shape, strides)
