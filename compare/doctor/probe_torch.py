"""Asks PyTorch: version, devices, what a float32 product is worth, and the backends of its frontend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moebius.compare.doctor.reply import reply
from moebius.compare.doctor.rounding import OPERAND, WIDTH, error_of


def main(question: str = "all", *arguments: str) -> None:
    """Reply to "all", to "support", to "load" of an operation's backend, or to "explain" of a layer."""
    questions: dict[str, dict[str, Callable[[], Any]]] = {
        "all": {"import": _import, "devices": _devices, "precision": _precision, "backends": _backends},
        "support": {"support": _support},
        "load": {"load": lambda: _load(*arguments)},
        "explain": {"explain": lambda: _explain(*arguments)},
    }
    reply(questions[question])


def _import() -> dict[str, Any]:
    import torch

    return {"version": str(torch.__version__), "cuda": torch.version.cuda}


def _devices() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": gpu.name, "capability": [gpu.major, gpu.minor], "memory": gpu.total_memory} for gpu in gpus],
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "why": None if gpus or torch.version.cuda is None else _why_no_gpu(),
    }


def _why_no_gpu() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "torch.cuda.device_count() is 0"


def _precision() -> dict[str, Any]:
    import torch

    matmul = torch.backends.cuda.matmul
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allow_tf32": matmul.allow_tf32,
        "allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "product_error": {device: _product_error(device) for device in devices},
    }


def _product_error(device: str) -> float:
    import torch

    a = torch.tensor(OPERAND, device=device, dtype=torch.float32).expand(WIDTH, WIDTH).contiguous()
    return error_of(float((a @ a)[0, 0]))


def _backends() -> list[dict[str, Any]]:
    import torch

    from moebius.compare.doctor.registries import states

    return states(_registries(), torch.cuda.get_device_capability() if torch.cuda.is_available() else None)


def _support() -> list[dict[str, Any]]:
    from moebius.compare.doctor.registries import support

    return support(_registries())


def _load(operation: str, name: str) -> dict[str, str]:
    from moebius.compare.doctor.registries import load

    return load(_registries(), operation, name)


def _explain(*sizes: str) -> dict[str, Any]:
    import torch

    from moebius.compare.doctor.registries import explain
    from moebius.torch_frontend.dispatch_choice import candidates

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return explain("torch", _registries()[:2], candidates, capability, tuple(map(int, sizes)))


def _registries() -> tuple[Any, ...]:
    from moebius.torch_frontend.dispatch import DISPATCHERS
    from moebius.torch_frontend.matmul import BACKENDS

    return BACKENDS, DISPATCHERS
