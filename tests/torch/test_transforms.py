"""torch.func on the layers, forward mode, batched gradients; copies and pickles of modules."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache
from typing import Any

import pytest
import ranks
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from moebius.core import BackendConfig, MoEConfig, Unsupported
from moebius.torch_frontend import (
    Gate,
    GroupedExperts,
    GroupedExpertsDeepEP,
    GroupedExpertsTE,
    MoE,
    SharedExperts,
    activate,
    add_bias,
    grouped_matmul,
    permute,
    shard_experts,
    unpermute,
)
from moebius.torch_frontend.dispatch import Sent

D, E, K, T = 8, 4, 2, 7
LOOP, TWICE = BackendConfig(experts="loop"), BackendConfig(double_backward=True)
Tensors = dict[str, torch.Tensor]

# torch of itself, where forward mode begins (2.13).
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def config(**changes: Any) -> MoEConfig:
    sizes = {"n_routed_experts": E, "n_activated_experts": K, "dim": D, "moe_inter_dim": 6}
    return MoEConfig(**{**sizes, "dtype": "float32", "expert_bias": True, "n_shared_experts": 1, **changes})


LAYERS: dict[str, Any] = {
    "GroupedExperts": lambda: GroupedExperts(config()),
    "GroupedExpertsDeepEP": lambda: GroupedExpertsDeepEP(config(), LOOP),
    "GroupedExpertsTE": lambda: GroupedExpertsTE(config(), LOOP),
    "by steps": lambda: GroupedExperts(config(), TWICE),
    "MoE": lambda: MoE(config()),
    "MoE by steps": lambda: MoE(config(), TWICE),
    "SharedExperts": lambda: SharedExperts(config()),
}
layers = pytest.mark.parametrize("kind", LAYERS)
twice = pytest.mark.parametrize("kind", ["by steps", "MoE by steps", "SharedExperts"])
once = pytest.mark.parametrize("kind", ["GroupedExperts", "MoE"])


def drawn(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return layer


def arguments(seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(T, D, generator=generator), torch.rand(T, K, generator=generator)
    return x, torch.arange(T) != 2, weights, torch.randint(-1, E + 1, (T, K), generator=generator)


class Case:
    """A layer as functions of its parameters and x."""

    def __init__(self, kind: str):
        self.layer = drawn(LAYERS[kind]())
        self.x, *routes = arguments()
        self.dense = not hasattr(self.layer, "backend_name")  # has dense layers too, and takes x alone
        self.routes = [] if self.dense else routes
        self.own: Tensors = {name: value.detach() for name, value in self.layer.named_parameters()}

    def __call__(self, own: Tensors, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = functional_call(self.layer, own, (x, *self.routes))
        return y

    def loss(self, own: Tensors, x: torch.Tensor) -> torch.Tensor:
        y = self(own, x)
        return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() + y.square().sum()

    def gradients(self) -> tuple[Tensors, torch.Tensor]:
        """Of the loss, by an ordinary backward pass."""
        x = self.x.clone().requires_grad_()
        own = {name: value.clone().requires_grad_() for name, value in self.own.items()}
        self.loss(own, x).backward()
        return {name: value.grad for name, value in own.items()}, x.grad


def assert_same(found: Tensors, wanted: Tensors, close: bool = False) -> None:
    """Bit for bit, or where `close` but for the roundings of torch's own batched matmuls."""
    assert found.keys() == wanted.keys()
    tolerance = {} if close else {"rtol": 0.0, "atol": 0.0}
    for name, value in wanted.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, **tolerance, msg=name)


# ----------------------------------------------------------------------------------------------------------- torch.func
@layers
def test_functional_call_with_the_layers_own_parameters_is_the_layer(kind: str) -> None:
    case = Case(kind)
    other = {name: value + 1 for name, value in case.own.items()}
    assert torch.equal(case(case.own, case.x), case.layer(case.x, *case.routes))
    assert not torch.equal(case(other, case.x), case.layer(case.x, *case.routes))


