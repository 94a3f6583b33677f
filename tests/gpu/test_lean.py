"""The experts as one operator on an NVIDIA GPU: bits, CUDA graphs, the host that never waits, and memory."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from sides import Problem, cached_problem, expected
from torch.utils.checkpoint import checkpoint

from moebius.core import BackendConfig, MoEConfig
from moebius.core.activations import CONFIG_ACTIVATIONS
from moebius.core.tolerance import within
from moebius.torch_frontend import GroupedExperts, MoE, experts

HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no NVIDIA GPU is visible")]

E, K, D, I, T = 16, 2, 128, 96, 300
Tensors = dict[str, Any]
BACKENDS = ("grouped_mm", "triton")
shorts = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test, with each of the backends that are chosen by default somewhere."""
    monkeypatch.setitem(CHOSEN, "experts", request.param)
    return str(request.param)


CHOSEN = {"experts": BACKENDS[0]}


def config(dtype: str = "bfloat16", **changes: Any) -> MoEConfig:
    sizes = {"n_routed_experts": E, "n_activated_experts": K, "dim": D, "moe_inter_dim": I}
    return MoEConfig(**{**sizes, "dtype": dtype, "expert_bias": True, **changes})


def drawn(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return layer


def module(c: MoEConfig, double: bool = False, device: str = "cuda") -> GroupedExperts:
    backend = BackendConfig(**CHOSEN, double_backward=double)
    return drawn(GroupedExperts(c, backend, device=device))


def inputs(c: MoEConfig, tokens: int = T, seed: int = 1, device: str = "cuda") -> Tensors:
    """x, mask, weights and ids, some masked, some without a route, and dy; the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, c.dtype)
    values = {
        "x": torch.randn(tokens, c.dim, generator=generator).to(dtype),
        "token_mask": torch.arange(tokens) % 7 != 3,
        "weights": torch.rand(tokens, c.n_activated_experts, generator=generator),
        "indices": torch.randint(-1, c.n_routed_experts, (tokens, c.n_activated_experts), generator=generator),
        "dy": torch.randn(tokens, c.dim, generator=generator).to(dtype),
    }
    given = {name: value.to(device) for name, value in values.items()}
    given["x"].requires_grad_()
    given["weights"].requires_grad_()
    return given


def run(layer: Any, given: Tensors) -> Tensors:
    """The output and every gradient of one pass; gradients are new tensors."""
    forget(layer, given)
    y = layer(*(given[name] for name in ("x", "token_mask", "weights", "indices")))
    y.backward(given["dy"])
    return {"y": y.detach(), **gradients(layer, given)}


def forget(layer: Any, given: Tensors) -> None:
    layer.zero_grad(set_to_none=True)
    given["x"].grad = given["weights"].grad = None


def gradients(layer: Any, given: Tensors) -> Tensors:
    found = {name: given[name].grad for name in ("x", "weights")}
    return found | {name: value.grad for name, value in layer.named_parameters()}


def assert_same(found: Tensors, wanted: Tensors, but: tuple[str, ...] = ()) -> None:
    for name, value in wanted.items():
        if name not in but:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype, once a process
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# ----------------------------------------------------------------------------------------------------------------- bits
@pytest.mark.parametrize("activation", CONFIG_ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@shorts
def test_lean_on_a_gpu_equals_the_steps_bit_for_bit(dtype: str, bias: bool, activation: str, backend: str) -> None:
    c = config(dtype, expert_bias=bias, expert_activation=activation)
    found, wanted = (run(module(c, double), inputs(c)) for double in (False, True))
    assert all(value.abs().max() > 0 for value in wanted.values())
    # Of a bias the weights' gradient is a sum over D, which a kernel adds in another order than torch; and a product
    # that is fused with the derivative sums it in blocks of its columns.
    assert_same(found, wanted, but=("weights",) if bias or backend == "triton" else ())
    torch.testing.assert_close(found["weights"], wanted["weights"])


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
@pytest.mark.parametrize("double", [False, True], ids=["lean", "steps"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lean_and_steps_on_a_gpu_agree_with_reference(dtype: str, double: bool, after: bool) -> None:
    p = cached_problem(
        tokens=64, dim=64, inter=48, n_experts=8, dtype=dtype, expert_bias=True, apply_router_weight_after_down=after
    )
    exact, limits = expected(p)
    for name, value in of_problem(p, double).items():
        assert within(value.double().cpu().numpy(), exact[name], limits[name]), name


def of_problem(p: Problem, double: bool) -> Tensors:
    """y and every gradient, by the names of the reference."""
    dtype = getattr(torch, p.dtype)

    def floating(value: Any, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.from_numpy(value).to("cuda", dtype).requires_grad_()

    own = {name: floating(value) for name, value in p.parameters.items()}
    x, weights = floating(p.x), floating(p.weights, torch.float32)
    mask, ids = torch.from_numpy(p.token_mask).cuda(), torch.from_numpy(p.ids).cuda()
    y = experts(own, x, mask, weights, ids, config=p.config, backend=CHOSEN["experts"], double_backward=double)
    y.backward(floating(p.dy).detach())
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **{n: v.grad for n, v in own.items()}}


@shorts
def test_lean_on_a_gpu_repeated_gives_the_same_bits(dtype: str) -> None:
    c = config(dtype)
    layer, given = module(c), inputs(c)
    wanted = run(layer, given)
    for _ in range(5):
        assert_same(run(layer, given), wanted)


@pytest.mark.parametrize("double", [False, True], ids=["lean", "steps"])
def test_experts_on_a_gpu_without_a_token_give_zero_gradients(double: bool) -> None:
    c = config()
    found = run(module(c, double), inputs(c, tokens=0))
    assert found["y"].shape == (0, D) and found["x"].shape == (0, D) and found["weights"].shape == (0, K)
    for name in ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"):
        assert (found[name] == 0).all(), name


@pytest.mark.parametrize("chosen", [[3], [0], [E - 1], [-1], [2, 9]], ids=["one", "first", "last", "none", "two"])
def test_experts_on_a_gpu_that_no_token_chose_get_zero_gradients(chosen: list[int]) -> None:
    c, answers = config(), []
    for double in (False, True):
        layer, given = module(c, double), inputs(c)
        given["indices"] = torch.tensor(chosen, device="cuda").repeat(T * K)[: T * K].view(T, K)
        answers.append(run(layer, given))
    assert_same(*answers, but=("weights",))
    idle = [expert for expert in range(E) if expert not in chosen]
    for name in ("gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"):
        assert (answers[0][name][idle] == 0).all(), name
        assert all(answers[0][name][expert].abs().max() > 0 for expert in chosen if expert >= 0), name


def test_backward_twice_through_a_retained_graph_on_a_gpu_gives_the_same_gradients() -> None:
    c = config()
    layer, given = module(c), inputs(c)
    wanted = run(layer, given)
    y = layer(*(given[name] for name in ("x", "token_mask", "weights", "indices")))
    for retain in (True, False):
        forget(layer, given)
        y.backward(given["dy"], retain_graph=retain)
        assert_same(gradients(layer, given), {name: value for name, value in wanted.items() if name != "y"})


@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < 2, reason="one GPU")
def test_experts_on_another_gpu_than_the_current_one_compute_there() -> None:
    c = config()
    wanted = run(module(c, device="cuda:0"), inputs(c, device="cuda:0"))
    with torch.cuda.device(0):
        found = run(module(c, device="cuda:1"), inputs(c, device="cuda:1"))
    assert {value.device.index for value in found.values()} == {1}
    assert_same({name: value.to("cuda:0") for name, value in found.items()}, wanted)


def test_experts_checkpointed_on_a_gpu_have_the_same_bits() -> None:
    c = config()
    layer, given = module(c), inputs(c)
    wanted = run(layer, given)
    forward = layer.forward
    layer.forward = partial(checkpoint, forward, use_reentrant=False)  # type: ignore[method-assign]
    assert_same(run(layer, given), wanted)


def test_experts_of_one_token_and_512_experts_on_a_gpu_agree_with_reference(backend: str) -> None:
    p = cached_problem(tokens=1, dim=64, inter=48, n_experts=512, k=8, dtype="bfloat16", expert_bias=True)
    exact, limits = expected(p)
    for name, value in of_problem(p, double=False).items():
        assert within(value.double().cpu().numpy(), exact[name], limits[name]), name


def test_experts_of_a_changed_number_of_tokens_compile_no_kernel_anew() -> None:
    """Once few tokens and many were there: those have kernels of their own."""
    if CHOSEN["experts"] != "triton":
        pytest.skip("these kernels are compiled already")
    from moebius.torch_frontend import play

    c = config()
    layer = module(c)
    for tokens in (3, 40, 5000):
        run(layer, inputs(c, tokens))
    known = set(play._compiled)
    for tokens in (1, 2, 17, 100, 301, 4999, 6001):
        run(layer, inputs(c, tokens))
    assert set(play._compiled) == known


# ------------------------------------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_experts_compiled_on_a_gpu_in_one_graph_equal_eager_bit_for_bit(dtype: str) -> None:
    torch.compiler.reset()
    c = config(dtype)
    layer = module(c)
    eager, compiled = layer.forward, torch.compile(layer.forward, fullgraph=True)
    for tokens in (T, 77, 512, 1, 0):
        answers = []
        for forward in (compiled, eager):
            layer.forward = forward  # type: ignore[method-assign]
            answers.append(run(layer, inputs(c, tokens)))
        assert_same(*answers)


# ------------------------------------------------------------------------------------------ the host and the CUDA graph
@pytest.mark.parametrize("double", [False, True], ids=["lean", "steps"])
def test_experts_on_a_gpu_never_make_the_host_wait(double: bool) -> None:
    c = config()
    layer, given = module(c, double), inputs(c)
    run(layer, given)  # compiles kernels
    with no_waiting():
        run(layer, given)


def test_moe_on_a_gpu_never_makes_the_host_wait() -> None:
    layer = drawn(MoE(config(n_shared_experts=1), BackendConfig(**CHOSEN), device="cuda"))
    x = torch.randn(4, 64, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    with no_waiting():
        layer(x).sum().backward()


@pytest.mark.parametrize("after", [False, True], ids=["before_down", "after_down"])
def test_experts_captured_in_a_cuda_graph_replay_new_data_like_eager(after: bool) -> None:
    c = config(apply_router_weight_after_down=after)
    layer, given = module(c), inputs(c)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run(layer, given)
    torch.cuda.current_stream().wait_stream(aside)
    forget(layer, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*(given[name] for name in ("x", "token_mask", "weights", "indices")))
        y.backward(given["dy"])
    held = {"y": y, **gradients(layer, given)}
    for seed in (5, 6):
        new = inputs(c, seed=seed)
        with torch.no_grad():
            for name, value in new.items():
                given[name].copy_(value)
        graph.replay()
        assert_same(held, run(module(c), new))


# --------------------------------------------------------------------------------------------------------------- memory
def test_experts_on_a_gpu_need_no_more_memory_than_rows_pre_activation_and_two_times_x() -> None:
    """Beside the inputs and the weights' gradients; K = 2 and I = D / 2, so that [R, I] is as large as [T, D]."""
    c = config(dim=2048, moe_inter_dim=1024, expert_bias=False)
    tokens, item = 8192, 2
    layer, given = module(c), inputs(c, tokens)
    run(layer, given)  # workspaces of the matmuls are held from then on
    forget(layer, given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(*(given[name] for name in ("x", "token_mask", "weights", "indices")))
    y.backward(given["dy"])
    torch.cuda.synchronize()
    of_weights = sum(value.grad.nbytes for value in layer.parameters())
    used = torch.cuda.max_memory_allocated() - before - of_weights
    rows, width, hidden = tokens * K, c.dim, 2 * c.moe_inter_dim
    kept = item * rows * hidden
    assert kept < used <= 1.05 * item * (rows * width + rows * hidden + 2 * tokens * width)
