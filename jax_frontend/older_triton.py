"""What tokamax 0.0.17 and jax-triton 0.4.1 expect of Triton and its release 3.6, which comes with torch 2.11, lacks.

Both are written for Triton 3.7. Without these two their kernels fail on 3.6; on a newer Triton nothing is changed.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any


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
