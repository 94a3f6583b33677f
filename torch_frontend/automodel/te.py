"""The documented GroupedExpertsTE: stacked tensors to and from per-expert weights, meshes and state dicts.

moebius holds one stacked layout whichever backend multiplies, so most of these have nothing to convert on the module
itself; they serve callers that hold one of Transformer Engine's GroupedLinear, output-major `weight{i}` [out, in].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moebius.core import checks
from moebius.core.errors import ShapeError
from moebius.torch_frontend.automodel.experts import _Documented, _get_activation, _set_activation
from moebius.torch_frontend.grouped_experts import GroupedExpertsTE as ExpertsTE
from moebius.torch_frontend.sharding import EP, ep_dimension, local, matching

_PLURAL = {"weight": "weights", "bias": "biases"}
# Dimension of an MoE mesh -> the axis of the stacked tensors along which it cuts, None for copies.
_PLACED: dict[str, int | None] = {EP: 0, "ep_shard": 1, "ep_replicate": None}


class GroupedExpertsTE(_Documented, ExpertsTE):
    """moebius' GroupedExpertsTE with the documented constructor and the methods for per-expert weights.

    Args:
        config, backend: as in GroupedExperts; `backend.experts` None means "te".
        dispatcher_backend: how tokens reach other ranks. The others: of DeepEP.

    Attributes:
        gate_and_up_projs [E, D, U], down_projs [E, I, D] and the biases: parameters. Assigning a tensor copies it into
            the parameter, assigning None is ignored.
        expert_activation: f(hidden [N, U], weights [N, 1]) -> [N, I], assignable.
        ep_mesh, moe_mesh: None before `init_token_dispatcher` and `set_moe_mesh`.
    """

    expert_activation = property(_get_activation, _set_activation)

    def __init__(
        self,
        config: Any,
        backend: Any = None,
        dispatcher_backend: str = "deepep",
        dispatcher_num_sms: int = 20,
        dispatcher_share_token_dispatcher: bool = True,
        dispatcher_async_dispatch: bool = False,
    ):
        super().__init__(
            config,
            backend,
            dispatcher_backend,
            dispatcher_num_sms,
            dispatcher_share_token_dispatcher,
            dispatcher_async_dispatch,
        )
        self._describe()
        self.ep_mesh: Any = None
        self.register_load_state_dict_pre_hook(_take_this_ranks)

    def __setattr__(self, name: str, value: Any) -> None:
        parameter = self.__dict__.get("_parameters", {}).get(name)
        if parameter is None or isinstance(value, nn.Parameter):
            super().__setattr__(name, value)
        elif value is not None:
            placed = matching(parameter, _this_ranks(parameter, value))
            checks.parameter(name, placed, tuple(parameter.shape))
            with torch.no_grad():
                parameter.copy_(placed)

    def init_token_dispatcher(self, ep_mesh: Any, moe_mesh: Any = None) -> None:
        """As moebius' GroupedExpertsTE; keeps `ep_mesh` for callers that read it."""
        super().init_token_dispatcher(ep_mesh, moe_mesh)
        self.ep_mesh = ep_mesh

    def set_moe_mesh(self, moe_mesh: Any) -> None:
        """Keep the dimensions of `moe_mesh` that concern experts; see `_normalize_moe_mesh`."""
        super().set_moe_mesh(self._normalize_moe_mesh(moe_mesh))

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The stacked tensors by their names, and nothing else; DTensors where the experts are sharded.

        `load_state_dict` takes DTensors, the plain tensors of all experts, and those of this rank's.
        """
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars, **kwargs)

    def _get_stacked_weight(self, linear: Any, transpose: bool = False) -> Tensor:
        """[n, out, in], a copy of weight0 to weight{n - 1}; [n, in, out] with `transpose`, moebius' own layout.

        Args:
            linear: Transformer Engine's GroupedLinear, or any object with `num_gemms` and `weight{i}` [out, in].
        """
        stacked = torch.stack([getattr(linear, f"weight{i}") for i in range(linear.num_gemms)])
        return stacked.transpose(1, 2) if transpose else stacked

    def _get_stacked_bias(self, linear: Any) -> Tensor | None:
        """[n, out], a copy of bias0 to bias{n - 1}; None for a linear without biases."""
        if not _has_bias(linear):
            return None
        return torch.stack([getattr(linear, f"bias{i}") for i in range(linear.num_gemms)])

    @torch.no_grad()
    def _set_stacked_weight(self, linear: Any, stacked: Tensor, transpose: bool = False) -> None:
        """Copy `stacked` into weight0 to weight{n - 1}: the inverse of `_get_stacked_weight`; None is ignored.

        Raises:
            ShapeError: `stacked` has another shape.
        """
        if stacked is None:
            return
        _copy(linear, "weight", local(stacked).transpose(1, 2) if transpose else local(stacked))

    @torch.no_grad()
    def _set_stacked_bias(self, linear: Any, stacked: Tensor) -> None:
        """Copy `stacked` into bias0 to bias{n - 1}; None, or a linear without biases, is ignored.

        Raises:
            ShapeError: `stacked` has another shape.
        """
        if stacked is not None and _has_bias(linear):
            _copy(linear, "bias", local(stacked))

    def _normalize_moe_mesh(self, moe_mesh: Any) -> Any:
        """The dimensions "ep", "ep_shard" and "ep_replicate" of a mesh; itself where it has no other, None for none."""
        if moe_mesh is None:
            return None
        names = moe_mesh.mesh_dim_names or ()
        kept = tuple(name for name in names if name in _PLACED)
        if len(kept) == len(names):
            return moe_mesh if names else None
        return moe_mesh[kept] if kept else None

    def _to_ep_dtensor(self, tensor: Tensor) -> Tensor:
        """This rank's part of a stacked tensor as a DTensor: cut by experts over "ep", by axis 1 over "ep_shard".

        `tensor` itself without a mesh, or where it is a DTensor already. "ep_shard" and "ep_replicate" count where one
        of them has more than one rank.
        """
        if (self.moe_mesh is None and self.ep_mesh is None) or _is_dtensor(tensor):
            return tensor
        from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

        mesh, axes = self._axes()
        placements: list[Placement] = [Replicate() if axis is None else Shard(axis) for axis in axes]
        return DTensor.from_local(tensor, mesh, placements, run_check=False)

    def _axes(self) -> tuple[Any, list[int | None]]:
        """The mesh of a stacked tensor, and the axis that each of its dimensions cuts."""
        mesh = self.moe_mesh
        if mesh is None:
            return ep_dimension(self.ep_mesh), [0]
        names = mesh.mesh_dim_names
        others = [size for name, size in zip(names, mesh.shape, strict=True) if name != EP]
        if EP in names and all(size == 1 for size in others):
            return mesh[EP], [0]
        return mesh, [_PLACED[name] for name in names]


def _has_bias(linear: Any) -> bool:
    first = getattr(linear, "bias0", None)
    # Without biases Transformer Engine holds empty tensors.
    return bool(getattr(linear, "use_bias", True)) and first is not None and first.numel() > 0


def _copy(linear: Any, kind: str, stacked: Tensor) -> None:
    own = [getattr(linear, f"{kind}{i}") for i in range(linear.num_gemms)]
    shape = (len(own), *own[0].shape)
    if tuple(stacked.shape) != shape:
        do = "pass one row per expert; transpose=True for [experts, in, out]"
        raise ShapeError(f"stacked {_PLURAL[kind]} of shape {list(shape)}", f"shape {list(stacked.shape)}", do)
    for each, value in zip(own, stacked, strict=True):
        each.copy_(value)


def _is_dtensor(value: Any) -> bool:
    return type(value).__name__ == "DTensor"


def _this_ranks(parameter: Tensor, value: Any) -> Any:
    """A plain tensor of this rank's experts as what it is, a part of the parameter; any other value is returned."""
    shape = tuple(getattr(value, "shape", ()))
    if not _is_dtensor(parameter) or _is_dtensor(value) or shape != tuple(local(parameter).shape):
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(value.to(parameter.device), mesh, placements, run_check=False)


def _take_this_ranks(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is read: the original's holds this rank's experts as plain tensors."""
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state_dict:
            state_dict[prefix + name] = _this_ranks(parameter, state_dict[prefix + name])
