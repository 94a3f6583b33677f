"""The two frontends are mirror images: same files, same public names, same argument names, up to a short list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH, JAX = ROOT / "torch_frontend", ROOT / "jax_frontend"

# File -> why only one frontend has it, or why each has its own.
_BACKEND = "a backend of this framework"
_BINDINGS = "both: each framework's bindings of one package, called through the table of its matmul.py"
_COLLECTIVES = "both: collectives of a process group, sizes known to the host; or of a mesh axis, with static shapes"
_LIBRARY = "torch: communication buffers of libraries that take torch's tensors and process groups"
FILES = {
    "matmul_grouped_mm.py": f"torch: {_BACKEND}",
    "matmul_gmm.py": f"torch: {_BACKEND}",
    "matmul_triton.py": "torch: tables are made once for several products, and products fused with the activation",
    "matmul_mxfp8.py": f"torch: {_BACKEND}",
    "matmul_te.py": _BINDINGS,
    "matmul_te_fp8.py": _BINDINGS,
    "matmul_ragged_dot.py": f"jax: {_BACKEND}",
    "matmul_tokamax.py": f"jax: {_BACKEND}",
    "older_triton.py": "jax: what jax-triton and tokamax lack of a triton, and of Gluon",
    "permute_te.py": f"jax: {_BACKEND}; PyTorch has moebius' own kernels",
    "route_te.py": f"jax: {_BACKEND}; PyTorch has moebius' own",
    "lean_kernels.py": "jax: lean.py has XLA's steps; in PyTorch each step of lean.py is a kernel where there is one",
    "statedict.py": "torch: state dicts; Flax has pytrees, which orbax loads whole",
    "linen.py": "jax: Flax has two kinds of modules, NNX and Linen",
    "transport.py": _COLLECTIVES,
    "dispatch_ranks.py": _COLLECTIVES,
    "dispatch_allgather.py": _COLLECTIVES,
    "dispatch_alltoall.py": _COLLECTIVES,
    "dispatch_buffer.py": _LIBRARY,
    "dispatch_choice.py": "torch: each process has packages of its own",
    "dispatch_deepep.py": _LIBRARY,
    "dispatch_elastic.py": _LIBRARY,
    "dispatch_hybridep.py": _LIBRARY,
    "dispatch_limits.py": _LIBRARY,
    "dispatch_longest.py": _LIBRARY,
    "dispatch_pool.py": _LIBRARY,
    "dispatch_te.py": "both: a library made once for a process, over a group with handles, or over a mesh with arrays",
    "dispatch_trip.py": _LIBRARY,
    "dispatch_ragged.py": "jax: a collective of XLA; PyTorch's all-to-all is ragged",
    "over_mesh.py": "jax: one program calls all devices; a process of PyTorch is one rank",
    "few.py": "torch: eager launches are made on the host, one by one; XLA launches a compiled program",
    "tape.py": "torch: as few.py",
    "recompute.py": "torch: checkpointing runs the module's Python again; JAX repeats equations",
    "operators.py": "both: how operators with derivatives are declared, by torch.library and by JAX's primitives",
    "sharding.py": "both: parameters as DTensors of each rank, or as arrays over the devices of a mesh",
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
    "mesh": "jax: modules are built on a mesh; PyTorch's are spread over ranks by shard_experts, before FSDP",
    "remat": 'jax: in PyTorch the operator keeps what "act" keeps; torch.utils.checkpoint keeps less',
    "permute_backend": "jax: PyTorch has one permute, moebius' own",
    "route_backend": "jax: PyTorch has one route, moebius' own",
    "in_place": "torch: eager tensors are written over; XLA decides where results go",
    "out": "jax: what a kernel writes is declared; in PyTorch it is an argument",
    "self": "torch: forward is a method like any other, in Flax it is __call__ (renamed below)",
}
_REPR = "torch: nn.Module's convention; NNX prints every attribute"
_STEP = "jax: this step has backends, PyTorch has one permute and one route"
_KEPT = "jax: the backward pass keeps more or less, as `remat` says"
_EAGER = "torch: eager calls overlap where they are made; XLA schedules a program by itself"
_BOUND = "jax: shapes are static, so what travels may have a bound; PyTorch's ranks count it"
_RAW = "torch: a kernel without gradient, which both the step's operator and lean.py run"
_TAPED = "torch: what tape.py records and plays"
_HELD = "torch: ranks give buffers back together; in Flax nothing is held between calls"
# (file, name) -> why it differs.
NAMES = {
    ("preflight.py", "name_layers"): "torch: JAX's transformations copy modules, and with them what they are called by",
    ("preflight.py", "exchange"): "torch: ranks choose a library together; in Flax all have XLA's collectives",
    ("liveness.py", "collective"): "torch: in Flax collectives are XLA's, and their errors come later",
    ("liveness.py", "Peers.__init__"): "torch: of a process group; jax: of processes, by their numbers",
    ("dispatch.py", "During"): _EAGER,
    ("dispatch.py", "During.__init__"): _EAGER,
    ("dispatch.py", "During.dispatch"): _EAGER,
    ("dispatch.py", "During.combine"): _EAGER,
    ("gate.py", "RoutingStatistic"): "jax: NNX keeps state in Variable classes",
    ("gate.py", "LossScale"): "jax: NNX keeps state in Variable classes",
    ("replay.py", "ReplayIds"): "jax: NNX keeps state in Variable classes",
    ("weights.py", "CorrectionBias"): "jax: NNX keeps state in Variable classes",
    ("weights.py", "new_parameter"): "jax: Flax's convention for sharding metadata",
    ("liveness.py", "known"): "torch: a process group may be destroyed before what knows of it",
    ("weights.py", "placed_like"): "jax: an array put in another's place has a placement of its own",
    ("weights.py", "draw"): "torch fills a tensor in place; JAX returns an array",
    ("matmul.py", "may_be_split"): "jax: XLA splits a program over devices; PyTorch runs where its tensors lie",
    ("matmul.py", "device_of"): "jax: arrays under a transformation have no device of their own",
    ("grouped_experts.py", "GroupedExperts.extra_repr"): _REPR,
    ("grouped_experts.py", "GroupedExpertsDeepEP.extra_repr"): _REPR,
    ("grouped_experts.py", "GroupedExpertsTE.extra_repr"): _REPR,
    ("grouped_experts.py", "GroupedExperts.meanwhile"): _EAGER,
    ("grouped_experts.py", "GroupedExpertsDeepEP.meanwhile"): _EAGER,
    ("grouped_experts.py", "GroupedExpertsTE.meanwhile"): _EAGER,
    ("grouped_experts.py", "GroupedExperts.close"): _HELD,
    ("grouped_experts.py", "GroupedExperts.dropped"): _BOUND,
    ("grouped_experts.py", "GroupedExpertsDeepEP.close"): _HELD,
    ("grouped_experts.py", "GroupedExpertsDeepEP.dropped"): _BOUND,
    ("grouped_experts.py", "GroupedExpertsTE.close"): _HELD,
    ("grouped_experts.py", "GroupedExpertsTE.dropped"): _BOUND,
    ("matmul_loop.py", "product"): "jax: the transposed product is an argument; a torch view is transposed already",
    ("matmul_loop.py", "prepare"): _RAW,
    ("matmul.py", "product"): "jax: an operator that lean.py calls too; PyTorch's has no derivative there, see kernels",
    ("matmul.py", "weight_gradient"): "jax: as product",
    ("lean.py", "Kept"): _KEPT,
    ("lean.py", "How"): _KEPT,
    ("lean.py", "backward"): "torch: eager PyTorch is told which gradients nobody reads; XLA drops them",
    ("matmul.py", "kernels"): _RAW,
    ("matmul.py", "in_context"): _RAW,
    ("matmul.py", "Kernels"): _RAW,
    ("matmul.py", "Fused"): _RAW,
    (
        "launch.py",
        "serves",
    ): "torch: kernels stand in for its formulas wherever they can; in Flax with their backend alone",
    ("launch.py", "mask_routes"): "torch: XLA fuses the few integer operations",
    ("launch.py", "sort_routes"): "torch: XLA sorts, to the same order",
    ("launch.py", "gather_rows"): "torch: for experts whose steps are differentiated one by one",
    ("launch.py", "sum_rows"): "torch: its formula's other dtypes",
    ("matmul.py", "Packed"): _RAW,
    ("play.py", "described"): _TAPED,
    ("play.py", "handles"): _TAPED,
    ("play.py", "listening"): _TAPED,
    ("play.py", "watched"): _TAPED,
    ("play.py", "load"): "jax: Triton comes with PyTorch, jax-triton by itself",
    ("activate.py", "activated"): "jax: JAX derives the gradients; PyTorch has kernels of both, see activate_rows",
    ("activate.py", "activate_rows"): _RAW,
    ("activate.py", "activate_rows_backward"): _RAW,
    ("activate.py", "fields"): _RAW,
    ("activate.py", "of_fields"): _RAW,
    ("bias.py", "biased"): _RAW,
    ("bias.py", "sum_rows"): _RAW,
    ("bias.py", "dot_rows"): _RAW,
    ("permute.py", "permute"): _STEP,
    ("permute.py", "choose_permuter"): _STEP,
    ("permute.py", "Permuter"): _STEP,
    ("route.py", "route"): _STEP,
    ("route.py", "choose_router"): _STEP,
    ("route.py", "Router"): _STEP,
    ("permute.py", "Order"): _RAW,
    ("permute.py", "sort_routes"): _RAW,
    ("permute.py", "gather_rows"): _RAW,
    ("permute.py", "scatter_rows"): _RAW,
    ("permute.py", "sum_dots"): _RAW,
    ("permute.py", "sum_slots"): _RAW,
    ("dtypes.py", "widened"): "jax: where XLA could not leave a rounding out; PyTorch leaves none out",
    ("dtypes.py", "autocast"): "torch: JAX has no autocast",
    ("dtypes.py", "computed"): "torch: JAX has no autocast",
    ("dtypes.py", "on"): "torch: JAX has no current device that a package launches on",
}

# In experts.py: what Flax alone says, and what PyTorch says there.
WORDS = {".astype(": ".to(", "jnp.": "torch.", "Array": "Tensor"}
STEPS = {
    " and permute_backend is None": "",
    "partial, remat)": "partial)",
    "activation, tap, permute_backend)": "activation, tap)",
    "    permute_backend: str | None = None,\n": "",
    "permute(\n        sent": "permute(sent",
    ", backend=permute_backend\n    )": ")",
}


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
    assert set(exports[0]) == set(exports[1])


def test_the_experts_read_the_same_line_by_line() -> None:
    """Steps 3 to 9 are one text; only the framework's own words and Flax's backends of permute differ."""
    torch, jax = ((folder / "experts.py").read_text().partition("    check_experts(")[2] for folder in (TORCH, JAX))
    for own, other in (STEPS | WORDS).items():
        assert own in jax, own
        jax = jax.replace(own, other)
    assert torch == jax


def test_every_reason_is_needed() -> None:
    present = {p.name for folder in (TORCH, JAX) for p in folder.glob("*.py")}
    assert FILES.keys() <= present
    for file, item in NAMES:
        torch, jax = _public(TORCH / file), _public(JAX / file)
        assert torch.get(item) != jax.get(item), f"{item} in {file} no longer differs"
