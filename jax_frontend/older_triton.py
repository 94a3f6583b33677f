"""What lies between jax-triton 0.4.1, tokamax 0.0.17, Triton 3.6, which comes with torch 2.11, and moebius' kernels.

The first two are written for Triton 3.7: without `name_tf32` and `unpack_strides` their kernels fail on 3.6; on a newer
Triton nothing is changed. `take_gluon` is for every Triton.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from moebius.core.errors import BackendUnavailable


def name_tf32() -> None:
    """Give Triton's driver a name that jax-triton imports from it; to be called before jax-triton is imported.

    Without it jax-triton takes its NVIDIA half for absent, says nothing, and fails in the first kernel. The number is
    CUDA's for a TF32 tensor map, read for TMA descriptors of that type alone, of which no kernel here has any.
    """
    driver: Any = import_module("triton.backends.nvidia.driver")
    if not hasattr(driver, "TMA_TF32"):
        driver.TMA_TF32 = 11


def unpack_strides() -> None:
    """Let tokamax's kernels unpack the strides that they are handed as tuples.

    Triton 3.6 unpacks its own tuples alone ("cannot convert (0, 0) of type <class 'tuple'> to tensor"). tokamax's
    module sees another `jt.triton_call`, which makes Triton's of Python's; jax-triton is left alone.
    """
    triton, jax_triton = import_module("triton"), import_module("jax_triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    language: Any = import_module("triton.language")

    def own(value: Any) -> Any:
        return language.tuple([own(item) for item in value]) if isinstance(value, tuple) else language.constexpr(value)

    def triton_call(*args: Any, **settings: Any) -> Any:
        strides = {name: own(value) for name, value in settings.items() if name.endswith("strides")}
        return jax_triton.triton_call(*args, **settings | strides)

    module: Any = import_module("tokamax._src.ops.ragged_dot.triton")
    module.jt = SimpleNamespace(triton_call=triton_call, strides_from_shape=jax_triton.strides_from_shape)


def check_jax_triton() -> None:
    """jax-triton has its NVIDIA half.

    Raises:
        BackendUnavailable: it was imported before `name_tf32`.
    """
    import_module("jax_triton")
    compiler = import_module("triton.backends.nvidia.compiler")
    if getattr(sys.modules.get("jax_triton.triton_lib"), "cb", compiler) is not compiler:
        raise BackendUnavailable(
            "jax-triton's NVIDIA kernels",
            "jax_triton was imported first, and replaced its NVIDIA half by stubs: this triton lacks TMA_TF32",
            "install triton>=3.7, or import moebius' backend (one call on a GPU) before jax_triton",
        )


def take_gluon() -> None:
    """Have jax-triton compile and launch kernels written in Gluon as Triton itself does.

    It hands them to the compiler as if Triton had laid them out, which lays some of it out anew, and launches as many
    warps as their first task has. Kernels of Triton are compiled and launched as before.
    """
    library: Any = import_module("jax_triton.triton_lib")
    if isinstance(library.triton_kernel_call_lib, _Counting):
        return
    library.triton_kernel_call_lib = _Counting(library.triton_kernel_call_lib)
    compiled = library.compile_ttir_to_ptx_inplace

    def compile_either(module: Any, backend: Any, *rest: Any) -> Any:
        # What Gluon made says from the first how many warps it is for.
        return compiled(module, backend if module.get_int_attr("ttg.num-warps") is None else _Gluon(backend), *rest)

    library.compile_ttir_to_ptx_inplace = compile_either


class _Gluon:
    """Triton's compiler for NVIDIA, whose first two stages are Gluon's one."""

    def __init__(self, backend: Any):
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def make_ttir(self, module: Any, *_: Any) -> Any:
        return module

    def make_ttgir(self, module: Any, metadata: dict[str, Any], *rest: Any) -> Any:
        made = self._backend.gluon_to_ttgir(module, metadata, *rest)
        for described in metadata.get("tensordesc_meta") or ():
            described.setdefault("is_im2col", False)  # Triton 3.6 has no others, and does not say so
        return made


class _Counting:
    """jax-triton's module of kernel calls, with a TritonKernel that asks the code how many threads it is for."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def TritonKernel(self, name: str, num_warps: int, num_ctas: int, shared: int, code: str, *rest: Any) -> Any:
        threads = re.search(r"\.reqntid (\d+)", code)  # of PTX; AMD's code is a path
        num_warps = int(threads[1]) // 32 if threads else num_warps
        return self._module.TritonKernel(name, num_warps, num_ctas, shared, code, *rest)
