"""Everything that is judged: what the probes answered, what is installed, and how the process was started."""

from __future__ import annotations

import multiprocessing
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moebius.compare.doctor.packages import CUDA_PLUGINS, PACKAGES, installed
from moebius.compare.doctor.probe import Answer, Probe, ask

_HERE = "moebius.compare.doctor"
FRONTENDS = {"torch": "moebius.torch_frontend", "jax": "moebius.jax_frontend"}
NEEDS = {"torch": ("torch",), "jax": ("jax", "flax"), "both": ("torch", "jax")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What was found, not yet judged.

    Attributes:
        answers: of the probes "core", "gpus", "torch", "jax", "both" and "frontend.operation.backend"; those that were
            not asked, because a package is missing, are absent.
        versions: package -> version, None where it is not installed.
        environment: variables of the process. python, system, start_method: of Python and its multiprocessing.
    """

    answers: Mapping[str, Answer] = field(default_factory=dict)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    system: str = ""
    start_method: str = "spawn"

    def fact(self, probe: str, stage: str) -> Any:
        """What a probe replied at a stage; {} where it did not."""
        answer = self.answers.get(probe)
        return answer.facts.get(stage, {}) if answer else {}

    @property
    def gpus(self) -> list[str]:
        """Names of the NVIDIA GPUs that the driver or torch sees."""
        seen = self.fact("gpus", "gpus") or self.fact("torch", "devices").get("gpus", [])
        return [gpu["name"] for gpu in seen]

    @property
    def hidden(self) -> bool:
        """Whether the environment keeps all GPUs from CUDA."""
        return self.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")

    @property
    def plugin(self) -> str | None:
        """The CUDA plugin of JAX that is installed."""
        return next((plugin for plugin in CUDA_PLUGINS if self.versions.get(plugin)), None)


def examine(*, timeout: float) -> Machine:
    """Look at this machine; `timeout` in seconds is for each of two rounds of probes."""
    versions = {name: installed(name) for name in [*(package.name for package in PACKAGES), *CUDA_PLUGINS]}
    first = {"core": Probe(module=f"{_HERE}.probe_core"), "gpus": Probe(module=f"{_HERE}.probe_gpus")}
    first |= {
        name: Probe(module=f"{_HERE}.probe_{name}")
        for name, needs in NEEDS.items()
        if all(versions[package] for package in needs)
    }
    answers = ask(first, timeout=timeout)
    answers |= ask(_loads(answers), timeout=timeout)
    return Machine(
        answers=answers,
        versions=versions,
        environment=dict(os.environ),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        # The first is the default; asking for the one in use would fix it for this process.
        start_method=multiprocessing.get_all_start_methods()[0],
    )


def ask_support(*, timeout: float) -> dict[str, Answer]:
    """Both frontends' answers to what their backends support, by frontend."""
    probes = {name: Probe(module=f"{_HERE}.probe_{name}", arguments=("support",)) for name in FRONTENDS}
    return ask(probes, timeout=timeout)


def ask_choice(sizes: tuple[int, ...], *, timeout: float) -> dict[str, Answer]:
    """Every installed frontend's answers to which backends it takes for a layer (E, K, D, I, T, ranks), and why."""
    arguments = ("explain", *map(str, sizes))
    probes = {
        name: Probe(module=f"{_HERE}.probe_{name}", arguments=arguments)
        for name in FRONTENDS
        if all(installed(package) for package in NEEDS[name])
    }
    return ask(probes, timeout=timeout)


def _loads(answers: Mapping[str, Answer]) -> dict[str, Probe]:
    """One probe for each backend that imports a package of its own: it may abort, and take no other backend with it."""
    found = {}
    for frontend in FRONTENDS:
        answer = answers.get(frontend, Answer())
        for backend in answer.facts.get("backends", ()):
            operation, name = backend["operation"], backend["name"]
            if backend["needs"] and not backend["missing"] and not backend["unbuilt"]:
                found[f"{frontend}.{operation}.{name}"] = Probe(
                    module=f"{_HERE}.probe_{frontend}", arguments=("load", operation, name)
                )
    return found
