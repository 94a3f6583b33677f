"""What is PyTorch's own about the experts: modules, layouts, gradcheck, compilation, state dicts."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from moebius.core import BackendConfig, ConfigError, DTypeError, MoEConfig, RoutingError, ShapeError, Unsupported
from moebius.torch_frontend import GroupedExperts, GroupedExpertsDeepEP, MoE, experts, shard_experts

CONFIG = MoEConfig(
    n_routed_experts=4,
    n_activated_experts=2,
    dim=8,
    moe_inter_dim=6,
    dtype="float32",
    expert_bias=True,
    expert_activation="quick_geglu",
)


def inputs(dtype=torch.float32, tokens=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.rand(tokens, 2, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    indices = torch.randint(-1, 5, (tokens, 2), generator=generator)
    return x, torch.arange(tokens) != 2, weights, indices


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "swigluoai", "geglu", "relu2"])
def test_experts_first_and_second_derivatives_in_float64(activation: str, after: bool) -> None:
    config = MoEConfig(
        n_routed_experts=3,
        n_activated_experts=2,
        dim=3,
        moe_inter_dim=2,
        dtype="float64",
        expert_bias=True,
        expert_activation=activation,
        apply_router_weight_after_down=after,
    )
    module = GroupedExperts(config)
    names, values = zip(*module.named_parameters(), strict=True)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(v.shape, generator=generator, dtype=torch.float64).requires_grad_() for v in values]
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[0, 2], [2, 2], [-1, 0], [0, 3]])
    mask = torch.tensor([True, True, True, True])

    def run(x, weights, *values, double=True):
        named = dict(zip(names, values, strict=True))
        return experts(named, x, mask, weights, indices, config=config, double_backward=double)

    assert torch.autograd.gradcheck(partial(run, double=False), (x, weights, *values))
    assert torch.autograd.gradcheck(run, (x, weights, *values))
    # relu squared has a kink in its second derivative; finite differences are right on either side of it.
    assert torch.autograd.gradgradcheck(run, (x, weights, *values), atol=1e-4)


def test_experts_second_derivative_of_the_lean_operator_is_refused_with_the_switch_named() -> None:
    module = GroupedExperts(CONFIG)
    x, mask, weights, indices = inputs()
    (dx,) = torch.autograd.grad(module(x, mask, weights, indices).square().sum(), x, create_graph=True)
    with pytest.raises(Unsupported, match=r"do: set BackendConfig\(double_backward=True\)"):
        torch.autograd.grad(dx.sum(), weights)


def test_experts_second_derivative_by_routing_weights_alone_is_refused_and_not_zero() -> None:
    module = GroupedExperts(CONFIG).requires_grad_(False)
    x, mask, weights, indices = inputs()

    def slope(weights: torch.Tensor) -> torch.Tensor:
        y = module(x, mask, weights, indices).sum()  # linear: the gradient hangs on x by the kept values alone
        return torch.autograd.grad(y, x, create_graph=True)[0].square().sum()

    refused = pytest.raises(Unsupported, match=r"do: set BackendConfig\(double_backward=True\)")
    with refused:
        slope(weights).backward(inputs=[weights])
    assert weights.grad is None
    with refused:
        torch.func.grad(lambda w: torch.func.grad(lambda x: module(x, mask, w, indices).sum())(x).square().sum())(
            weights
        )


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_non_contiguous_input_and_a_summed_output_equal_contiguous(backend: str, dtype) -> None:
    module = GroupedExperts(CONFIG, BackendConfig(experts=backend))
    x, mask, weights, indices = inputs(dtype)
    bent = torch.stack([x.detach(), x.detach()], -1)[..., 0].requires_grad_()
    assert not bent.is_contiguous()
    for value, ids in ((x, indices), (bent, indices.T.contiguous().T)):
        module(value, mask, weights, ids).sum().backward()
    torch.testing.assert_close(bent.grad, x.grad, rtol=0, atol=0)


# Dynamo itself instantiates the autograd function of the auxiliary loss, and warns of it (torch 2.13).
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("aux", [0.0, 0.5], ids=["", "aux_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moe_compiled_in_one_graph_equals_eager(dtype, aux: float) -> None:
    torch.manual_seed(0)
    config = MoEConfig(
        n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype=dtype, aux_loss_coeff=aux
    )
    layer = MoE(config)
    x = torch.randn(9, 16, dtype=dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (layer, compiled):
        layer.zero_grad()
        out = function(x)
        out.backward(torch.ones_like(out))
        grads.append([out.detach(), *(p.grad for p in layer.parameters())])
    for found, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted)


def test_grouped_experts_state_dict_holds_the_stacked_layout_and_loads_back() -> None:
    one, other = GroupedExperts(CONFIG), GroupedExperts(CONFIG)
    shapes = {name: tuple(value.shape) for name, value in one.state_dict().items()}
    assert shapes == {
        "gate_and_up_projs": (4, 8, 12),
        "down_projs": (4, 6, 8),
        "gate_up_proj_bias": (4, 12),
        "down_proj_bias": (4, 8),
    }
    other.load_state_dict(one.state_dict())
    args = inputs()
    torch.testing.assert_close(one(*args), other(*args), rtol=0, atol=0)


def test_grouped_experts_without_biases_hold_none() -> None:
    module = GroupedExperts(MoEConfig(n_routed_experts=2, n_activated_experts=1, dim=8, moe_inter_dim=4))
    assert module.gate_up_proj_bias is None and module.down_proj_bias is None
    assert set(module.state_dict()) == {"gate_and_up_projs", "down_projs"}
    assert module.down_projs.dtype == torch.bfloat16


def test_grouped_experts_are_drawn_on_construction() -> None:
    torch.manual_seed(0)
    module = GroupedExperts(MoEConfig(n_routed_experts=8, n_activated_experts=1, dim=64, moe_inter_dim=64))
    std = module.gate_and_up_projs.float().std().item()
    assert abs(std - 0.02) < 5 * 0.02 / (2 * module.gate_and_up_projs.numel()) ** 0.5
    module.init_weights(torch.device("cpu"), init_std=0.5)
    assert abs(module.down_projs.float().std().item() - 0.5) < 0.02


def test_grouped_experts_on_meta_take_no_memory_and_keep_shapes() -> None:
    module = GroupedExperts(CONFIG, device="meta")
    assert module.gate_and_up_projs.is_meta and module.backend_name


def test_grouped_experts_compute_in_the_dtype_asked_for() -> None:
    x, mask, weights, indices = inputs()
    assert GroupedExperts(CONFIG)(x.bfloat16(), mask, weights, indices).dtype == torch.bfloat16
    module = GroupedExperts(CONFIG, dtype="bfloat16", param_dtype="float32")
    assert module.down_projs.dtype == torch.float32
    assert module(x, mask, weights, indices).dtype == torch.bfloat16


def test_grouped_experts_take_int32_and_int64_indices_alike() -> None:
    module = GroupedExperts(CONFIG)
    x, mask, weights, indices = inputs()
    small = module(x, mask, weights, indices.int())
    torch.testing.assert_close(module(x, mask, weights, indices), small, rtol=0, atol=0)
    wide = torch.where(indices == 0, 2**32, indices)  # would be 0 again if it were narrowed first
    dropped = torch.where(indices == 0, -1, indices)
    found, wanted = module(x, mask, weights, wide), module(x, mask, weights, dropped)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_grouped_experts_with_float64_fall_to_the_loop_unless_a_backend_is_named() -> None:
    args = inputs(torch.float64)
    assert GroupedExperts(CONFIG)(*args).dtype == torch.float64
    with pytest.raises(Unsupported, match="no float64"):
        GroupedExperts(CONFIG, BackendConfig(experts="torch_mm"))(*args)
    with pytest.raises(Unsupported, match="no float64"):
        GroupedExperts(CONFIG, BackendConfig(experts="torch_mm"), param_dtype="float64")


def test_experts_that_took_good_input_once_still_refuse_bad_input() -> None:
    module = GroupedExperts(CONFIG)
    x, mask, weights, indices = inputs()
    module(x, mask, weights, indices)
    for changed, asked in (
        ((x[:, :4], mask, weights, indices), "x of shape"),
        ((x, mask[:3], weights, indices), "token_mask of shape"),
        ((x, mask, weights[:, :1], indices), "weights of the shape of indices"),
    ):
        with pytest.raises(ShapeError, match=asked):
            module(*changed)
    with pytest.raises(DTypeError, match="indices of dtype int32 or int64"):
        module(x, mask, weights, indices.float())
    with pytest.raises(DTypeError, match=r"x as a torch\.Tensor"):
        module(x.detach().numpy(), mask, weights, indices)
    named = dict(module.named_parameters())
    wider = replace(CONFIG, moe_inter_dim=12)  # the same arrays do not fit another config
    with pytest.raises(ShapeError, match="gate_and_up_projs of shape"):
        experts(named, x, mask, weights, indices, config=wider)
    del named["down_projs"]
    with pytest.raises(ShapeError, match="no down_projs"):
        experts(named, x, mask, weights, indices, config=CONFIG)


def test_experts_of_mixed_devices_name_each() -> None:
    module = GroupedExperts(CONFIG)
    x, mask, weights, indices = inputs()
    with pytest.raises(ShapeError, match=r"found: x on cpu, token_mask on meta"):
        module(x, mask.to("meta"), weights, indices)


def test_experts_of_a_dtensor_are_refused_with_a_remedy() -> None:
    class DTensor(torch.Tensor):
        """Stands in for torch.distributed's, which wants a process group."""

    x, mask, weights, indices = inputs()
    with pytest.raises(DTypeError, match=r"do: pass x.to_local\(\)"):
        GroupedExperts(CONFIG)(x.detach().as_subclass(DTensor), mask, weights, indices)


