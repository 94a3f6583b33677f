"""The documented GroupedExpertsTE on one rank: per-expert weights, state dicts, meshes. Several ranks: _parallel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moebius.core import BackendConfig, BackendUnavailable, MoEConfig, ShapeError, Unsupported
from moebius.torch_frontend.automodel import GroupedExpertsDeepEP, GroupedExpertsTE

LOOP = BackendConfig(experts="loop")


def module(bias: bool = True, **settings: Any) -> GroupedExpertsTE:
    config = MoEConfig(
        n_routed_experts=3, n_activated_experts=2, dim=4, moe_inter_dim=2, expert_bias=bias, dtype="float32", **settings
    )
    return GroupedExpertsTE(config, LOOP)


class Linear(nn.Module):
    """What Transformer Engine's GroupedLinear shows: num_gemms, weight{i} [out, in], bias{i} [out]."""

    def __init__(self, n: int = 3, n_in: int = 4, n_out: int = 2, bias: Any = "bias"):
        super().__init__()
        self.num_gemms = n
        for i in range(n):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(n_out, n_in)))
            if bias == "bias":
                self.register_parameter(f"bias{i}", nn.Parameter(torch.randn(n_out)))
            elif bias == "empty":  # Transformer Engine's way of having none
                setattr(self, f"bias{i}", torch.Tensor())


# --------------------------------------------------------------------------------------------------- per-expert weights
def test_stacked_weight_is_every_experts_in_order_and_a_copy() -> None:
    te, linear = module(), Linear()
    stacked = te._get_stacked_weight(linear)
    assert stacked.shape == (3, 2, 4) and all(torch.equal(stacked[i], getattr(linear, f"weight{i}")) for i in range(3))
    swapped = te._get_stacked_weight(linear, transpose=True)
    assert torch.equal(swapped, stacked.mT)
    before = linear.weight1.detach().clone()
    with torch.no_grad():
        stacked.zero_()
    assert torch.equal(linear.weight1, before)


@pytest.mark.parametrize("transpose", [False, True])
def test_set_stacked_weight_is_the_inverse_of_get(transpose: bool) -> None:
    te, one, other = module(), Linear(), Linear()
    te._set_stacked_weight(other, te._get_stacked_weight(one, transpose), transpose)
    assert all(torch.equal(one.get_parameter(f"weight{i}"), other.get_parameter(f"weight{i}")) for i in range(3))
    assert other.weight0.is_leaf and other.weight0.requires_grad


def test_stacked_weight_passes_gradients() -> None:
    te, linear = module(), Linear()
    (te._get_stacked_weight(linear, transpose=True) * torch.arange(3.0)[:, None, None]).sum().backward()
    assert [linear.get_parameter(f"weight{i}").grad.unique().tolist() for i in range(3)] == [[0], [1], [2]]


def test_stacked_bias_is_every_experts_and_its_setter_the_inverse() -> None:
    te, one, other = module(), Linear(), Linear()
    stacked = te._get_stacked_bias(one)
    assert stacked.shape == (3, 2) and torch.equal(stacked[2], one.bias2)
    te._set_stacked_bias(other, stacked)
    assert all(torch.equal(one.get_parameter(f"bias{i}"), other.get_parameter(f"bias{i}")) for i in range(3))


@pytest.mark.parametrize("kind", ["none", "empty", "use_bias"])
def test_stacked_bias_of_a_linear_without_is_none_and_its_setter_does_nothing(kind: str) -> None:
    te, linear = module(), Linear(bias="bias" if kind == "use_bias" else kind)
    if kind == "use_bias":
        linear.use_bias = False
    before = [value.clone() for value in linear.parameters()]
    assert te._get_stacked_bias(linear) is None
    te._set_stacked_bias(linear, torch.full((3, 2), 9.0))
    assert all(torch.equal(one, two) for one, two in zip(before, linear.parameters(), strict=True))


def test_set_stacked_of_none_does_nothing() -> None:
    te, linear = module(), Linear()
    before = [value.clone() for value in linear.parameters()]
    te._set_stacked_weight(linear, None)
    te._set_stacked_bias(linear, None)
    assert all(torch.equal(one, two) for one, two in zip(before, linear.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 2, 4), (3, 2, 1), (1, 2, 4)], ids=str)
def test_set_stacked_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    linear = Linear()
    with pytest.raises(ShapeError, match=r"asked: stacked weights of shape \[3, 2, 4\]"):
        module()._set_stacked_weight(linear, torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"asked: stacked biases of shape \[3, 2\]"):
        module()._set_stacked_bias(linear, torch.zeros(2, 2))


