"""The two frontends are mirror images: same files, same public names, same argument names, up to a short list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH, JAX = ROOT / "torch_frontend", ROOT / "jax_frontend"

# File -> why only one frontend has it.
FILES = {
    "matmul_grouped_mm.py": "torch: a backend of this framework",
    "matmul_gmm.py": "torch: a backend of this framework",
    "matmul_mxfp8.py": "torch: a backend of this framework",
    "matmul_te.py": "torch: a backend of this framework",
    "matmul_te_fp8.py": "torch: a backend of this framework",
    "matmul_ragged_dot.py": "jax: a backend of this framework",
    "launch.py": "torch: launches core.kernels; JAX's operators are compiled by XLA",
    "statedict.py": "torch: state dicts; Flax has pytrees, which orbax loads whole",
    "lean.py": "torch: eager PyTorch keeps what autograd saves; XLA is told by jax.checkpoint",
    "dispatch_allgather.py": "torch: collectives of this framework",
    "recompute.py": "torch: checkpointing runs the module's Python again; JAX repeats equations",
    "operators.py": "torch: operators of torch.library under torch.func; JAX transforms every function",
    "sharding.py": "torch: DTensors; JAX shards arrays by its own rules",
}
# Argument -> why only one frontend has it.
ARGUMENTS = {
    "device": "torch: modules are built on a device; JAX places arrays by its own rules",
    "autocast": "torch: JAX has no autocast",
    "buffer_device": "torch: NeMo Automodel's callers pass it",
    "cp_mesh": "torch: ranks are a mesh or a process group, as NeMo Automodel's callers pass it; see cp_axis",
    "cp_axis": "jax: inside of shard_map ranks are the devices of a named mesh axis; see cp_mesh",
    "group": "torch: ranks are a process group; see axis_name",
    "axis_name": "jax: inside of shard_map ranks are the devices of a named mesh axis; see group",
    "rngs": "jax: random numbers are passed, not global",
    "kernel_init": "jax: Flax's convention for initial values",
    "kernel_metadata": "jax: Flax's convention for sharding metadata",
    "self": "torch: forward is a method like any other, in Flax it is __call__ (renamed below)",
}
_API = "torch: NeMo Automodel's callers use it"
_RAW = "torch: a kernel without gradient, which both the step's operator and lean.py run"
# (file, name) -> why it differs.
NAMES = {
    ("gate.py", "RoutingStatistic"): "jax: NNX keeps state in Variable classes",
    ("gate.py", "LossScale"): "jax: NNX keeps state in Variable classes",
    ("replay.py", "ReplayIds"): "jax: NNX keeps state in Variable classes",
    ("weights.py", "CorrectionBias"): "jax: NNX keeps state in Variable classes",
    ("weights.py", "draw"): "torch fills a tensor in place; JAX returns an array",
    ("matmul.py", "device_of"): "jax: arrays under a transformation have no device of their own",
    (
        "grouped_experts.py",
        "GroupedExperts.extra_repr",
    ): "torch: nn.Module's convention; NNX prints every attribute",
    ("grouped_experts.py", "GroupedExperts.expert_activation_grouped"): _API,
    ("grouped_experts.py", "weighted_activation"): _API,
    ("matmul_loop.py", "product"): "jax: the transposed product is an argument; a torch view is transposed already",
    ("matmul_loop.py", "prepare"): _RAW,
    ("matmul.py", "kernels"): _RAW,
    ("matmul.py", "in_context"): _RAW,
    ("matmul.py", "Kernels"): _RAW,
    ("activate.py", "activate_rows"): _RAW,
    ("activate.py", "activate_rows_backward"): _RAW,
    ("activate.py", "fields"): _RAW,
    ("activate.py", "of_fields"): _RAW,
    ("bias.py", "biased"): _RAW,
    ("bias.py", "sum_rows"): _RAW,
    ("bias.py", "dot_rows"): _RAW,
    ("permute.py", "Order"): _RAW,
    ("permute.py", "sort_routes"): _RAW,
    ("permute.py", "gather_rows"): _RAW,
    ("permute.py", "sum_slots"): _RAW,
    ("dtypes.py", "autocast"): "torch: JAX has no autocast",
    ("dtypes.py", "computed"): "torch: JAX has no autocast",
    ("dtypes.py", "on"): "torch: JAX has no current device that a package launches on",
}

TORCH_EXPORTS = {"GroupedExpertsDeepEP", "GroupedExpertsTE", "shard_experts"}

# PyTorch alone has an operator that keeps less for the backward pass.
LEAN = """    if activation is None and not double_backward and tap is untapped:
        y_SD = lean(p, sent, config, backend, partial)
    else:
