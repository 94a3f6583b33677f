"""The packages: which are here, in which version, and which extra of this project brings the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moebius.compare.doctor.record import Row, Status

if TYPE_CHECKING:
    from moebius.compare.doctor.machine import Machine

SECTION = "package"


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """One package that moebius can use.

    Attributes:
        name: to import it and to install it.
        extra: the smallest extra of moebius that brings it; "" where moebius itself does.
        use: what it is for.
        at_least, below: the versions that moebius asks for.
        probe: the one that imports it, "" where none does.
    """

    name: str
    extra: str
    use: str
    at_least: str
    below: str = ""
    probe: str = ""

    @property
    def requirement(self) -> str:
        """As pip would be asked for it."""
        return f"{self.name}>={self.at_least}" + (f",<{self.below}" if self.below else "")


PACKAGES = (
    Package(name="numpy", extra="", use="moebius.core", at_least="2.0", probe="core"),
    Package(name="torch", extra="torch", use="the PyTorch frontend", at_least="2.10", probe="torch"),
    Package(name="jax", extra="jax", use="the Flax frontend", at_least="0.10", below="0.12", probe="jax"),
    Package(name="flax", extra="jax", use="the Flax frontend", at_least="0.12"),
    Package(name="safetensors", extra="compare", use="moebius compare", at_least="0.7"),
    Package(name="transformers", extra="compare", use="moebius compare", at_least="5.17"),
    Package(name="typer", extra="compare", use="moebius compare", at_least="0.15"),
    Package(name="rich", extra="compare", use="moebius compare, tables", at_least="13"),
    Package(name="matplotlib", extra="compare", use="moebius compare, figures", at_least="3.9"),
    Package(name="threadpoolctl", extra="compare", use="moebius compare", at_least="3.5"),
)
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# (frontend, package that a backend needs) -> the smallest extra that brings it.
EXTRAS = {
    ("torch", "triton"): "gpu",
    ("torch", "transformer_engine"): "te-torch",
    ("jax", "triton"): "tokamax",
    ("jax", "tokamax"): "tokamax",
    ("jax", "jax_triton"): "tokamax",
    ("jax", "transformer_engine"): "te-jax",
}
# Package -> the first Python on which its extra brings it.
PYTHONS = {"tokamax": "3.12", "jax_triton": "3.12"}
# Package -> how it comes beside a version of PyTorch with which no resolver takes it.
BESIDE = {"jax_triton": "beside torch 2.11, which pins triton 3.6, pip install --no-deps 'jax-triton>=0.4.1'"}

# PyPI's build brings gigabytes of CUDA libraries.
_CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def installed(name: str) -> str | None:
    """Version of a package, "unknown" where it has no metadata, None where it cannot be imported. Imports nothing."""
    try:
        if find_spec(name) is None:
            return None
    except (ImportError, ValueError):  # a finder that refuses; a module without a spec
        return None
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def install(extra: str) -> str:
    """The line that brings an extra."""
    return f"pip install '.[{extra}]' in a clone of moebius" if extra else "pip install . in a clone of moebius"


def _bring(package: Package, machine: Machine) -> str:
    if package.name == "torch" and not machine.gpus:
        return f"without a GPU first {_CPU_TORCH}; then {install(package.extra)}"
    return install(package.extra)


def brings(frontend: str, package: str) -> str:
    """What to do for a package that a backend needs."""
    extra, python = EXTRAS.get((frontend, package)), PYTHONS.get(package)
    if extra is None:
        return f"install {package}; no extra of moebius brings it"
    how = f"{install(extra)}, on Python {python} or later" if python else install(extra)
    return f"{how}; {BESIDE[package]}" if package in BESIDE else how


def judge(machine: Machine) -> Iterator[Row]:
    """Python, moebius, the packages of the table, and JAX's CUDA plugin where there is a GPU."""
    yield Row(section=SECTION, name="python", status=Status.OK, version=machine.python, detail=machine.system)
    yield _moebius(machine)
    for package in PACKAGES:
        yield _package(machine, package)
    if machine.gpus and machine.versions.get("jax"):
        yield _plugin(machine)


def _moebius(machine: Machine) -> Row:
    from moebius import __version__

    answer = machine.answers.get("core")
    trouble = answer.trouble("import") if answer else "it was not asked"
    status = Status.BROKEN if trouble else Status.OK
    remedy = "pip install . in a clone of moebius, into a fresh environment" if trouble else ""
    return Row(
        section=SECTION, name="moebius", status=status, version=__version__, detail=trouble or "core", remedy=remedy
    )


def _package(machine: Machine, package: Package) -> Row:
    found = machine.versions.get(package.name)
    if found is None:
        needed = Status.MISSING if package.extra else Status.BROKEN
        detail, remedy = f"not installed; for {package.use}", _bring(package, machine)
        return Row(section=SECTION, name=package.name, status=needed, detail=detail, remedy=remedy)
    answer = machine.answers.get(package.probe)
    trouble = answer.trouble("import") if answer else None
    status, detail, remedy = Status.OK, "", ""
    if trouble:
        status, detail = Status.BROKEN, f"cannot be imported: {trouble}"
        remedy = f"{_bring(package, machine)}, into a fresh environment"
    elif not _within(found, package):
        status, detail = Status.WARNING, f"moebius asks for {package.requirement}"
        remedy = _bring(package, machine)
    return Row(section=SECTION, name=package.name, status=status, version=found, detail=detail, remedy=remedy)


def _plugin(machine: Machine) -> Row:
    name = machine.plugin
    if name is None:
        detail = "not installed; without it JAX computes on the CPU, and a GPU is here"
        return Row(section=SECTION, name=CUDA_PLUGINS[0], status=Status.MISSING, detail=detail, remedy=install("gpu"))
    return Row(section=SECTION, name=name, status=Status.OK, version=machine.versions[name] or "")


def _within(found: str, package: Package) -> bool:
    if found == "unknown":
        return True
    number = _number(found)
    return number >= _number(package.at_least) and (not package.below or number < _number(package.below))


def _number(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu": enough to compare with the versions of the table."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
