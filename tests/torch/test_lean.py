"""The experts as one operator: bit for bit the steps that it stands for, what it keeps, and that it spoils nothing."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from sides import Problem, cached_problem, expected
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from moebius.core import BackendConfig, MoEConfig, Unsupported
from moebius.core.activations import CONFIG_ACTIVATIONS
from moebius.core.tolerance import within
from moebius.torch_frontend import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, experts, matmul
from moebius.torch_frontend.activate import activate_rows, activate_rows_backward
from moebius.torch_frontend.lean import _experts, _experts_backward

E, K, D, I, T = 4, 2, 16, 8, 23
DTYPES = ("float32", "bfloat16", "float16")
LOOP = BackendConfig(experts="loop")
Tensors = dict[str, Any]


def config(dtype: str = "float32", **changes: Any) -> MoEConfig:
    sizes = {"n_routed_experts": E, "n_activated_experts": K, "dim": D, "moe_inter_dim": I}
    return MoEConfig(**{**sizes, "dtype": dtype, "expert_bias": True, **changes})


def module(c: MoEConfig, backend: str = "grouped_mm", double: bool = False) -> GroupedExperts:
    """Drawn alike at every call, the biases too."""
    layer = GroupedExperts(c, BackendConfig(experts=backend, double_backward=double))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layer


def inputs(dtype: str = "float32", tokens: int = T, seed: int = 1, weights_dtype: str = "float32") -> Tensors:
    """x and weights with gradients; masked tokens, ids of no expert, one expert without a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E + 1, (tokens, K), generator=generator)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, K, generator=generator, dtype=torch.float64)
    return {
        "x": x.to(getattr(torch, dtype)).requires_grad_(),
        "token_mask": torch.arange(tokens) % 5 != 2,
        "weights": weights.to(getattr(torch, weights_dtype)).requires_grad_(),
        "indices": torch.where(ids == 1, 3, ids),
    }


def upstream(y: torch.Tensor) -> torch.Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)


def gradients(layer: Any, given: Tensors) -> Tensors:
    found = {name: given[name].grad for name in ("x", "weights")}
    return found | {name: value.grad for name, value in layer.named_parameters()}


def run(layer: Any, given: Tensors) -> Tensors:
    """The output and every gradient of one pass."""
    y = layer(**given)
    y.backward(upstream(y))
    return {"y": y.detach(), **gradients(layer, given)}


def assert_same(found: Tensors, wanted: Tensors, names: Any = None) -> None:
    for name in names or wanted:
        if wanted[name] is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0, msg=name)


def both(c: MoEConfig, backend: str = "grouped_mm", **settings: Any) -> list[Tensors]:
    """By the operator, and by the steps."""
    return [run(module(c, backend, double), inputs(c.dtype, **settings)) for double in (False, True)]


# ------------------------------------------------------------------------------------------------------- equal to steps
@pytest.mark.parametrize("dtype, backend", [*product(DTYPES, ("grouped_mm", "loop")), ("float64", "loop")])
@pytest.mark.parametrize("activation", CONFIG_ACTIVATIONS)
def test_lean_equals_the_steps_bit_for_bit(activation: str, dtype: str, backend: str) -> None:
    for bias in (False, True):
        found, wanted = both(config(dtype, expert_activation=activation, expert_bias=bias), backend)
        assert all(value.abs().max() > 0 for value in wanted.values())
        assert_same(found, wanted)


@pytest.mark.parametrize("tokens", [0, 1, T])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lean_weighted_after_down_equals_the_steps_in_output_and_both_agree_with_reference(
    dtype: str, bias: bool, tokens: int
) -> None:
    p = cached_problem(tokens=tokens, dtype=dtype, expert_bias=bias, apply_router_weight_after_down=True)
    exact, limits = expected(p)
    found = [of_problem(p, double) for double in (False, True)]
    assert torch.equal(found[0]["y"], found[1]["y"])
    for answer, (name, value) in product(found, exact.items()):
        assert within(answer[name].double().numpy(), value, limits[name]), name