@layers
def test_grad_of_torch_func_equals_backward_bit_for_bit(kind: str) -> None:
    case = Case(kind)
    own, dx = grad(case.loss, (0, 1))(case.own, case.x)
    wanted, wanted_dx = case.gradients()
    assert_same({**own, "x": dx}, {**wanted, "x": wanted_dx})


@layers
def test_vjp_of_torch_func_equals_backward_bit_for_bit(kind: str) -> None:
    case = Case(kind)
    loss, pull = vjp(case.loss, case.own, case.x)
    own, dx = pull(torch.ones_like(loss))
    wanted, wanted_dx = case.gradients()
    assert_same({**own, "x": dx}, {**wanted, "x": wanted_dx})


@layers
def test_grad_of_torch_func_inside_an_ordinary_graph_reaches_the_parameters(kind: str) -> None:
    """torch.func's x, and parameters that autograd watches from outside."""
    case = Case(kind)
    x = case.x.clone().requires_grad_()
    (vjp(lambda x: case.loss(dict(case.layer.named_parameters()), x), x)[0]).backward()
    wanted, wanted_dx = case.gradients()
    found = {name: value.grad for name, value in case.layer.named_parameters()}
    assert_same({**found, "x": x.grad}, {**wanted, "x": wanted_dx})


@layers
def test_vmap_over_batches_equals_one_after_the_other(kind: str) -> None:
    case = Case(kind)
    case.layer.eval()  # in training the gate keeps its load, which vmap would split
    batches = torch.stack([arguments(seed)[0] for seed in range(3)], 1)
    found = vmap(case, (None, 1))(case.own, batches)
    for i in range(3):
        assert_same({"y": found[i]}, {"y": case(case.own, batches[:, i])}, close=case.dense)


@layers
def test_vmap_over_parameters_equals_one_after_the_other(kind: str) -> None:
    case = Case(kind)
    case.layer.eval()
    ensemble = {name: torch.stack([value, 2 * value]) for name, value in case.own.items()}
    found = vmap(case, (0, None))(ensemble, case.x)
    for i in range(2):
        wanted = case({name: value[i] for name, value in ensemble.items()}, case.x)
        assert_same({"y": found[i]}, {"y": wanted}, close=case.dense)


@layers
def test_gradients_of_each_batch_by_vmap_of_grad_equal_backward(kind: str) -> None:
    case = Case(kind)
    case.layer.eval()
    batches = torch.stack([arguments(seed)[0] for seed in range(3)])
    found = vmap(grad(case.loss), (None, 0))(case.own, batches)
    for i in range(3):
        wanted = grad(case.loss)(case.own, batches[i])
        assert_same({name: value[i] for name, value in found.items()}, wanted, close=case.dense)


@pytest.mark.parametrize("kind", ["GroupedExperts", "by steps", "SharedExperts"])
def test_jacobian_by_torch_func_equals_that_of_autograd(kind: str) -> None:
    case = Case(kind)
    found = jacrev(lambda x: case(case.own, x))(case.x)
    wanted = torch.autograd.functional.jacobian(lambda x: case(case.own, x), case.x)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted)