# ------------------------------------------------------------------------------------------------------- the parameters
def test_assigning_a_tensor_copies_it_into_the_parameter_and_none_is_ignored() -> None:
    te = module()
    parameter = te.down_projs
    te.down_projs = torch.full((3, 2, 4), 2.0, dtype=torch.bfloat16)
    assert te.down_projs is parameter and torch.equal(parameter, torch.full((3, 2, 4), 2.0))
    te.down_projs = None
    te.down_proj_bias = None
    assert te.down_projs is parameter and te.down_proj_bias is not None
    new = nn.Parameter(torch.zeros(3, 2, 4))
    te.down_projs = new
    assert te.down_projs is new


def test_assigning_a_tensor_of_another_shape_is_refused() -> None:
    te = module()
    with pytest.raises(ShapeError, match=r"down_projs of shape \[3, 2, 4\]"):
        te.down_projs = torch.zeros(1, 2, 4)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_state_dict_holds_the_stacked_tensors_and_loads_back(bias: bool) -> None:
    one, other = module(bias), module(bias)
    state = one.state_dict()
    wanted = {"gate_and_up_projs", "down_projs"} | ({"gate_up_proj_bias", "down_proj_bias"} if bias else set())
    assert set(state) == wanted and not any(value.requires_grad for value in state.values())
    assert all(value.requires_grad for value in one.state_dict(keep_vars=True).values())
    assert set(one.state_dict(prefix="experts.")) == {f"experts.{name}" for name in wanted}
    into: dict[str, Any] = {"mine": 1}
    assert one.state_dict(destination=into) is into and set(into) == wanted | {"mine"}
    assert other.load_state_dict(state) == ([], [])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in state.items())


def test_state_dict_within_a_model_holds_the_stacked_tensors() -> None:
    one, other = nn.ModuleDict({"experts": module()}), nn.ModuleDict({"experts": GroupedExpertsDeepEP(module().config)})
    other.load_state_dict(one.state_dict())
    assert torch.equal(one["experts"].down_projs, other["experts"].down_projs)


def test_load_state_dict_reports_what_is_missing_and_what_does_not_fit() -> None:
    te = module()
    state = te.state_dict()
    del state["down_projs"]
    assert te.load_state_dict(state, strict=False) == (["down_projs"], [])
    for wrong, word in (
        (state, "down_projs"),
        ({**te.state_dict(), "weight0": torch.zeros(1)}, "weight0"),
        ({**te.state_dict(), "down_projs": torch.zeros(3, 4, 2)}, r"down_projs.*\[3, 4, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=word):
            te.load_state_dict(wrong)


# -------------------------------------------------------------------------------------------------------------- meshes
class Mesh:
    """Stands in for a DeviceMesh: names, shape, and a part by names."""

    def __init__(self, **dims: int):
        self.mesh_dim_names, self.shape = tuple(dims) or None, tuple(dims.values())
        self.dims = dims

    def __getitem__(self, names: Any) -> Any:
        return "part", names


def test_normalize_moe_mesh_keeps_the_dimensions_of_experts() -> None:
    te, whole = module(), Mesh(ep_replicate=2, ep_shard=1, ep=2)
    assert te._normalize_moe_mesh(None) is None
    assert te._normalize_moe_mesh(whole) is whole
    assert te._normalize_moe_mesh(Mesh(pp=2, ep_shard=2, ep=2)) == ("part", ("ep_shard", "ep"))
    assert te._normalize_moe_mesh(Mesh(dp=2, tp=2)) is None
    assert te._normalize_moe_mesh(Mesh()) is None


def test_set_moe_mesh_keeps_the_normalised_mesh() -> None:
    te = module()
    assert te.moe_mesh is None and te.ep_mesh is None
    te.set_moe_mesh(Mesh(pp=2, ep=2))
    assert te.moe_mesh == ("part", ("ep",))
    te.set_moe_mesh(None)
    assert te.moe_mesh is None


def test_to_ep_dtensor_without_a_mesh_is_the_tensor_itself() -> None:
    tensor = torch.zeros(3, 2, 4)
    assert module()._to_ep_dtensor(tensor) is tensor


# ---------------------------------------------------------------------------------------------------------- the backend
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it may run")
def test_te_backend_is_the_default_and_refused_where_it_cannot_run() -> None:
    with pytest.raises((BackendUnavailable, Unsupported), match="'te'"):
        GroupedExpertsTE(module().config)
    with pytest.raises((BackendUnavailable, Unsupported), match="'te'"):
        GroupedExpertsTE(module().config, SimpleNamespace(experts="te"))


def test_te_class_weights_after_the_down_projection_too() -> None:
    te = module(apply_router_weight_after_down=True)
    x, mask, ids = torch.randn(5, 4), torch.ones(5, dtype=torch.bool), torch.tensor([[0], [1], [2], [0], [1]])
    torch.testing.assert_close(te(x, mask, torch.full((5, 1), 2.0), ids), 2 * te(x, mask, torch.ones(5, 1), ids))
