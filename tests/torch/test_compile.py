"""torch.compile of whole layers: no graph break, few graphs for many numbers of tokens, the bits of eager."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from moebius.core import BackendConfig, MoEConfig
from moebius.torch_frontend import GroupedExperts, GroupedExpertsDeepEP, MoE

# Dynamo itself instantiates the autograd function of the auxiliary loss, and warns of it (torch 2.13).
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

D, K = 16, 2
# A first number, then others: dynamic. One token and none are graphs of their own in torch.compile.
TOKENS = (7, 12, 64, 33, 2, 1, 0)
GRAPHS = 4
# g++ takes its time for each graph: one token and none by inductor for experts in bfloat16 alone, else by aot_eager.
SEVERAL = tuple(tokens for tokens in TOKENS if tokens > 1)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


def config(dtype: str, **changes: Any) -> MoEConfig:
    sizes = {"n_routed_experts": 4, "n_activated_experts": K, "dim": D, "moe_inter_dim": 8}
    return MoEConfig(**{**sizes, "dtype": dtype, "expert_bias": True, **changes})


def drawn(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return layer


def arguments(layer: Any, tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D, generator=generator).to(next(layer.parameters()).dtype).requires_grad_()
    if isinstance(layer, MoE):
        return (x,)
    weights = torch.rand(tokens, K, generator=generator).requires_grad_()
    return x, torch.arange(tokens) % 5 != 2, weights, torch.randint(-1, 5, (tokens, K), generator=generator)


def run(function: Any, layer: Any, tokens: int) -> dict[str, torch.Tensor]:
    """Output and every gradient."""
    layer.zero_grad()
    given = arguments(layer, tokens)
    y = function(*given)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    leaves = {str(i): value.grad for i, value in enumerate(given) if value.requires_grad}
    return {"y": y.detach(), **leaves, **{name: value.grad for name, value in layer.named_parameters()}}


def check(
    layer: Any,
    compiler: str,
    tolerance: float = 0.0,
    function: Any = None,
    numbers: tuple[int, ...] = TOKENS,
    dynamic: bool | None = None,
) -> None:
    """Compiled, `function` of the layer, by default the layer itself, equals eager for all `numbers` in few graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function or layer, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in numbers:
        found, wanted = run(compiled, layer, tokens), run(function or layer, layer, tokens)
        for name, value in wanted.items():
            assert value.abs().max() > 0 if tokens > 2 else value is not None, name
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=f"{name}, T={tokens}")
    assert 1 <= counter.frame_count <= GRAPHS


@pytest.mark.parametrize(
    "backend, dtype, compiler",
    [
        pytest.param("grouped_mm", "bfloat16", "inductor", marks=needs_compiler),
        pytest.param("grouped_mm", "float16", "inductor", marks=needs_compiler),
        pytest.param("grouped_mm", "float32", "inductor", marks=needs_compiler),
        ("grouped_mm", "bfloat16", "aot_eager"),
        ("loop", "float32", "aot_eager"),
    ],
)
def test_experts_compiled_equal_eager_bit_for_bit(backend: str, dtype: str, compiler: str) -> None:
    numbers = SEVERAL if compiler == "inductor" and dtype != "bfloat16" else TOKENS
    check(drawn(GroupedExperts(config(dtype), BackendConfig(experts=backend))), compiler, numbers=numbers)


def test_experts_without_biases_compiled_equal_eager_bit_for_bit() -> None:
    check(drawn(GroupedExpertsDeepEP(config("bfloat16", expert_bias=False))), "aot_eager")


@pytest.mark.parametrize("dtype, after", [("bfloat16", True), ("float32", False)], ids=["after_down", "before_down"])
def test_experts_with_double_backward_compiled_equal_eager_bit_for_bit(dtype: str, after: bool) -> None:
    c = config(dtype, apply_router_weight_after_down=after)
    check(drawn(GroupedExperts(c, BackendConfig(double_backward=True))), "aot_eager")