@twice
def test_second_derivatives_by_torch_func_equal_those_of_autograd(kind: str) -> None:
    case = Case(kind)

    def slope(own: Tensors, x: torch.Tensor) -> torch.Tensor:
        return grad(case.loss, 1)(own, x).square().sum()

    found, dx = grad(slope, (0, 1))(case.own, case.x)
    x = case.x.clone().requires_grad_()
    own = {name: value.clone().requires_grad_() for name, value in case.own.items()}
    (first,) = torch.autograd.grad(case.loss(own, x), x, create_graph=True)
    wanted = torch.autograd.grad(first.square().sum(), [*own.values(), x])
    for one, other in zip([*found.values(), dx], wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


@once
def test_second_derivatives_without_the_switch_are_refused_with_its_name(kind: str) -> None:
    case = Case(kind)
    with pytest.raises(Unsupported, match=r"do: set BackendConfig\(double_backward=True\)"):
        grad(lambda x: grad(case.loss, 1)(case.own, x).square().sum())(case.x)


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("kind", ["GroupedExperts", "by steps"])
def test_several_gradients_in_one_equal_one_after_the_other(kind: str, how: str) -> None:
    case = Case(kind)
    dys = torch.stack([torch.randn(T, D, generator=torch.Generator().manual_seed(i)) for i in range(3)])

    def gradient(dy: torch.Tensor, **settings: Any) -> torch.Tensor:
        x = case.x.clone().requires_grad_()
        return torch.autograd.grad(case(case.own, x), x, dy, **settings)[0]

    if how == "vmap":
        x = case.x.clone().requires_grad_()
        y = case(case.own, x)
        found = vmap(lambda dy: torch.autograd.grad(y, x, dy)[0])(dys)
    else:
        found = gradient(dys, is_grads_batched=True)
    for i in range(3):
        assert torch.equal(found[i], gradient(dys[i]))


# --------------------------------------------------------------------------------------------------------- forward mode
@layers
def test_forward_mode_is_refused_not_answered_with_zeros(kind: str) -> None:
    case = Case(kind)
    with pytest.raises(Unsupported, match="found: a backward pass alone\ndo: use reverse mode"):
        jvp(lambda x: case(case.own, x), (case.x,), (torch.ones_like(case.x),))
    with pytest.raises(Unsupported, match="asked: forward-mode differentiation"), forward_ad.dual_level():
        case(case.own, forward_ad.make_dual(case.x, torch.ones_like(case.x)))


def test_forward_mode_of_a_parameter_alone_is_refused_too() -> None:
    case = Case("GroupedExperts")
    with pytest.raises(Unsupported, match="forward-mode"), forward_ad.dual_level():
        down = forward_ad.make_dual(case.own["down_projs"], torch.ones(E, 6, D))
        case({**case.own, "down_projs": down}, case.x)


def test_layer_inside_a_level_of_forward_mode_without_tangents_is_computed() -> None:
    case = Case("MoE")
    wanted = case(case.own, case.x)
    with forward_ad.dual_level():
        assert torch.equal(case(case.own, case.x), wanted)


def _steps(x: torch.Tensor) -> dict[str, Any]:
    """Every public step that is an operator, as a function of a float tensor."""
    ids = torch.tensor([[0, 1]] * T, dtype=torch.int32)
    sent = Sent(x, torch.ones(T, K), ids)
    rows, _, sizes, row_experts, state = permute(sent, E)
    return {
        "permute": lambda x: permute(Sent(x, torch.ones(T, K), ids), E).rows_RD,
        "unpermute": lambda x: unpermute(x.repeat(2, 1), state),
        "grouped_matmul": lambda x: grouped_matmul(x.repeat(2, 1), torch.ones(E, D, 3), sizes),
        "activate": lambda x: activate(x, None, config().activation),
        "add_bias": lambda x: add_bias(rows, x[:E], row_experts),
    }


@pytest.mark.parametrize("step", _steps(torch.ones(T, D)))
def test_step_under_torch_func_has_its_gradient_and_refuses_forward_mode(step: str) -> None:
    x = arguments()[0]
    function = _steps(x)[step]
    leaf = x.clone().requires_grad_()
    function(leaf).square().sum().backward()
    assert leaf.grad.abs().max() > 0
    assert torch.equal(grad(lambda x: function(x).square().sum())(x), leaf.grad)
    with pytest.raises(Unsupported, match="forward-mode"):
        jvp(function, (x,), (x,))


# ------------------------------------------------------------------------------------------------------ copies, pickles
MODULES: dict[str, Any] = {**{kind: LAYERS[kind] for kind in list(LAYERS)[:5]}, "Gate": lambda: Gate(config())}
modules = pytest.mark.parametrize("kind", MODULES)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}
copies = pytest.mark.parametrize("how", COPIES)