"""


def _public(path: Path) -> dict[str, list[str]]:
    """Public functions, classes and methods of a file with their argument names."""
    found: dict[str, list[str]] = {}
    tree = ast.parse(path.read_text()).body
    classes = {node.name: node for node in tree if isinstance(node, ast.ClassDef)}
    for node in tree:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = _arguments(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = [t.target.id for t in node.body if isinstance(t, ast.AnnAssign) and _fields(node)]
            for method in _methods(node, classes):
                name = "forward" if method.name == "__call__" else method.name
                if name in ("__init__", "forward") or not name.startswith("_"):
                    found[f"{node.name}.{name}"] = _arguments(method)
    return found


def _methods(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.FunctionDef]:
    """A class's methods after those that it inherits from private classes of its file."""
    bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    inherited = [method for base in bases if base.name.startswith("_") for method in _methods(base, classes)]
    return inherited + [item for item in node.body if isinstance(item, ast.FunctionDef)]


def _fields(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in node.bases)


def _arguments(node: ast.FunctionDef) -> list[str]:
    a = node.args
    return [arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs] if arg.arg not in ARGUMENTS]


def _built(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without the classes that Flax does not have yet."""
    return {name: value for name, value in found.items() if name.split(".")[0] not in TORCH_EXPORTS}


def _both() -> list[str]:
    names = {path.name for folder in (TORCH, JAX) for path in folder.glob("*.py")}
    return sorted(names - FILES.keys())


def test_the_frontends_have_the_same_files() -> None:
    only = {p.name for p in TORCH.glob("*.py")} ^ {p.name for p in JAX.glob("*.py")}
    assert only <= FILES.keys()


@pytest.mark.parametrize("name", _both())
def test_the_frontends_say_the_same_names_with_the_same_arguments(name: str) -> None:
    torch, jax = _built(_public(TORCH / name)), _public(JAX / name)
    excused = {item for file, item in NAMES if file == name}
    assert torch.keys() - excused == jax.keys() - excused
    for item in torch.keys() & (jax.keys() - excused):
        assert torch[item] == jax[item], item


def test_the_frontends_export_the_same_names() -> None:
    exports = []
    for folder in (TORCH, JAX):
        (node,) = [
            n
            for n in ast.parse((folder / "__init__.py").read_text()).body
            if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        ]
        exports.append(ast.literal_eval(node.value))
    assert set(exports[0]) - TORCH_EXPORTS == set(exports[1])


def test_the_experts_read_the_same_line_by_line() -> None:
    """Steps 3 to 9 are one text; only the framework's own words and PyTorch's choice of `lean` differ."""
    bodies = []
    for folder in (TORCH, JAX):
        source = (folder / "experts.py").read_text()
        words = {".astype(": ".to(", "jnp.": "torch.", "Array": "Tensor"}
        start, end = source.index("    checks.tokens(x"), len(source)
        body = source[start:end]
        for own, other in words.items():
            body = body.replace(own, other)
        bodies.append(body.replace(LEAN, "").replace("        y_SD = steps(", "    y_SD = steps("))
    assert LEAN in (TORCH / "experts.py").read_text()
    assert bodies[0] == bodies[1]


def test_every_reason_is_needed() -> None:
    present = {p.name for folder in (TORCH, JAX) for p in folder.glob("*.py")}
    assert FILES.keys() <= present
    for file, item in NAMES:
        torch, jax = _public(TORCH / file), _public(JAX / file)
        assert torch.get(item) != jax.get(item), f"{item} in {file} no longer differs"