def test_grouped_experts_compute_with_what_a_parametrization_makes_of_a_parameter() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return 2 * value

    module, plain = GroupedExperts(CONFIG), GroupedExperts(CONFIG)
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        plain.down_projs.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(module, "down_projs", Doubled())
    args = inputs()
    torch.testing.assert_close(module(*args), plain(*args), rtol=0, atol=0)


def test_grouped_experts_on_meta_compute_shapes() -> None:
    x, mask, weights, indices = (value.to("meta") for value in inputs())
    assert GroupedExperts(CONFIG, device="meta")(x, mask, weights, indices).shape == (7, 8)


def test_grouped_experts_with_full_checks_look_at_shapes_before_values() -> None:
    module = GroupedExperts(CONFIG, BackendConfig(checks="full"))
    x, mask, weights, indices = inputs()
    with pytest.raises(ShapeError, match=r"token_mask of shape \[7\]"):
        module(x, mask[:4], weights, indices)
    with pytest.raises(RoutingError, match="ids in"):
        module(x, mask, weights, indices + 9)


@pytest.mark.parametrize("backend", ["te", {"experts": "te"}, object()], ids=["name", "mapping", "object"])
def test_modules_of_what_is_no_backend_config_refuse_it(backend) -> None:
    with pytest.raises(ConfigError, match="asked: a BackendConfig from"):
        GroupedExperts(CONFIG, backend)


