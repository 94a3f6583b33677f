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
    "matmul_ragged_dot.py": "jax: a backend of this framework",
}
# Argument -> why only one frontend has it.
ARGUMENTS = {
    "device": "torch: modules are built on a device; JAX places arrays by its own rules",
    "buffer_device": "torch: NeMo Automodel's callers pass it",
    "cp_mesh": "torch: NeMo Automodel's callers pass it; JAX reduces over a mesh axis inside the function",
    "rngs": "jax: random numbers are passed, not global",
    "kernel_init": "jax: Flax's convention for initial values",
    "kernel_metadata": "jax: Flax's convention for sharding metadata",
    "self": "torch: forward is a method like any other, in Flax it is __call__ (renamed below)",
}
# (file, name) -> why it differs.
NAMES = {
    ("gate.py", "RoutingStatistic"): "jax: NNX keeps state in Variable classes",
    ("weights.py", "CorrectionBias"): "jax: NNX keeps state in Variable classes",
    ("weights.py", "draw"): "torch fills a tensor in place; JAX returns an array",
    ("matmul.py", "device_of"): "jax: arrays under a transformation have no device of their own",
    ("experts.py", "GroupedExperts.extra_repr"): "torch: nn.Module's convention; NNX prints every attribute itself",
    ("matmul_loop.py", "product"): "jax: the transposed product is an argument; a torch view is transposed already",
}


def _public(path: Path) -> dict[str, list[str]]:
    """Public functions, classes and methods of a file with their argument names."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = _arguments(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = [t.target.id for t in node.body if isinstance(t, ast.AnnAssign) and _fields(node)]
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = "forward" if method.name == "__call__" else method.name
                    if name in ("__init__", "forward") or not name.startswith("_"):
                        found[f"{node.name}.{name}"] = _arguments(method)
    return found


def _fields(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in node.bases)


def _arguments(node: ast.FunctionDef) -> list[str]:
    a = node.args
    return [arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs] if arg.arg not in ARGUMENTS]


def _both() -> list[str]:
    names = {path.name for folder in (TORCH, JAX) for path in folder.glob("*.py")}
    return sorted(names - FILES.keys())


def test_the_frontends_have_the_same_files() -> None:
    only = {p.name for p in TORCH.glob("*.py")} ^ {p.name for p in JAX.glob("*.py")}
    assert only <= FILES.keys()


@pytest.mark.parametrize("name", _both())
def test_the_frontends_say_the_same_names_with_the_same_arguments(name: str) -> None:
    torch, jax = _public(TORCH / name), _public(JAX / name)
    excused = {item for file, item in NAMES if file == name}
    assert torch.keys() - excused == jax.keys() - excused
    for item in torch.keys() & jax.keys() - excused:
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
    assert exports[0] == exports[1]


def test_the_experts_read_the_same_line_by_line() -> None:
    """Steps 3 to 9 are one text; only the cast to a dtype is spelled by the framework."""
    bodies = []
    for folder in (TORCH, JAX):
        source = (folder / "experts.py").read_text()
        start, end = source.index("    checks.tokens(x"), source.index("class GroupedExperts")
        bodies.append(source[start:end].replace(".astype(", ".to("))
    assert bodies[0] == bodies[1]


def test_every_reason_is_needed() -> None:
    present = {p.name for folder in (TORCH, JAX) for p in folder.glob("*.py")}
    assert FILES.keys() <= present
    for file, item in NAMES:
        torch, jax = _public(TORCH / file), _public(JAX / file)
        assert torch.get(item) != jax.get(item), f"{item} in {file} no longer differs"
