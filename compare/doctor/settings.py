"""The settings: what would make two correct frameworks disagree, or one of them starve or hang."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moebius.compare.doctor.machine import Machine
from moebius.compare.doctor.record import Row, Status
from moebius.compare.doctor.rounding import LARGEST_ERROR

SECTION = "setting"
_PINNED = "`moebius compare` pins it itself"
_TF32 = "NVIDIA_TF32_OVERRIDE"
_FALSE = ("0", "false")


def judge(machine: Machine) -> Iterator[Row]:
    """As far as the frameworks are here; the environment's own rows where a variable is set or ought to be."""
    for probe in ("torch", "jax"):
        yield from _unmeasured(machine, probe)
    if machine.fact("torch", "precision"):
        yield _torch_float32(machine)
        yield from _torch_bfloat16(machine)
    if machine.fact("jax", "precision"):
        yield _jax_float32(machine)
        yield _jax_rounding(machine)
        yield _jax_x64(machine)
    yield from _memory(machine)
    yield from _variables(machine)
    if machine.versions.get("torch") or machine.versions.get("jax"):
        yield _start_method(machine)
    if machine.versions.get("safetensors") == "0.8.0":
        yield _safetensors()


def _row(name: str, status: Status, detail: str, remedy: str = "", **facts: Any) -> Row:
    return Row(section=SECTION, name=name, status=status, detail=detail, remedy=remedy, facts=facts)


def _unmeasured(machine: Machine, probe: str) -> Iterator[Row]:
    """Where a framework imports and then cannot multiply."""
    answer = machine.answers.get(probe)
    trouble = answer.trouble("precision") if answer and not answer.trouble("import") else None
    if trouble:
        remedy = f"multiply two float32 matrices with {probe} alone and read what it says"
        yield _row(f"{probe}, float32 products", Status.BROKEN, f"cannot be measured: {trouble}", remedy)


def _torch_float32(machine: Machine) -> Row:
    facts = machine.fact("torch", "precision")
    rounded = [device for device, error in facts["product_error"].items() if error > LARGEST_ERROR]
    said = f"allow_tf32 {facts['allow_tf32']}, float32_matmul_precision {facts['float32_matmul_precision']}"
    name = "torch, float32 products"
    if rounded:
        pinned = "no setting of torch undoes NVIDIA_TF32_OVERRIDE" if _TF32 in machine.environment else _PINNED
        detail = f"rounded to TF32 or less on {', '.join(rounded)} ({said}): would spoil a comparison; {pinned}"
        remedy = f'unset {_TF32} and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE; torch.set_float32_matmul_precision("highest")'
        return _row(name, Status.WARNING, detail, remedy, **facts)
    return _row(name, Status.OK, f"float32, measured on {', '.join(facts['product_error'])} ({said})", **facts)


def _torch_bfloat16(machine: Machine) -> Iterator[Row]:
    """cuBLAS may add the parts of a long sum in bfloat16; a CPU has no such choice."""
    if not machine.fact("torch", "devices").get("gpus"):
        return
    name, setting = "torch, bfloat16 sums", "allow_bf16_reduced_precision_reduction"
    if machine.fact("torch", "precision")[setting]:
        detail = f"{setting} is on, torch's default: parts of a sum may be rounded; {_PINNED}"
        yield _row(name, Status.WARNING, detail, f"{setting} = False in torch.backends.cuda.matmul")
    else:
        yield _row(name, Status.OK, f"float32 ({setting} is off)")


def _jax_float32(machine: Machine) -> Row:
    facts, backend = machine.fact("jax", "precision"), machine.fact("jax", "devices").get("backend")
    name, said = "jax, float32 products", f"jax_default_matmul_precision {facts['default_matmul_precision']}"
    if facts["product_error"] > LARGEST_ERROR:
        detail = f"rounded to TF32 or less on {backend} ({said}): would spoil a comparison; {_PINNED}"
        remedy = 'jax.config.update("jax_default_matmul_precision", "highest")'
        return _row(name, Status.WARNING, detail, remedy, **facts)
    return _row(name, Status.OK, f"float32, measured on {backend} ({said})", **facts)


def _jax_rounding(machine: Machine) -> Row:
    name = "jax, 16-bit roundings"
    if machine.fact("jax", "precision")["keeps_16_bit_roundings"]:
        return _row(name, Status.OK, "kept under jit, measured")
    detail = "left out under jit between 16-bit steps: a bfloat16 result is then not torch's"
    return _row(name, Status.WARNING, detail, "XLA_FLAGS=--xla_allow_excess_precision=false")


def _jax_x64(machine: Machine) -> Row:
    if machine.fact("jax", "precision")["x64"]:
        detail = "on: arrays made without a dtype are float64 and int64, which they are not in torch"
        remedy = "unset JAX_ENABLE_X64; with jax.enable_x64(True) where it is needed"
        return _row("jax, x64", Status.WARNING, detail, remedy)
    return _row("jax, x64", Status.OK, "off: float64 arrays become float32, int64 ones int32")


def _memory(machine: Machine) -> Iterator[Row]:
    if machine.fact("jax", "devices").get("backend") != "gpu":
        return
    name, value = "jax, GPU memory", machine.environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower()
    share = machine.environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if value in _FALSE:
        yield _row(name, Status.OK, "taken as needed")
    elif share:
        yield _row(name, Status.OK, f"the share {share} is taken at the first operation")
    else:
        detail = "JAX takes three quarters at its first operation, also from torch in one process; `moebius` does not"
        yield _row(name, Status.WARNING, detail, "export XLA_PYTHON_CLIENT_PREALLOCATE=false")


def _variables(machine: Machine) -> Iterator[Row]:
    tf32 = machine.environment.get(_TF32)
    if tf32 == "0":
        yield _row(_TF32, Status.OK, "0: no library uses TF32, whatever is asked for")
    elif tf32:
        detail = f"{tf32}: NVIDIA's libraries use TF32 whatever is asked for; no setting of a framework undoes it"
        yield _row(_TF32, Status.WARNING, detail, f"unset {_TF32}")
    flags = machine.environment.get("XLA_FLAGS")
    if flags and any(f"{word}=true" in flags for word in ("fast_math", "excess_precision")):
        detail = f"{flags}: allows other roundings, which would spoil a comparison"
        yield _row("XLA_FLAGS", Status.WARNING, detail, "unset XLA_FLAGS")
    elif flags:
        yield _row("XLA_FLAGS", Status.OK, flags)


def _start_method(machine: Machine) -> Row:
    name, method = "multiprocessing", machine.start_method
    if method != "fork":
        return _row(name, Status.OK, f"starts by {method}")
    detail = "starts by fork: a child of a process in which torch or JAX has computed hangs at its first operation"
    remedy = 'multiprocessing.set_start_method("spawn"); of a DataLoader, multiprocessing_context="spawn"'
    return _row(name, Status.WARNING, detail, remedy)


def _safetensors() -> Row:
    detail = "0.8.0 writes NumPy and JAX arrays that are not C-contiguous with their values in another order"
    return _row("safetensors", Status.WARNING, detail, "numpy.ascontiguousarray before save_file; or another version")