def test_grouped_experts_with_te_fp8_point_to_the_autocast() -> None:
    with pytest.raises(Unsupported, match=r"do: run the layer inside transformer_engine\.pytorch\.autocast"):
        GroupedExperts(CONFIG, BackendConfig(experts="te", te_fp8="current"))


def test_modules_refuse_the_other_modules_name_of_the_activation() -> None:
    with pytest.raises(ConfigError, match="do: assign expert_activation_grouped"):
        GroupedExperts(CONFIG).expert_activation = torch.nn.ReLU()
    with pytest.raises(ConfigError, match=r"do: assign expert_activation$"):
        GroupedExpertsDeepEP(CONFIG).expert_activation_grouped = torch.nn.ReLU()


def test_shard_experts_of_a_module_without_experts_names_what_to_pass() -> None:
    with pytest.raises(ConfigError, match=r"a torch\.distributed DeviceMesh"):
        shard_experts(GroupedExperts(CONFIG), None)
    with pytest.raises(ConfigError, match=r"do: pass the experts module, as moe\.experts"):
        shard_experts(MoE(CONFIG), SimpleNamespace(ndim=1, mesh_dim_names=("ep",)))


def test_moe_under_torch_func_records_nothing_and_can_be_copied_after() -> None:
    layer = MoE(
        replace(CONFIG, aux_loss_coeff=0.1, gate_bias_update_factor=0.1, score_func="sigmoid", expert_bias=False)
    )
    values, x = dict(layer.named_parameters()), torch.randn(5, 8)

    def loss(values, x):
        return torch.func.functional_call(layer, values, (x,)).square().sum()

    grads = torch.func.grad(loss)(values, x)
    assert layer.gate.last_aux_loss is None and layer.gate.cumulative_load is None
    copy.deepcopy(layer)
    layer(x).square().sum().backward()
    torch.testing.assert_close(grads["gate.weight"], layer.gate.weight.grad)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x[:, None])
    assert per_sample["gate.weight"].shape == (5, 4, 8)
