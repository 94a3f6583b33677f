"""What a run was measured on: the device, and the versions of what is installed."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("triton", "transformers", "nemo-automodel", "transformer-engine", "grouped-gemm", "liger-kernel")


def machine() -> dict[str, str]:
    """Device, Python, PyTorch, and the peers that are installed."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        gpu = {"GPU": torch.cuda.get_device_name(), "compute capability": capability}
        found = {**gpu, **found, "CUDA": str(torch.version.cuda)}
    return found | versions(PACKAGES)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