def of_problem(p: Problem, double: bool) -> Tensors:
    """y and every gradient, by the names of the reference."""
    dtype = getattr(torch, p.dtype)
    own = {name: torch.from_numpy(value).to(dtype).requires_grad_() for name, value in p.parameters.items()}
    x = torch.from_numpy(p.x).to(dtype).requires_grad_()
    weights = torch.from_numpy(p.weights).float().requires_grad_()
    routes = torch.from_numpy(p.token_mask), weights, torch.from_numpy(p.ids)
    y = experts(own, x, *routes, config=p.config, backend="grouped_mm", double_backward=double)
    y.backward(torch.from_numpy(p.dy).to(dtype))
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **{n: v.grad for n, v in own.items()}}


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_lean_of_no_token_and_of_one_equals_the_steps(backend: str, tokens: int) -> None:
    found, wanted = both(config("bfloat16"), backend, tokens=tokens)
    assert_same(found, wanted)


CLAMPED = ({"swiglu_limit": 0.2}, {"expert_activation": "quick_geglu", "activation_limit": 0.1})


@pytest.mark.parametrize("clamped", CLAMPED, ids=["swiglu", "quick_geglu"])
def test_lean_of_a_clamped_activation_equals_the_steps(clamped: dict[str, Any]) -> None:
    found, wanted = both(config(**clamped))
    assert_same(found, wanted)


def test_lean_with_bfloat16_weights_returns_their_gradient_in_bfloat16() -> None:
    found, wanted = both(config("bfloat16"), weights_dtype="bfloat16")
    assert found["weights"].dtype == torch.bfloat16
    assert_same(found, wanted)


LEAVES = ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias", "x", "weights")


@pytest.mark.parametrize("frozen", LEAVES)
def test_lean_with_one_input_frozen_leaves_the_other_gradients(frozen: str) -> None:
    wanted, layer, given = run(module(config()), inputs()), module(config()), inputs()
    {**dict(layer.named_parameters()), **given}[frozen].requires_grad_(False)
    assert_same(run(layer, given), {**wanted, frozen: None})


@pytest.mark.parametrize("alone", LEAVES)
def test_lean_with_all_inputs_frozen_but_one_gives_its_gradient(alone: str) -> None:
    wanted, layer, given = run(module(config()), inputs()), module(config()), inputs()
    trained = {**dict(layer.named_parameters()), "x": given["x"], "weights": given["weights"]}
    for name, value in trained.items():
        value.requires_grad_(name == alone)
    assert_same(run(layer, given), {name: value if name in ("y", alone) else None for name, value in wanted.items()})


def test_lean_without_any_gradient_gives_the_same_output() -> None:
    layer, given = module(config()), inputs()
    wanted = layer(**given)
    with torch.no_grad():
        found = layer(**given)
    with torch.inference_mode():
        inferred = layer(**given)
    assert not found.requires_grad and torch.equal(found, wanted) and torch.equal(inferred, wanted)


# ----------------------------------------------------------------------------------- what is kept stays until it may go
@pytest.mark.parametrize("double", [False, True], ids=["lean", "steps"])
def test_backward_twice_through_a_retained_graph_gives_the_same_gradients(double: bool) -> None:
    layer, given = module(config(), double=double), inputs()
    wanted = run(module(config(), double=double), inputs())
    y = layer(**given)
    for retain in (True, True, False):
        y.backward(upstream(y), retain_graph=retain)
        assert_same({"y": y.detach(), **gradients(layer, given)}, wanted)
        layer.zero_grad()
        given["x"].grad = given["weights"].grad = None


