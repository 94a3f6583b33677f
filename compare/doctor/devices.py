"""The devices: what the driver, PyTorch and JAX each see, and whether they see the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from moebius.compare.doctor.machine import Machine
from moebius.compare.doctor.packages import install
from moebius.compare.doctor.record import Row, Status

SECTION = "device"
_FALLBACK_REMEDY = (
    "compare `pip list` for nvidia-cudnn and jax's plugin with constraints/; "
    "JAX_PLATFORMS=cuda turns the fallback into an error that says why"
)


def judge(machine: Machine) -> Iterator[Row]:
    """The driver; then PyTorch, JAX, and JAX after torch, as far as they are installed."""
    yield _driver(machine)
    for name, row in (("torch", _torch), ("jax", _jax), ("both", _both)):
        if name in machine.answers:
            yield row(machine)
    if machine.plugin and machine.fact("torch", "import").get("cuda"):
        yield _cuda(machine)


def _row(name: str, status: Status, detail: str, remedy: str = "", **facts: Any) -> Row:
    return Row(section=SECTION, name=name, status=status, detail=detail, remedy=remedy, facts=facts)


def _driver(machine: Machine) -> Row:
    name, answer = "NVIDIA driver", machine.answers.get("gpus")
    trouble = answer.trouble("gpus") if answer else None
    gpus = machine.fact("gpus", "gpus") or []
    if trouble:
        return _row(name, Status.BROKEN, trouble, "run nvidia-smi; load or update the driver")
    if not gpus:
        return _row(name, Status.OK, "no NVIDIA GPU here", gpus=[])
    detail = f"{_counted(machine.gpus)}, driver {gpus[0].get('driver_version')}"
    return _row(name, Status.OK, detail, gpus=gpus)


def _torch(machine: Machine) -> Row:
    trouble = _trouble(machine, "torch", "devices", "import")
    if trouble:
        return _row("torch", Status.BROKEN, trouble, _broken_remedy(machine, "torch"))
    facts, cuda = machine.fact("torch", "devices"), machine.fact("torch", "import").get("cuda")
    if facts["gpus"]:
        names = [f"{gpu['name']} ({'.'.join(map(str, gpu['capability']))})" for gpu in facts["gpus"]]
        return _row("torch", Status.OK, f"cuda: {_counted(names)}; CUDA {cuda}, cuDNN {facts['cudnn']}", **facts)
    if not machine.gpus or machine.hidden:
        return _row("torch", Status.OK, f"cpu{_why_hidden(machine)}", **facts)
    if cuda is None:
        detail = "cpu: this is torch's CPU build, and a GPU is here"
        return _row("torch", Status.WARNING, detail, install("gpu"), **facts)
    detail = f"cpu, although torch is built for CUDA {cuda}: {facts['why']}"
    return _row("torch", Status.WARNING, detail, "update the driver, or install a torch for an older CUDA", **facts)


def _jax(machine: Machine) -> Row:
    return _of_jax(machine, "jax", "jax", "devices")


def _both(machine: Machine) -> Row:
    return _of_jax(machine, "jax after torch", "both", "jax")


def _of_jax(machine: Machine, name: str, probe: str, stage: str) -> Row:
    trouble = _trouble(machine, probe, stage, "torch" if probe == "both" else "import")
    if trouble:
        return _row(name, Status.BROKEN, trouble, _broken_remedy(machine, "jax"))
    facts = machine.fact(probe, stage)
    if facts["backend"] != "cpu":
        kinds = _counted([device["name"] for device in facts["devices"]])
        return _row(name, Status.OK, f"{facts['backend']}: {kinds}", **facts)
    if not machine.gpus or machine.hidden:
        return _row(name, Status.OK, f"cpu{_why_hidden(machine)}", **facts)
    if (facts["platforms"] or "").split(",")[0] == "cpu":
        return _row(name, Status.OK, f"cpu, as JAX_PLATFORMS={facts['platforms']} asks", **facts)
    if machine.plugin is None:
        detail = "cpu: no CUDA plugin of JAX is installed, and a GPU is here"
        return _row(name, Status.WARNING, detail, install("gpu"), **facts)
    why = "; ".join(text for text in (facts["why"], machine.answers[probe].said) if text) or "JAX does not say why"
    detail = f"fell back to the CPU, although {machine.plugin} is installed and a GPU is here: {why}"
    first = "" if probe == "both" else "import torch before jax, as moebius does; "
    return _row(name, Status.WARNING, detail, first + _FALLBACK_REMEDY, **facts)


def _cuda(machine: Machine) -> Row:
    """Both frameworks bring their own copies of NVIDIA's libraries, and one process can load one of each."""
    torch_cuda, plugin = machine.fact("torch", "import")["cuda"], machine.plugin or ""
    of_jax = plugin.removeprefix("jax_cuda").removesuffix("_plugin")
    detail = f"torch for CUDA {torch_cuda}, {plugin} {machine.versions[plugin]}"
    if torch_cuda.split(".")[0] == of_jax:
        return _row("CUDA libraries", Status.OK, detail)
    remedy = f"install torch and JAX for the same CUDA: {install('gpu')}"
    return _row("CUDA libraries", Status.WARNING, f"{detail}: two majors in one process", remedy)


def _trouble(machine: Machine, probe: str, stage: str, first: str) -> str | None:
    """Why a stage has no facts; said once, at the package, where its import is what failed."""
    trouble = machine.answers[probe].trouble(stage)
    if trouble and machine.answers[probe].trouble(first) and probe != "both":
        return "cannot be imported: see the package"
    return trouble


def _broken_remedy(machine: Machine, framework: str) -> str:
    brings = install("gpu" if machine.gpus else framework)
    return f"import {framework} alone in a shell and read what it says; {brings}, into a fresh environment"


def _why_hidden(machine: Machine) -> str:
    return ": CUDA_VISIBLE_DEVICES hides the GPU" if machine.gpus and machine.hidden else ""


def _counted(names: list[str]) -> str:
    counts: Mapping[str, int] = Counter(names)
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())
