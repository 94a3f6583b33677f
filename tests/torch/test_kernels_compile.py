"""The kernels for Hopper compiled for it, without one: Triton's compiler and NVIDIA's assembler need no GPU."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from moebius.core.kernels import plan

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PRODUCT = ("rows_RD", "weight", "out_RF")
GRADIENT = ("rows_RD", "dout_RF", "dweight_eDF")
LAUNCHES = {
    "product": (plan.grouped_product(132, 8, 4096, 28672, False), PRODUCT),
    "product_transposed": (plan.grouped_product(132, 128, 1536, 2048, True), PRODUCT),
    "product_of_narrow": (plan.grouped_product(132, 1, 8, 16, False), PRODUCT),
    "weight_gradient": (plan.grouped_weight_gradient(132, 128, 2048, 1536), GRADIENT),
    "weight_gradient_of_narrow": (plan.grouped_weight_gradient(132, 3, 200, 328), GRADIENT),
    "list_tiles": (plan.list_tiles(128), ()),
}


def compiled(launch: plan.Launch, floating: tuple[str, ...], dtype: str) -> Any:
    file, name = launch.kernel.split(".")
    kernel = getattr(import_module(f"moebius.core.kernels.{file}"), name)
    signature = {
        argument: "constexpr"
        if argument in launch.constants
        else f"*{dtype}"
        if argument in floating
        else "i32"
        if argument == "R"
        else "*i32"
        for argument in kernel.arg_names
    }
    source: type[Any] = ASTSource
    if kernel.is_gluon():
        source = import_module("triton.experimental.gluon._runtime").GluonASTSource
    given = source(fn=kernel, signature=signature, constexprs=launch.constants)
    return triton.compile(given, target=GPUTarget("cuda", 90, 32), options=launch.options())


@pytest.mark.parametrize("name, dtype", [*((name, "bf16") for name in LAUNCHES), ("product", "fp16")])
def test_kernels_for_hopper_compile_without_spills_or_products_in_single_file(
    name: str, dtype: str, tmp_path: Path
) -> None:
    launch, floating = LAUNCHES[name]
    found = compiled(launch, floating, dtype)
    assert found.metadata.shared <= 232448, "bytes of shared memory that a program may have"
    source = tmp_path / "kernel.ptx"
    source.write_text(found.asm["ptx"])
    assembler = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(source), "-o", "/dev/null"]
    said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "serialized" not in said
    assert ("wgmma.mma_async" in found.asm["ptx"]) == launch.kernel.startswith("matmul")