def test_experts_with_an_activation_of_the_callers_compiled_equal_eager() -> None:
    layer = drawn(GroupedExperts(config("float32")))
    layer.expert_activation_grouped = lambda hidden, weights: torch.tanh(hidden[:, :8]) * hidden[:, 8:] * weights
    check(layer, "aot_eager")


@pytest.mark.parametrize("dtype, backend", [("bfloat16", "grouped_mm"), ("float32", "loop")])
def test_moe_compiled_equals_eager_bit_for_bit(dtype: str, backend: str) -> None:
    c = config(dtype, n_shared_experts=1, aux_loss_coeff=0.1, score_func="sigmoid", gate_bias_update_factor=0.1)
    check(drawn(MoE(c, BackendConfig(experts=backend))), "aot_eager")


@needs_compiler
def test_moe_compiled_by_inductor_equals_eager_but_for_the_routers_roundings() -> None:
    """In one graph for any number of tokens: that of the first alone is here with aot_eager and with the experts."""
    layer = drawn(MoE(config("float32", n_shared_experts=1)))
    check(layer, "inductor", tolerance=1e-5, numbers=SEVERAL, dynamic=True)


def test_moe_with_double_backward_compiled_equals_eager_bit_for_bit() -> None:
    check(drawn(MoE(config("float32"), BackendConfig(double_backward=True))), "aot_eager")


def test_experts_checkpointed_inside_compiled_code_equal_eager_bit_for_bit() -> None:
    layer = drawn(GroupedExperts(config("bfloat16")))
    check(layer, "aot_eager", function=lambda *given: checkpoint(layer, *given, use_reentrant=False))


def test_experts_under_autocast_inside_compiled_code_equal_eager_bit_for_bit() -> None:
    layer = drawn(GroupedExperts(config("float32")))

    def cast(*given: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: torch.Tensor = layer(*given)
        return y

    assert cast(*arguments(layer, 7)).dtype == torch.bfloat16
    check(layer, "aot_eager", function=cast)


def test_experts_compiled_without_gradients_equal_eager_bit_for_bit() -> None:
    torch.compiler.reset()
    layer = drawn(GroupedExperts(config("bfloat16")))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        for tokens in (7, 12):
            with mode():
                found = compiled(*arguments(layer, tokens))
            assert torch.equal(found, layer(*arguments(layer, tokens))) and not found.requires_grad


def test_two_layers_and_the_callers_steps_in_one_graph_equal_eager_bit_for_bit() -> None:
    one, two = (drawn(GroupedExperts(config("float32"))) for _ in range(2))
    model = torch.nn.ModuleList([one, two])

    def deep(x: torch.Tensor, *routes: torch.Tensor) -> torch.Tensor:
        return two(torch.nn.functional.rms_norm(x + one(x, *routes), (D,)), *routes)

    torch.compiler.reset()
    compiled = torch.compile(deep, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (compiled, deep):
        model.zero_grad()
        x, *routes = arguments(one, 9)
        function(x, *routes).square().sum().backward()
        grads.append([x.grad, *(value.grad for value in model.parameters())])
    assert all(torch.equal(found, wanted) for found, wanted in zip(*grads, strict=True))


# Dynamo looks at the gradients of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_experts_whose_backward_is_compiled_on_its_own_have_the_gradients_of_eager() -> None:
    """Compiled autograd: Dynamo traces the backward pass as it runs."""
    torch.compiler.reset()
    layer = drawn(GroupedExperts(config("float32")))

    def step(*given: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(*given)
        y.square().sum().backward()
        return y

    with torch._dynamo.config.patch(compiled_autograd=True):
        given = arguments(layer, 7)
        torch.compile(step, backend="aot_eager")(*given)
    found = [given[0].grad, *(value.grad for value in layer.parameters())]
    layer.zero_grad()
    given = arguments(layer, 7)
    step(*given)
    wanted = [given[0].grad, *(value.grad for value in layer.parameters())]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
