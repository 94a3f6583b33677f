"""What `moebius doctor` says of machines with a fault each: packages, devices, backends, settings."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from patients import CPU_JAX, NO_GPU, SETTINGS, TE, answered, failed, found, healthy, unwell, with_backend, without

from moebius.compare.doctor.packages import EXTRAS, PACKAGES, brings
from moebius.compare.doctor.probe import Answer
from moebius.compare.doctor.record import Report, Row, Status

ROOT = Path(__file__).parents[2]


def test_rows_of_a_healthy_machine_are_all_ok():
    assert unwell(healthy()) == []


def test_row_is_found_by_its_name_or_the_end_of_it():
    rows = (
        Row(section="backend", name="torch.dispatch.te", status=Status.OK),
        Row(section="setting", name="te", status=Status.OK),
    )
    report = Report(moebius="", rows=rows)
    assert report.named("te") == report.named("dispatch.te") == [rows[0]]
    assert report.named("e") == report.named("torch") == []


# ------------------------------------------------------------------------------------------------------------- packages
@pytest.mark.parametrize(
    "package", [package for package in PACKAGES if package.extra], ids=lambda package: package.name
)
def test_package_that_is_missing_names_the_extra_that_brings_it(package):
    row = found(without(healthy(), package.name), "package", package.name)
    assert row.status == Status.MISSING and f"pip install '.[{package.extra}]'" in row.remedy
    assert Report(moebius="", rows=(row,)).passed


def test_package_torch_missing_without_a_gpu_names_the_cpu_wheels_first():
    machine = without(answered("torch", "devices", **NO_GPU), "torch")
    machine = replace(machine, answers=machine.answers | {"gpus": Answer(facts={"gpus": []})})
    assert found(machine, "package", "torch").remedy.startswith("without a GPU first pip install torch --index-url")
    assert found(without(healthy(), "torch"), "package", "torch").remedy.startswith("pip install '.[torch]'")


def test_package_numpy_missing_is_broken():
    assert found(without(healthy(), "numpy"), "package", "numpy").status == Status.BROKEN


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("torch", "2.9.1", Status.WARNING),
        ("torch", "2.10", Status.OK),
        ("torch", "2.13.0+cpu", Status.OK),
        ("jax", "0.9.2", Status.WARNING),
        ("jax", "0.12.0.1", Status.WARNING),
        ("jax", "0.11.9", Status.OK),
        ("rich", "15.0.0", Status.OK),
        ("rich", "unknown", Status.OK),
    ],
)
def test_package_of_another_version_than_asked_for_warns(name, version, status):
    row = found(healthy(versions=healthy().versions | {name: version}), "package", name)
    assert (row.status, row.version) == (status, version)


def test_package_whose_import_aborts_is_broken_and_the_rest_is_told():
    machine = failed(healthy(), "torch", "ended by SIGABRT at 'import'")
    row = found(machine, "package", "torch")
    assert row.status == Status.BROKEN and "SIGABRT" in row.detail and row.remedy
    assert found(machine, "device", "torch").status == Status.BROKEN
    assert found(machine, "backend", "torch_frontend").status == Status.BROKEN
    assert found(machine, "package", "jax").status == Status.OK


def test_package_moebius_whose_core_does_not_import_is_broken():
    row = found(failed(healthy(), "core", "ended with code 1"), "package", "moebius")
    assert row.status == Status.BROKEN and row.detail == "ended with code 1" and row.remedy


def test_package_plugin_of_jax_missing_beside_a_gpu_names_the_extra():
    row = found(healthy(versions=healthy().versions | {"jax_cuda13_plugin": None}), "package", "jax_cuda13_plugin")
    assert row.status == Status.MISSING and "'.[gpu]'" in row.remedy


def test_packages_and_extras_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    always = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package in PACKAGES:
        assert package.requirement in (extras[package.extra] if package.extra else always)
    for (frontend, package), extra in EXTRAS.items():
        named = package.replace("_", "-")
        assert any(re.match(rf"{named}\b", line) for line in extras[extra]), package
        assert any(re.search(rf"moebius\[.*{frontend}.*\]", line) for line in extras[extra]), frontend


@pytest.mark.parametrize("frontend, package", EXTRAS)
def test_extra_that_brings_a_package_on_some_pythons_alone_says_on_which(frontend, package):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extra = EXTRAS[frontend, package]
    (line,) = (line for line in extras[extra] if re.match(rf"{package.replace('_', '-')}\b[^-]", line))
    bound = re.search(r"python_version >= '([\d.]+)'", line)
    end = f", on Python {bound[1]} or later" if bound else ""
    assert brings(frontend, package).split("; ")[0] == f"pip install '.[{extra}]' in a clone of moebius{end}"


def test_package_that_no_resolver_takes_beside_a_torch_says_how_it_comes():
    pins = dict(
        line.split("==") for line in (ROOT / "constraints/py312-gpu.txt").read_text().splitlines() if "==" in line
    )
    torch, triton = (".".join(pins[name].split(".")[:2]) for name in ("torch", "triton"))
    said = f"beside torch {torch}, which pins triton {triton}, pip install --no-deps 'jax-triton>={pins['jax-triton']}'"
    assert brings("jax", "jax_triton").split("; ")[1] == said
    from moebius.jax_frontend.matmul import BACKENDS

    for name in ("triton", "tokamax"):
        install = BACKENDS[name].install
        assert f"beside torch {torch}, which pins triton {triton}" in install and "--no-deps" in install
        assert "Python 3.12 and jax 0.11.1" in install


# -------------------------------------------------------------------------------------------------------------- devices
@pytest.mark.parametrize(
    ("probe", "stage", "name"), [("jax", "devices", "jax"), ("both", "jax", "jax after torch")], ids=["alone", "both"]
)
def test_device_jax_that_fell_back_to_the_cpu_warns_with_its_reason(probe, stage, name):
    machine = answered(probe, stage, **CPU_JAX)
    row = found(machine, "device", name)
    assert row.status == Status.WARNING and "fell back to the CPU" in row.detail and "no cuDNN" in row.detail
    assert "JAX_PLATFORMS=cuda" in row.remedy and ("import torch before jax" in row.remedy) == (name == "jax")
    assert unwell(machine) == [name]


@pytest.mark.parametrize("seen_by", ["gpus", "torch"])
def test_device_jax_that_fell_back_is_seen_by_the_driver_or_by_torch_alone(seen_by):
    machine = answered("jax", "devices", **CPU_JAX)
    if seen_by == "torch":
        machine = replace(machine, answers={**machine.answers, "gpus": Answer(facts={"gpus": []})})
    else:
        machine = without(machine, "torch")
    assert "fell back" in found(machine, "device", "jax").detail


@pytest.mark.parametrize(
    "environment", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}], ids=["empty", "-1"]
)
def test_device_gpu_that_is_hidden_is_no_warning(environment):
    machine = replace(answered("jax", "devices", **CPU_JAX), environment=environment)
    row = found(machine, "device", "jax")
    assert row.status == Status.OK and "hides" in row.detail


def test_device_jax_on_the_cpu_as_asked_is_no_warning():
    row = found(answered("jax", "devices", **CPU_JAX, platforms="cpu"), "device", "jax")
    assert row.status == Status.OK and "JAX_PLATFORMS=cpu" in row.detail


def test_device_no_gpu_at_all_is_no_warning():
    machine = answered("jax", "devices", **CPU_JAX)
    torch = replace(machine.answers["torch"], facts={**machine.answers["torch"].facts, "devices": NO_GPU})
    answers = {"both": Answer(facts={"torch": {}, "jax": {**CPU_JAX, "platforms": None}})}
    machine = replace(
        machine, answers={**machine.answers, "gpus": Answer(facts={"gpus": []}), "torch": torch, **answers}
    )
    assert unwell(machine) == []
    assert found(machine, "device", "NVIDIA driver").detail == "no NVIDIA GPU here"


def test_device_jax_without_a_plugin_beside_a_gpu_says_what_brings_it():
    machine = answered("jax", "devices", **CPU_JAX)
    row = found(replace(machine, versions=machine.versions | {"jax_cuda13_plugin": None}), "device", "jax")
    assert row.status == Status.WARNING and "plugin" in row.detail and "'.[gpu]'" in row.remedy


def test_device_torch_build_for_the_cpu_beside_a_gpu_warns():
    machine = answered("torch", "devices", **NO_GPU)
    machine = replace(
        machine,
        answers={
            **machine.answers,
            "torch": replace(
                machine.answers["torch"],
                facts={**machine.answers["torch"].facts, "import": {"version": "2.13.0+cpu", "cuda": None}},
            ),
        },
    )
    row = found(machine, "device", "torch")
    assert row.status == Status.WARNING and "CPU build" in row.detail and "'.[gpu]'" in row.remedy


def test_device_torch_that_sees_no_gpu_gives_its_reason():
    row = found(answered("torch", "devices", gpus=[], why="driver too old"), "device", "torch")
    assert row.status == Status.WARNING and "driver too old" in row.detail and row.remedy


def test_device_driver_that_does_not_load_is_broken():
    machine = healthy()
    gpus = Answer(errors={"gpus": "OSError: nvidia-smi: driver/library version mismatch"})
    row = found(replace(machine, answers={**machine.answers, "gpus": gpus}), "device", "NVIDIA driver")
    assert row.status == Status.BROKEN and "mismatch" in row.detail and row.remedy


def test_device_frameworks_for_two_cudas_warn():
    versions = healthy().versions | {"jax_cuda13_plugin": None, "jax_cuda12_plugin": "0.10.2"}
    row = found(healthy(versions=versions), "device", "CUDA libraries")
    assert row.status == Status.WARNING and "13.0" in row.detail and "jax_cuda12_plugin" in row.detail


def test_device_whose_probe_dies_there_is_broken_with_the_package_ok():
    machine = failed(healthy(), "jax", "ended by SIGSEGV at 'devices'", "import")
    assert found(machine, "package", "jax").status == Status.OK
    assert "SIGSEGV" in found(machine, "device", "jax").detail
    assert found(machine, "setting", "jax, float32 products").status == Status.BROKEN


# ------------------------------------------------------------------------------------------------------------- backends
def test_backend_that_is_available_says_for_what():
    row = found(with_backend(), "backend", TE)
    assert row.status == Status.OK and row.detail == "cpu: needs cuda; cuda: available"
    assert row.facts["states"] == {"cpu bfloat16": "needs cuda", "cuda bfloat16": "available"}


def test_backend_whose_package_is_missing_names_the_extra():
    row = found(with_backend(missing="not installed: transformer_engine"), "backend", TE)
    assert row.status == Status.MISSING and "pip install '.[te-torch]'" in row.remedy


def test_backend_that_no_extra_brings_names_the_package():
    row = found(with_backend(needs=["deep_ep"], missing="not installed: deep_ep"), "backend", TE)
    assert "deep_ep" in row.remedy and "no extra" in row.remedy


def test_backend_whose_import_aborts_is_broken_and_the_others_stay():
    machine = with_backend()
    loaded = Answer(failure="ended by SIGABRT at 'load'")
    machine = replace(machine, answers={**machine.answers, TE: loaded})
    row = found(machine, "backend", TE)
    assert row.status == Status.BROKEN and "SIGABRT" in row.detail and row.remedy
    assert found(machine, "backend", "torch.grouped_matmul.loop").status == Status.OK


def test_backend_that_says_how_it_computes_here_is_quoted():
    machine = with_backend()
    loaded = Answer(facts={"load": {"says": "bfloat16 takes V1: cuBLASLt 13.1.0 is loaded"}})
    row = found(replace(machine, answers={**machine.answers, TE: loaded}), "backend", TE)
    assert row.status == Status.OK
    assert row.detail == "cpu: needs cuda; cuda: available; bfloat16 takes V1: cuBLASLt 13.1.0 is loaded"
    silent = Answer(facts={"load": {"says": ""}})
    row = found(replace(machine, answers={**machine.answers, TE: silent}), "backend", TE)
    assert row.detail == "cpu: needs cuda; cuda: available"


def test_backend_that_serves_nothing_here_says_why():
    row = found(with_backend(states={"cpu bfloat16": "needs a GPU"}), "backend", TE)
    assert row.status == Status.UNSUPPORTED and "needs a GPU" in row.detail


def test_backend_of_a_later_version_is_unbuilt():
    assert found(with_backend(unbuilt=True), "backend", TE).status == Status.UNBUILT


def test_backend_described_tells_chosen_available_and_refused_apart():
    refused = {"cpu float64": "no float64", "cpu float32": "chosen", "cpu float16": "available"}
    words = "chosen for float32; available for float16; float64: no float64"
    assert found(with_backend(states=refused), "backend", TE).detail == f"cpu: {words}"
    both = refused | {key.replace("cpu", "cuda"): state for key, state in refused.items()}
    assert found(with_backend(states=both), "backend", TE).detail == f"cpu, cuda: {words}"


@pytest.mark.parametrize(("package", "frontend"), [("torch", "torch"), ("jax", "jax"), ("flax", "jax")])
def test_backend_frontend_whose_framework_is_missing_is_one_row(package, frontend):
    row = found(without(healthy(), package), "backend", f"{frontend}_frontend")
    assert row.status == Status.MISSING and package in row.detail and f"'.[{frontend}]'" in row.remedy


# ------------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("name", SETTINGS)
def test_setting_that_would_spoil_something_warns_and_nothing_else_does(name):
    row = found(SETTINGS[name], "setting", name)
    assert row.status == Status.WARNING and row.detail and row.remedy
    assert unwell(SETTINGS[name]) == [name]


@pytest.mark.parametrize("name", ["torch, float32 products", "torch, bfloat16 sums", "jax, float32 products"])
def test_setting_of_precision_says_that_compare_pins_it(name):
    assert "`moebius compare` pins it itself" in found(SETTINGS[name], "setting", name).detail


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("NVIDIA_TF32_OVERRIDE", "0", "NVIDIA_TF32_OVERRIDE"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=2", "XLA_FLAGS"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", ".3", "jax, GPU memory"),
    ],
)
def test_setting_of_the_environment_that_does_no_harm_is_ok(variable, value, name):
    row = found(healthy(environment={variable: value}), "setting", name)
    assert row.status == Status.OK and value in row.detail
