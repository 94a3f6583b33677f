"""Which rank holds which experts: the stacked parameters as DTensors, cut along the axis of the experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moebius.core.errors import ConfigError, ShapeError, Unsupported
from moebius.torch_frontend.preflight import register

# The dimension of a mesh along which experts are spread; the name is NeMo Automodel's.
EP = "ep"


def held(n_experts: int, ranks: int) -> int:
    """e, the experts that each of `ranks` ranks holds.

    Raises:
        ConfigError: the ranks do not divide the experts.
    """
    e, rest = divmod(n_experts, ranks)
    if rest:
        do = "use a number of ranks that divides the experts"
        raise ConfigError(f"{n_experts} experts over {ranks} ranks", f"{rest} left over", do)
    return e


def ep_dimension(mesh: Any) -> Any:
    """The one-dimensional mesh of the ranks that share experts: `mesh` itself, or its dimension "ep".

    Raises:
        ConfigError: `mesh` has several dimensions and none of that name.
    """
    if not hasattr(mesh, "ndim") or not hasattr(mesh, "mesh_dim_names"):
        found, do = f"a {type(mesh).__name__}", "make one with torch.distributed.device_mesh.init_device_mesh"
        raise ConfigError("a torch.distributed DeviceMesh", found, do)
    if mesh.ndim == 1:
        return mesh
    names = mesh.mesh_dim_names or ()
    if EP not in names:
        found = f"{mesh.ndim} dimensions named {', '.join(names)}" if names else f"{mesh.ndim} dimensions without names"
        do = f'pass the one dimension, or name it "{EP}" in init_device_mesh(..., mesh_dim_names=...)'
        raise ConfigError(f'a mesh of one dimension, or with a dimension "{EP}"', found, do)
    return mesh[EP]


@torch.no_grad()
def shard_experts(module: nn.Module, ep_mesh: Any) -> nn.Module:
    """Keep this rank's experts of `module`, in place: each of its own parameters becomes a DTensor, Shard(0).

    Rank r of n keeps the values of its experts [r * e, (r + 1) * e); nothing is sent. Names, requires_grad, gradients
    and all else that the module holds stay, and `load_state_dict` still takes tensors of all experts. Call it before
    the optimizer is made and before FSDP's fully_shard.

    Args:
        module: an experts module; every parameter of its own is stacked over the E experts.
        ep_mesh: torch.distributed DeviceMesh of the n ranks; of several dimensions, its dimension "ep" is taken.
    Returns:
        `module`.
    Raises:
        ConfigError: `module` is none, the mesh has no such dimension, or n does not divide E.
        Unsupported: a parameter is a DTensor already.
    """
    mesh = ep_dimension(ep_mesh)
    parameters = dict(module.named_parameters(recurse=False))
    if not {"gate_and_up_projs", "down_projs"} <= parameters.keys():
        found = f"parameters of its own: {', '.join(parameters) or 'none'}"
        raise ConfigError(f"the experts of a {type(module).__name__}", found, "pass the experts module, as moe.experts")
    for name, value in parameters.items():
        if _is_dtensor(value):
            raise Unsupported(f"{name} to be sharded", "a DTensor already", "shard a module once, before FSDP")
    for name, value in parameters.items():
        new = nn.Parameter(_shard(value, mesh), requires_grad=value.requires_grad)
        new.grad = None if value.grad is None else _shard(value.grad, mesh)
        module.register_parameter(name, new)
    if hasattr(type(module), "backend_name"):  # one of moebius' own
        register(module, mesh)
    return module


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, differentiable; a plain tensor is returned as it is.

    Of a parameter that is replicated, each rank sees its own tokens' part of the gradient: they are added.
    """
    if not _is_dtensor(parameter):
        return parameter
    whole: Any = parameter
    if not any(placement.is_replicate() for placement in whole.placements):
        part: Tensor = whole.to_local()
        return part
    from torch.distributed.tensor import Partial

    grads = [Partial() if placement.is_replicate() else placement for placement in whole.placements]
    # The step to the same placements has a backward: from parts of a sum to the sum.
    part = whole.redistribute(whole.device_mesh, whole.placements).to_local(grad_placements=grads)
    return part


def mesh_of(parameters: Mapping[str, Tensor]) -> Any:
    """The one-dimensional mesh over which the experts are spread; None where every rank holds all of them.

    Raises:
        Unsupported: the parameters lie in a way in which the experts cannot be computed; says which and how.
    """
    spread = {name: _mesh(name, value) for name, value in parameters.items()}
    meshes = list(spread.values())
    if any(mesh != meshes[0] for mesh in meshes):
        found = "; ".join(f"{name}: {mesh or 'not sharded'}" for name, mesh in spread.items())
        raise Unsupported("all parameters of the experts on one mesh", found, "shard all of them: shard_experts")
    return meshes[0] if meshes else None


def matching(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` as something to copy into `parameter`: of a tensor of all experts, this rank's part where it is sharded.

    Args:
        parameter: plain, or a DTensor of any mesh. value: plain in the parameter's global shape, or a DTensor; one that
            is placed otherwise than the parameter is gathered, so all of its ranks must call.
    Raises:
        ShapeError: `value` has another shape than the whole parameter.
    """
    own: Any = parameter if _is_dtensor(parameter) else None
    given: Any = value if _is_dtensor(value) else None
    if own is None and given is None:
        return value
    if tuple(value.shape) != tuple(parameter.shape):
        asked = f"a tensor of shape {list(parameter.shape)}"
        raise ShapeError(
            asked, f"shape {list(value.shape)}", "pass the tensor of all experts; each rank takes its part"
        )
    if own is not None and given is not None:
        if (own.device_mesh, own.placements) == (given.device_mesh, given.placements):
            return value
    whole: Tensor = value if given is None else given.full_tensor()
    if own is None:
        return whole
    from torch.distributed.tensor import distribute_tensor

    if not parameter.is_meta:  # on the meta device it is to be assigned to: the values stay where they are
        whole = whole.to(parameter.device)
    # None: every rank cuts its own; nothing is sent.
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def _is_dtensor(value: Tensor) -> bool:
    # By name: importing DTensor takes most of a second, and where it is not imported there is none.
    return type(value).__name__ == "DTensor"


def _shard(value: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    e = held(value.shape[0], mesh.size())
    # A copy, so that the memory of the other experts is given back.
    part = value.narrow(0, mesh.get_local_rank() * e, e).clone()
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)


def _mesh(name: str, value: Any) -> Any:
    if not _is_dtensor(value):
        return None
    mesh, placements = value.device_mesh, value.placements
    if mesh.ndim > 1:
        found = f"a mesh of {mesh.ndim} dimensions {mesh.mesh_dim_names or ''}".strip()
        do = "call the module: FSDP gathers its own dimension before forward"
        raise Unsupported(f"{name} on a mesh of one dimension", found, do)
    if placements[0].is_replicate():
        return None
    if not placements[0].is_shard(0):
        raise Unsupported(f"{name} placed by Shard(0) or Replicate()", f"{placements[0]}", "use shard_experts")
    return mesh
