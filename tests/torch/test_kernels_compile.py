"""The kernels for Hopper compiled for it, without one: Triton's compiler and NVIDIA's assembler need no GPU."""

from __future__ import annotations

import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from moebius.core.activations import ACTIVATIONS
from moebius.core.kernels import plan, plan_hopper, plan_portable

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

SWIGLU, OAI, RELU2, PAIRS = (ACTIVATIONS[name] for name in ("swiglu", "swigluoai", "relu2", "quick_geglu"))
LAUNCHES = {
    "product": plan_hopper.product(132, 4096, 28672, False),
    "product_transposed": plan_hopper.product(132, 1536, 2048, True),
    "product_of_few_rows": plan_hopper.product(132, 2048, 768, False, True),
    "product_of_few_rows_transposed": plan_hopper.product(132, 28672, 4096, True, True),
    "product_of_narrow": plan_hopper.product(132, 8, 16, False),
    "weight_gradient": plan_hopper.weight_gradient(132, 128, 2048, 1536),
    "weight_gradient_of_narrow": plan_hopper.weight_gradient(132, 3, 200, 328),
    "activated_product": plan_hopper.activated_product(132, 2048, 768, SWIGLU, False, True),
    "activated_product_clamped_biased": plan_hopper.activated_product(132, 2880, 2880, OAI, True, True),
    "activated_product_of_few_rows": plan_hopper.activated_product(132, 2048, 768, SWIGLU, False, True, True),
    "activated_product_of_pairs": plan_hopper.activated_product(132, 2880, 2880, PAIRS, False, True),
    "activated_product_of_pairs_biased": plan_hopper.activated_product(132, 2880, 2880, PAIRS, True, True),
    "activated_product_of_pairs_of_few_rows": plan_hopper.activated_product(132, 200, 328, PAIRS, True, True, True),
    "activated_product_of_one_half_of_few_rows": plan_hopper.activated_product(132, 200, 328, RELU2, True, True, True),
    "activated_product_of_one_half": plan_hopper.activated_product(132, 200, 328, RELU2, False, False),
    "differentiated_product": plan_hopper.differentiated_product(132, 2048, 768, SWIGLU),
    "differentiated_product_clamped": plan_hopper.differentiated_product(132, 2880, 2880, OAI),
    "differentiated_product_of_pairs": plan_hopper.differentiated_product(132, 2048, 768, PAIRS),
    "differentiated_product_of_pairs_clamped": plan_hopper.differentiated_product(132, 2880, 2880, PAIRS),
    "differentiated_product_of_pairs_of_long": plan_hopper.differentiated_product(132, 4096, 2880, PAIRS),
    "differentiated_product_of_one_half": plan_hopper.differentiated_product(132, 200, 328, RELU2),
    "list_tiles": plan_portable.list_tiles(128, plan_hopper.HEIGHT),
}
FLOAT32 = ("row_weights_R", "dots_RB")
INTEGERS = ("tiles_Q4", "starts_e", "group_sizes_e")


def compiled(launch: plan.Launch, dtype: str) -> Any:
    file, name = launch.kernel.split(".")
    kernel = getattr(import_module(f"moebius.core.kernels.{file}"), name)
    descriptors = dict(zip(kernel.arg_names, (described(block, dtype) for block in launch.blocks), strict=False))
    signature = {
        argument: "constexpr"
        if argument in launch.constants
        else descriptors.get(argument)
        or ("*fp32" if argument in FLOAT32 else "*i32" if argument in INTEGERS else f"*{dtype}")
        for argument in kernel.arg_names
    }
    pointers = [(place,) for place, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {place: [["tt.divisibility", 16]] for place in pointers}
    source: type[Any] = ASTSource
    if kernel.is_gluon():
        source = import_module("triton.experimental.gluon._runtime").GluonASTSource
    given = source(fn=kernel, signature=signature, constexprs=launch.constants, attrs=attributes)
    return triton.compile(given, target=GPUTarget("cuda", 90, 32), options=launch.options())


def described(block: tuple[int, ...], dtype: str) -> str:
    language = import_module("triton.experimental.gluon.language")
    layout = language.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return f"tensordesc<{dtype}{list(block)},{layout!r}>"


@pytest.mark.parametrize("name, dtype", [*((name, "bf16") for name in LAUNCHES), ("product", "fp16")])
def test_kernels_for_hopper_compile_without_spills_or_products_in_single_file(
    name: str, dtype: str, tmp_path: Path
) -> None:
    launch = LAUNCHES[name]
    found = compiled(launch, dtype)
    assert found.metadata.shared <= 232448, "bytes of shared memory that a program may have"
    source = tmp_path / "kernel.ptx"
    source.write_text(found.asm["ptx"])
    assembler = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", "/dev/null"]
    said = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "serialized" not in said
    assert found.metadata.global_scratch_size == 0, "whoever launches it would have to find memory for it"
    assert ("wgmma.mma_async" in found.asm["ptx"]) == ("hopper" in launch.kernel)