def test_backward_of_a_graph_that_was_let_go_is_refused_by_torch() -> None:
    y = module(config())(**inputs())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_backward_for_x_first_and_for_the_parameters_later_gives_the_same_gradients() -> None:
    """As pipelines that split the backward pass do."""
    layer, given = module(config()), inputs()
    wanted = run(module(config()), inputs())
    y = layer(**given)
    routed, own = [given["x"], given["weights"]], dict(layer.named_parameters())
    found = dict(zip(("x", "weights"), torch.autograd.grad(y, routed, upstream(y), retain_graph=True), strict=True))
    found |= dict(zip(own, torch.autograd.grad(y, list(own.values()), upstream(y)), strict=True))
    assert_same(found, wanted, found)


def test_backward_of_create_graph_gives_the_same_gradients() -> None:
    layer, given = module(config()), inputs()
    wanted = run(module(config()), inputs())
    y = layer(**given)
    leaves = {**{name: given[name] for name in ("x", "weights")}, **dict(layer.named_parameters())}
    found = torch.autograd.grad(y, list(leaves.values()), upstream(y), create_graph=True)
    assert_same(dict(zip(leaves, found, strict=True)), wanted, leaves)


def test_backward_of_create_graph_without_retain_graph_is_the_operators_too() -> None:
    layer, given = module(config()), inputs()
    (dx,) = torch.autograd.grad(layer(**given).square().sum(), given["x"], create_graph=True, retain_graph=False)
    with pytest.raises(Unsupported, match="double_backward=True"):
        dx.sum().backward()


def test_module_called_twice_before_backward_adds_both_gradients() -> None:
    layer, one, two = module(config()), inputs(seed=1), inputs(seed=5)
    apart = [run(module(config()), given) for given in (inputs(seed=1), inputs(seed=5))]
    y, z = layer(**one), layer(**two)
    torch.autograd.backward([y, z], [upstream(y), upstream(z)])
    assert_same({"x": one["x"].grad, "weights": one["weights"].grad}, apart[0], ["x", "weights"])
    assert_same({"x": two["x"].grad, "weights": two["weights"].grad}, apart[1], ["x", "weights"])
    for name, value in layer.named_parameters():
        torch.testing.assert_close(value.grad, apart[0][name] + apart[1][name], msg=name)


