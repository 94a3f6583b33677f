"""The portable grouped products compiled for several GPUs, without one."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from moebius.core.kernels import plan_portable as plan
from moebius.core.kernels.plan import Launch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

FLOATING = ("rows_RD", "weight", "dout_RF", "out_RF", "dweight_eDF")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SHARED = {(8, 0): 163, (8, 9): 99, (9, 0): 227}  # KiB that a program may have
# What multiplies: tensor cores by warps, by warpgroups, or none.
PRODUCTS = ("mma.sync.aligned", "wgmma.mma_async", "fma.rn.f32")


def launched(what: str, widths: tuple[int, int], dtype: str, capability: tuple[int, int], **options: Any) -> Launch:
    options |= {"dtype": dtype, "capability": capability}
    if what == "weight_gradient":
        return plan.weight_gradient(8, *widths, **options)
    options.setdefault("height", plan.height(10**6, 8, dtype))
    return plan.product(10**6, 8, *widths, what == "transposed", **options)


def compiled(launch: Launch, dtype: str, capability: tuple[int, int]) -> Any:
    """As a launcher has it compiled: pointers are multiples of 16 bytes."""
    file, name = launch.kernel.split(".")
    kernel = getattr(import_module(f"moebius.core.kernels.{file}"), name)
    pointers = [argument for argument in kernel.arg_names if argument not in launch.constants]
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {argument: f"*{SHORT[dtype]}" if argument in FLOATING else "*i32" for argument in pointers}
    aligned = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=launch.constants, attrs=aligned)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options=launch.options())


def assembled(ptx: str, capability: tuple[int, int], folder: Path) -> str:
    """What NVIDIA's assembler says of the code."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    name = "sm_{}{}".format(*capability) + ("a" if capability >= (9, 0) else "")
    assembler = [
        get_ptxas(10 * capability[0] + capability[1]).path,
        "-v",
        f"--gpu-name={name}",
        str(source),
        "-o",
        "/dev/null",
    ]
    return subprocess.run(assembler, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("capability", SHARED, ids=str)
@pytest.mark.parametrize(
    ("what", "widths", "dtype"),
    [
        ("product", (2880, 5760), "bfloat16"),
        ("transposed", (1536, 2048), "float16"),
        ("weight_gradient", (2048, 1536), "bfloat16"),
        ("transposed", (701, 333), "bfloat16"),
        ("transposed", (1536, 2048), "float32"),
        ("weight_gradient", (2048, 1536), "float32"),
    ],
    ids=str,
)
def test_portable_kernels_compile_without_spills_within_the_shared_memory(
    what: str, widths: tuple[int, int], dtype: str, capability: tuple[int, int], tmp_path: Path
) -> None:
    found = compiled(launched(what, widths, dtype, capability), dtype, capability)
    assert found.metadata.shared <= SHARED[capability] * 1024
    assert "0 bytes spill stores, 0 bytes spill loads" in assembled(found.asm["ptx"], capability, tmp_path)
    # On Hopper three products of TF32's parts.
    serial = dtype == "float32" and (what, capability) != ("transposed", (9, 0))
    wanted = 2 if serial else 1 if capability >= (9, 0) else 0
    assert [name in found.asm["ptx"] for name in PRODUCTS] == [place == wanted for place in range(3)]


@pytest.mark.parametrize("height", [16, 32, 64])
def test_portable_product_of_low_tiles_compiles_without_spills(height: int, tmp_path: Path) -> None:
    found = compiled(launched("product", (2048, 1536), "bfloat16", (8, 0), height=height), "bfloat16", (8, 0))
    assert "0 bytes spill stores, 0 bytes spill loads" in assembled(found.asm["ptx"], (8, 0), tmp_path)


@pytest.mark.parametrize("what", ["product", "transposed", "weight_gradient"])
def test_portable_kernels_copy_whole_vectors_while_they_multiply(what: str) -> None:
    found = compiled(launched(what, (200, 328), "bfloat16", (8, 0)), "bfloat16", (8, 0))
    assert "cp.async.cg.shared.global" in found.asm["ptx"]  # the copies of 16 bytes; smaller ones are cp.async.ca
    assert "cp.async.ca.shared.global" not in found.asm["ptx"]


@pytest.mark.parametrize(("precision", "there"), [("ieee", False), ("tf32", True), ("tf32x3", True)])
def test_portable_product_rounds_float32_to_tf32_where_that_is_asked(precision: str, there: bool) -> None:
    launch = launched("product", (256, 256), "float32", (8, 0), precision=precision)
    assert (".tf32." in compiled(launch, "float32", (8, 0)).asm["ptx"]) == there
