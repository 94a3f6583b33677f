"""Settings of every suite: hypothesis repeats the same examples, and both frameworks may share one process.

And what makes it quick: how XLA compiles, and in which order workers take the files.
"""

import gc
import os
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu") if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else None

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # core's suite alone may run without it: there is no profile to set
else:
    # deadline: a first example compiles. derandomize: a failure is everybody's failure.
    settings.register_profile("moebius", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("moebius")


def _quick_flags() -> str:
    """One module a program, not up to 32 for as many threads, is a tenth quicker; XLA's older writer of loops, a third.

    jaxlib 0.11 has that writer no more, and ends at its flag.
    """
    try:
        older = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
    except PackageNotFoundError:
        return ""
    return "--xla_cpu_parallel_codegen_split_count=1" + " --xla_cpu_use_fusion_emitters=false" * older


# Where JAX was asked not to optimize, as `make test` does, and nobody asked XLA for something else.
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1" and "XLA_FLAGS" not in os.environ and _quick_flags():
    os.environ["XLA_FLAGS"] = _quick_flags()

# The long files, the longest first: workers take whole files in this order, so that none is left alone at the end.
LONG = (
    "jax/test_lean.py",
    "jax/test_faults.py",
    "jax/test_matmul_autodiff.py",
    "jax/test_linen.py",
    "jax/test_transformations.py",
    "jax/test_matmul_te.py",
    "jax/test_parallel.py",
    "jax/test_grouped_experts.py",
    "jax/test_processes.py",
    "jax/test_experts_ranks.py",
    "jax/test_experts.py",
    "jax/test_explicit_mesh.py",
    "jax/test_moe.py",
    "jax/test_matmul_te_fp8.py",
    "jax/test_trace.py",
    "torch/test_compile.py",
    "torch/test_kernels_compile.py",
    "torch/test_dispatch_buffer.py",
    "torch/test_preflight.py",
    "torch/test_liveness.py",
    "torch/test_experts.py",
    "torch/test_portable_compile.py",
    "torch/test_launch.py",
    "torch/test_parallel.py",
    "torch/test_matmul_portable.py",
    "torch/test_lean.py",
    "torch/test_parallel_state.py",
    "torch/test_automodel_parallel.py",
    "project/test_notebooks.py",
    "cross/test_experts.py",
    "cross/test_moe.py",
    "project/test_benchmarks_flax.py",
    "project/test_types.py",
    "project/test_noise.py",
    "project/test_demo.py",
    "project/test_report_figure.py",
    "cross/test_bridge.py",
    "project/test_compare.py",
    "cross/test_interpreted.py",
    "cross/test_launch.py",
    "cross/test_route.py",
    "cross/test_parallel.py",
    "project/test_readme.py",
)


def pytest_collection_finish():
    """Frameworks and tests stay as long as the process: the garbage collector need not look at them."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """LONG first, the others as they come."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONG)))