def test_layers_one_after_the_other_have_the_gradients_of_the_steps() -> None:
    def deep(double: bool) -> Tensors:
        layers, given = [module(config(), double=double) for _ in range(3)], inputs()
        x = given["x"]
        for layer in layers:
            x = x + layer(**{**given, "x": x})
        x.backward(upstream(x))
        found = {f"{i}.{name}": p.grad for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
        return {"y": x.detach(), "x": given["x"].grad, "weights": given["weights"].grad, **found}

    assert_same(deep(False), deep(True))


def test_backward_with_saved_tensors_on_hooks_gives_the_same_gradients() -> None:
    wanted, layer, given = run(module(config()), inputs()), module(config()), inputs()
    with torch.autograd.graph.save_on_cpu():
        y = layer(**given)
    y.backward(upstream(y))
    assert_same({"y": y.detach(), **gradients(layer, given)}, wanted)


def biased_rows(group_sizes: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    ids = torch.searchsorted(group_sizes.cumsum(0), torch.arange(len(rows)), right=True).clamp(max=E - 1)
    return rows + bias[ids]


def fused_on_the_cpu(kernels: matmul.Kernels) -> matmul.Kernels:
    """`kernels` with steps fused as those for Hopper are: the pre-activation is kept with its bias."""

    def up(rows: torch.Tensor, weight: torch.Tensor, sizes: Any, row_weights: Any, activation: Any, bias: Any) -> Any:
        hidden = kernels.product(rows, weight, kernels.prepare(sizes))
        hidden = hidden if bias is None else biased_rows(sizes, hidden, bias)
        return hidden, activate_rows(hidden, row_weights, activation)

    def down(dout: torch.Tensor, weight: torch.Tensor, sizes: Any, hidden: Any, row_weights: Any, *rest: Any) -> Any:
        act = activate_rows(hidden, row_weights, rest[0])
        dact = kernels.product(dout, weight.mT, kernels.prepare(sizes))
        dhidden, dots = activate_rows_backward(dact, hidden, row_weights, rest[0])
        return dhidden, act, dots[:, None]

    def of(function: Any) -> Any:
        return lambda first, second, sizes: function(first, second, kernels.prepare(sizes))

    fused = matmul.Fused(lambda down: True, up, down)
    return matmul.Kernels(lambda sizes: sizes, of(kernels.product), of(kernels.weight_gradient), fused)


@pytest.mark.parametrize("transposed", [True, False])
def test_weights_that_hooks_hand_back_in_another_layout_give_the_same_gradients(
    transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As save_on_cpu(pin_memory=True) does: whether the kept pre-activation has its bias was said before."""
    loop = matmul.BACKENDS.implementation(matmul.BACKENDS["loop"])
    loaded = {**matmul.BACKENDS._loaded, "loop": fused_on_the_cpu(loop)}
    monkeypatch.setattr(matmul.BACKENDS, "_loaded", loaded)

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.dim() < 3:
            return value
        other = value.mT.contiguous().mT if value.is_contiguous() else value.contiguous()
        assert other.is_contiguous() != value.is_contiguous()
        return other

    def passes(hooks: Any) -> Tensors:
        layer, given = module(config(), "loop"), inputs()
        p = {name: value.detach() for name, value in layer.named_parameters()}
        if transposed:
            p["gate_and_up_projs"] = p["gate_and_up_projs"].mT.contiguous().mT
        p = {name: value.requires_grad_() for name, value in p.items()}
        with hooks:
            y = experts(p, **given, config=config(), backend="loop")
        y.backward(upstream(y))
        found = {name: value.grad for name, value in p.items()}
        return {"y": y.detach(), **found, "x": given["x"].grad, "weights": given["weights"].grad}

    found = passes(torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value))
    wanted = run(module(config(), "loop", double=True), inputs())
    for other in (found, passes(nullcontext())):
        for name, value in wanted.items():
            torch.testing.assert_close(other[name], value, msg=name)


def test_what_was_made_of_the_group_sizes_goes_with_the_backward_pass() -> None:
    y = module(config())(**inputs())
    node = y.grad_fn
    assert node.prepared[1] is not None
    y.backward(upstream(y))
    assert node.prepared == (None, None)


def test_backward_leaves_what_the_caller_gave_as_it_was() -> None:
    layer, given = module(config()), inputs()
    before = {name: value.detach().clone() for name, value in {**given, **layer.state_dict()}.items()}
    y = layer(**given)
    dy = upstream(y)
    y.backward(dy)
    assert_same({**given, **layer.state_dict(), "dy": dy}, {**before, "dy": upstream(y)})


@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_repeated_with_any_number_of_threads_give_the_same_bits(dtype: str, backend: str) -> None:
    """With the same number at every pass: a BLAS may split a sum by threads (measured: MKL, float32, 3 threads)."""
    c, tokens, before = config(dtype, dim=128, moe_inter_dim=64), 256, torch.get_num_threads()
    given = inputs(dtype, tokens)
    given["x"] = given["x"].detach().repeat(1, 8).requires_grad_()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            passes = []
            for _ in range(3):
                given["x"].grad = given["weights"].grad = None
                passes.append(run(module(c, backend), given))
            for found in passes[1:]:
                assert_same(found, passes[0])
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- bytes saved
def saved_bytes(layer: Any, given: Tensors) -> int:
    """Of what autograd keeps of one forward pass beside the parameters; each storage once, whole."""
    own = {value.untyped_storage().data_ptr() for value in layer.parameters()}
    seen: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        kept.append(value)  # so that no other tensor gets the address
        return value

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(**given)
    return sum(seen.values())


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_save_x_the_pre_activation_the_routing_weights_and_twelve_bytes_a_slot(
    dtype: str, bias: bool, after: bool
) -> None:
    c, tokens = config(dtype, expert_bias=bias, apply_router_weight_after_down=after), 64
    given, item, rows = inputs(dtype, tokens=tokens), getattr(torch, dtype).itemsize, tokens * K
    bound = item * (tokens * D + rows * 2 * I) + (3 + 1) * 4 * rows + 4 * E
    assert item * rows * 2 * I < saved_bytes(module(c), given) <= bound
    assert saved_bytes(module(c, double=True), given) > bound + item * rows * I


# ---------------------------------------------------------------------------------------------------- torch's own tests
MODULES = {
    "GroupedExperts": lambda c: GroupedExperts(c, LOOP),
    "GroupedExpertsDeepEP": lambda c: GroupedExpertsDeepEP(c, LOOP),
    "GroupedExpertsTE": lambda c: GroupedExpertsTE(c, LOOP),
}


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("kind", MODULES)
def test_modules_pass_gradcheck_in_float64(kind: str, after: bool) -> None:
    c = config("float64", dim=3, moe_inter_dim=2, apply_router_weight_after_down=after)
    layer, generator = MODULES[kind](c), torch.Generator().manual_seed(0)
    names = list(dict(layer.named_parameters()))
    values = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in layer.parameters()]
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    mask, ids = torch.arange(5) != 3, torch.tensor([[0, 2], [2, 2], [-1, 0], [0, 3], [4, 1]])

    def call(x: torch.Tensor, weights: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        own = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, own, (x, mask, weights, ids))

    assert torch.autograd.gradcheck(call, [value.requires_grad_() for value in (x, weights, *values)])


def test_backward_traced_by_make_fx_is_one_operator_and_replays_for_other_values() -> None:
    layer = module(config())

    def passes(x: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Any:
        y = layer(x, mask, weights, ids)
        return torch.autograd.grad(y, [x, weights, *layer.parameters()], torch.ones_like(y))

    graph = make_fx(passes)(*inputs(seed=1).values())
    found = [str(node.target) for node in graph.graph.nodes if "moebius" in str(node.target)]
    assert found == ["moebius.experts.default", "moebius.experts_backward.default"]
    for one, other in zip(graph(*inputs(seed=5).values()), passes(*inputs(seed=5).values()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_passes_of_fake_tensors_give_shapes_and_dtypes(inside: bool) -> None:
    with FakeTensorMode() as mode:
        layer, given = GroupedExperts(config("bfloat16")), inputs("bfloat16")
        y = layer(**given)
        dy = torch.empty_like(y)
    with mode if inside else nullcontext():
        y.backward(dy)
    assert (y.shape, y.dtype) == ((T, D), torch.bfloat16)
    for value in (given["x"], given["weights"], *layer.parameters()):
        assert (value.grad.shape, value.grad.dtype) == (value.shape, value.dtype)


@cache
def _operands() -> tuple[Any, ...]:
    layer, given = module(config()), inputs()
    told = ("silu", True, False, 1.0, None, 0.0, False, False, True, "grouped_mm")
    ids = torch.where(given["indices"] < 0, E, given["indices"]).int()
    return given["x"], given["weights"], ids, *layer.parameters(), *told


def test_operator_passes_torchs_own_checks() -> None:
    # Not "test_aot_dispatch_dynamic": it looks, after backward, at outputs that `lean` drops and backward overwrites.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_experts, _operands(), test_utils=checks)


@pytest.mark.parametrize("needs", [[True] * 6, [False, True, False, True, False, True]], ids=["all", "some"])
def test_operator_of_the_backward_pass_passes_torchs_own_checks(needs: list[bool]) -> None:
    x, weights, ids, *rest = (v.detach() if isinstance(v, torch.Tensor) else v for v in _operands())
    y, *kept = _experts(x, weights, ids, *rest)
    torch.library.opcheck(_experts_backward, (upstream(y), x, *kept, *rest, needs))
