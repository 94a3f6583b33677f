"""Machines for `moebius doctor`: one without a fault, and what can be wrong with it. Nothing here asks this machine."""

from __future__ import annotations

from dataclasses import replace

from moebius.compare.doctor import command
from moebius.compare.doctor.machine import Machine
from moebius.compare.doctor.packages import PACKAGES
from moebius.compare.doctor.probe import Answer
from moebius.compare.doctor.record import Status


def healthy(**changes):
    """A machine with a GPU on which nothing is to be said; `changes` are fields of Machine."""
    rounding = {"product_error": 0.0}
    backend = {"needs": [], "missing": None, "unbuilt": False, "states": {"cpu float32": "chosen"}}
    rows = [{**backend, "operation": "grouped_matmul", "name": "loop"}]
    jax = {"backend": "gpu", "platforms": None, "devices": [{"platform": "gpu", "name": "H200"}], "why": None}
    answers = {
        "core": Answer(facts={"import": {"numpy": "2.4.6"}}),
        "gpus": Answer(facts={"gpus": [{"name": "H200", "driver_version": "580.1"}]}),
        "torch": Answer(
            facts={
                "import": {"version": "2.13.0", "cuda": "13.0"},
                "devices": {"gpus": [{"name": "H200", "capability": [9, 0], "memory": 1}], "cudnn": 9, "why": None},
                "precision": {
                    "float32_matmul_precision": "highest",
                    "allow_tf32": False,
                    "allow_bf16_reduced_precision_reduction": False,
                    "product_error": {"cpu": 0.0, "cuda": 0.0},
                },
                "backends": rows,
            }
        ),
        "jax": Answer(
            facts={
                "import": {"version": "0.10.2"},
                "devices": jax,
                "precision": {
                    "default_matmul_precision": "highest",
                    "x64": False,
                    "keeps_16_bit_roundings": True,
                    **rounding,
                },
                "backends": rows,
            }
        ),
        "both": Answer(facts={"torch": {}, "jax": jax}),
    }
    versions = {package.name: package.at_least for package in PACKAGES} | {"jax_cuda13_plugin": "0.10.2"}
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    fields = {"answers": answers, "versions": versions, "environment": environment, "python": "3.11.7"}
    return Machine(**{**fields, **changes})


def answered(probe, stage, **facts):
    """The healthy machine where one probe replied something else at one stage."""
    machine = healthy()
    before = machine.answers[probe]
    changed = replace(before, facts={**before.facts, stage: {**before.facts[stage], **facts}})
    return replace(machine, answers={**machine.answers, probe: changed})


def without(machine, *packages):
    """The machine where packages are not installed, and no probe imports them."""
    asked = {"torch": ("torch",), "jax": ("jax", "flax"), "both": ("torch", "jax")}
    answers = {name: a for name, a in machine.answers.items() if not set(asked.get(name, ())) & set(packages)}
    return replace(machine, answers=answers, versions=machine.versions | dict.fromkeys(packages))


def failed(machine, probe, failure, *stages):
    """The machine where a probe died after `stages`."""
    facts = {stage: machine.answers[probe].facts[stage] for stage in stages}
    return replace(machine, answers={**machine.answers, probe: Answer(facts=facts, failure=failure)})


def found(machine, section, name):
    """The one row of that name."""
    (row,) = (row for row in command.rows(machine) if (row.section, row.name) == (section, name))
    return row


def unwell(machine):
    """Names of the rows that are not ok."""
    return [row.name for row in command.rows(machine) if row.status != Status.OK]


CPU_JAX = {"backend": "cpu", "devices": [{"platform": "cpu", "name": "cpu"}], "why": "no cuDNN"}
NO_GPU = {"gpus": [], "cudnn": None, "why": None}


def with_backend(**changes):
    """The healthy machine whose PyTorch frontend has one more backend, of a package of its own."""
    backend = {
        "operation": "grouped_matmul",
        "name": "te",
        "needs": ["transformer_engine"],
        "missing": None,
        "unbuilt": False,
        "states": {"cpu bfloat16": "needs cuda", "cuda bfloat16": "available"},
    } | changes
    machine = healthy()
    torch = machine.answers["torch"]
    rows = [*torch.facts["backends"], backend]
    return replace(
        machine, answers={**machine.answers, "torch": replace(torch, facts={**torch.facts, "backends": rows})}
    )


TE = "torch.grouped_matmul.te"


TF32 = 4.9e-4
SETTINGS = {
    "torch, float32 products": answered("torch", "precision", product_error={"cpu": 0.0, "cuda": TF32}),
    "torch, bfloat16 sums": answered("torch", "precision", allow_bf16_reduced_precision_reduction=True),
    "jax, float32 products": answered("jax", "precision", product_error=TF32),
    "jax, 16-bit roundings": answered("jax", "precision", keeps_16_bit_roundings=False),
    "jax, x64": answered("jax", "precision", x64=True),
    "jax, GPU memory": healthy(environment={}),
    "NVIDIA_TF32_OVERRIDE": healthy(environment=healthy().environment | {"NVIDIA_TF32_OVERRIDE": "1"}),
    "XLA_FLAGS": healthy(environment=healthy().environment | {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}),
    "multiprocessing": healthy(start_method="fork"),
    "safetensors": healthy(versions=healthy().versions | {"safetensors": "0.8.0"}),
}