def called(module: Any) -> torch.Tensor:
    given = arguments()
    y = module(*(given if hasattr(module, "backend_name") else given[:2] if isinstance(module, Gate) else given[:1]))
    return y[0] if isinstance(y, tuple) else y


@modules
@copies
@pytest.mark.parametrize("used", [False, True], ids=["new", "after_a_step"])
def test_copy_of_a_module_computes_the_same_and_shares_nothing(kind: str, how: str, used: bool) -> None:
    module = drawn(MODULES[kind]())
    first = next(iter(module.parameters()))
    first.requires_grad_(False)
    if used:
        y = called(module)
        y.sum().backward() if y.requires_grad else None
    made = COPIES[how](module)
    assert torch.equal(called(made), called(module))
    for (name, value), other in zip(module.named_parameters(), made.parameters(), strict=True):
        assert value.requires_grad == other.requires_grad and value.data_ptr() != other.data_ptr(), name
    with torch.no_grad():
        first.add_(1)
    assert not torch.equal(called(made), called(module))


def doubled(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return 2 * hidden[:, :6] * weights


@copies
@pytest.mark.parametrize("kind", ["GroupedExperts", "GroupedExpertsDeepEP", "GroupedExpertsTE"])
@pytest.mark.parametrize("own", [False, True], ids=["callers", "the_configs"])
def test_copy_of_a_module_with_an_assigned_activation_keeps_it(kind: str, how: str, own: bool) -> None:
    module = drawn(MODULES[kind]())
    name = "expert_activation_grouped" if kind == "GroupedExperts" else "expert_activation"
    before = called(module)
    setattr(module, name, getattr(module, name) if own else doubled)
    made = COPIES[how](module)
    assert torch.equal(called(made), called(module))
    assert torch.equal(called(made), before) == own


def _copied() -> dict[str, Any]:
    """On each rank: copies of sharded modules."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, found = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("ep",)), {}
    made = {
        "GroupedExperts": shard_experts(drawn(LAYERS["GroupedExperts"]()), mesh),
        "GroupedExpertsDeepEP": drawn(GroupedExpertsDeepEP(config(), LOOP, dispatcher_backend="torch")),
        "GroupedExpertsTE": drawn(GroupedExpertsTE(config(), LOOP, dispatcher_backend="torch")),
    }
    made["GroupedExpertsDeepEP"].init_token_dispatcher(mesh)
    made["GroupedExpertsTE"].init_token_dispatcher(mesh, mesh)
    for kind, module in made.items():
        module.down_projs.requires_grad_(False)
        other = copy.deepcopy(module)
        same = torch.equal(called(other), called(module)) and not other.down_projs.requires_grad
        with torch.no_grad():
            other.gate_and_up_projs.zero_()
        found[kind] = same, not torch.equal(called(other), called(module)), type(other) is type(module)
    return found


@cache
def _facts(n: int) -> list[dict[str, Any]]:
    return ranks.run(_copied, n)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["GroupedExperts", "GroupedExpertsDeepEP", "GroupedExpertsTE"])
def test_deepcopy_of_sharded_experts_computes_the_same_over_the_same_ranks(kind: str, n: int) -> None:
    assert [facts[kind] for facts in _facts(n)] == [(True, True, True)] * n


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("backend", [LOOP, BackendConfig(experts="grouped_mm")])
def test_layer_traced_by_torch_jit_computes_other_routes_than_those_it_was_traced_with(backend: BackendConfig) -> None:
    config = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=6)
    layer = GroupedExperts(config, backend)
    generator = torch.Generator().manual_seed(0)

    def given() -> tuple[torch.Tensor, ...]:
        ids = torch.rand(T, E, generator=generator).topk(K).indices
        x, weights = torch.randn(T, D, generator=generator), torch.rand(T, K, generator=generator)
        return x.to(torch.bfloat16), torch.ones(T, dtype=torch.bool), weights, ids

    with torch.no_grad():
        traced, other = torch.jit.trace(layer, given(), check_trace=False), given()
        torch.testing.assert_close(traced(*other), layer(*other), rtol=0, atol=0)
