"""Which backend None means on a GPU that was measured: one for a whole layer, in both passes and in both forms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moebius.core import BackendConfig, BackendUnavailable, MoEConfig, measured
from moebius.core.dispatchers import routed_share
from moebius.core.registry import of_layer
from moebius.torch_frontend import GroupedExperts, experts, grouped_matmul, matmul
from moebius.torch_frontend.matmul import Kernels, choose

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=16, moe_inter_dim=8, dtype="float32")
UP, DOWN = (4, 16, 16), (4, 8, 16)
RUN = measured.Run(
    frontend="torch", date="2026-01-01", device="G", capability=(9, 0), dtype="bfloat16", versions="v", command="c"
)


def point(tokens, **tflops):
    sizes = {"n_experts": 4, "k": 2, "dim": 16, "inter_dim": 8, "tokens": tokens}
    return measured.Point(run=RUN, layer="layer", tflops={name: (one, one) for name, one in tflops.items()}, **sizes)


@pytest.fixture
def hopper(monkeypatch):
    """The CPU in the guise of a Hopper GPU on which "triton" wins from 16 rows an expert on.

    Every backend computes as "loop" does; `used` are the names of those that were.
    """
    pytest.importorskip("triton")
    points = (point(2, triton=1.0, grouped_mm=9.0), point(2048, triton=9.0, grouped_mm=1.0))
    gpu = SimpleNamespace(kind="cuda", capability=(9, 0), used=[])
    loop = matmul.BACKENDS.implementation(matmul.BACKENDS["loop"])

    def recorded(name):
        def ran(function):
            return lambda *args: gpu.used.append(name) or function(*args)

        return Kernels(loop.prepare, ran(loop.product), ran(loop.weight_gradient))

    monkeypatch.setattr(matmul.BACKENDS, "_loaded", {name: recorded(name) for name in ("grouped_mm", "triton", "loop")})
    monkeypatch.setattr(measured, "read", lambda: points)
    monkeypatch.setattr(matmul, "_kind", lambda device: gpu.kind)
    monkeypatch.setattr(matmul, "_capability", lambda device: gpu.capability)
    matmul._choose.cache_clear()
    yield gpu
    matmul._choose.cache_clear()


def rows(dtype=torch.bfloat16, n=0):
    return torch.zeros(n, 16, dtype=dtype)


def test_choose_for_experts_takes_what_was_fastest_at_such_rows(hopper) -> None:
    assert choose(None, rows(), UP, DOWN).name == "triton"  # many
    assert choose(None, rows(), UP, DOWN, 4096).name == "triton"
    assert choose(None, rows(), UP, DOWN, 4).name == "grouped_mm"
    assert choose(None, rows(torch.float16), UP, DOWN).name == "triton"
    assert choose("grouped_mm", rows(), UP, DOWN, 4096).name == "grouped_mm"


def test_choose_where_nothing_was_measured_takes_what_is_declared_first(hopper) -> None:
    assert choose(None, rows(), UP).name == "grouped_mm"  # a product alone
    assert choose(None, rows(torch.float32), UP, DOWN).name == "grouped_mm"
    assert choose(None, rows(torch.float64), UP, DOWN).name == "loop"
    hopper.capability = (8, 0)
    assert choose(None, rows(), UP, DOWN).name == "grouped_mm"
    hopper.kind = "rocm"
    assert choose(None, rows(), UP, DOWN).name == "grouped_mm"


def test_choose_of_changing_rows_asks_once_for_each_power_of_two(hopper) -> None:
    for n in range(1400, 3000):  # next to 1024, from 1449 on 2048, from 2897 on 4096
        choose(None, rows(), UP, DOWN, n)
    assert matmul._choose.cache_info().misses == 3


@pytest.mark.parametrize(("n", "name"), [(4, "grouped_mm"), (4096, "triton")])
def test_choose_by_of_layer_is_that_of_the_layer_for_either_product(hopper, n, name) -> None:
    told = of_layer(None, CONFIG)
    assert [choose(told, rows(n=n), shape).name for shape in (UP, DOWN, (4, 16, 8))] == [name] * 3


def layer(double_backward, tokens, dtype=torch.bfloat16, compiled=False):
    """Output and the gradient of x of one random layer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    p = {"gate_and_up_projs": normal(*UP), "down_projs": normal(*DOWN)}
    x, weights = normal(tokens, 16).requires_grad_(), normal(tokens, 2)
    ids = torch.stack([torch.arange(tokens) % 4, torch.arange(1, tokens + 1) % 4], 1)
    run = torch.compile(experts, backend="aot_eager", fullgraph=True) if compiled else experts
    mask = torch.ones(tokens, dtype=torch.bool)
    y = run(
        {n: w.requires_grad_() for n, w in p.items()},
        x,
        mask,
        weights,
        ids,
        config=CONFIG,
        double_backward=double_backward,
    )
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("double_backward", [False, True])
@pytest.mark.parametrize(("tokens", "name"), [(2, "grouped_mm"), (600, "triton")])
def test_experts_take_one_backend_in_both_passes_and_forms(hopper, tokens, name, double_backward, compiled) -> None:
    torch.compiler.reset()
    layer(double_backward, tokens, compiled=compiled)
    assert len(hopper.used) == 6 and set(hopper.used) == {name}  # of two products and four gradients


def test_experts_by_a_measured_backend_equal_those_by_its_name(hopper) -> None:
    found, hopper.capability = layer(False, 600), (8, 0)
    for one, other in zip(found, layer(False, 600), strict=True):
        assert torch.equal(one, other)
    assert set(hopper.used) == {"triton", "grouped_mm"}


def test_grouped_matmul_alone_takes_what_is_declared_first(hopper) -> None:
    grouped_matmul(rows(n=2048), torch.zeros(UP, dtype=torch.bfloat16), torch.full((4,), 512, dtype=torch.int32))
    assert hopper.used == ["grouped_mm"]


def test_backend_name_is_the_choice_for_many_tokens_where_the_parameters_are(hopper) -> None:
    module = GroupedExperts(CONFIG, dtype=torch.bfloat16)
    assert module.backend_name == "triton" and "backend=triton" in repr(module)
    hopper.kind, hopper.capability = "cpu", None  # as after .to("cpu")
    assert module.backend_name == "grouped_mm"
    assert GroupedExperts(CONFIG, BackendConfig(experts="loop")).backend_name == "loop"


def test_default_of_some_experts_goes_by_the_routes_that_they_get(hopper) -> None:
    told = of_layer(None, CONFIG, routed_share("tokens", 128, 2))
    assert choose(of_layer(None, CONFIG), rows(), UP, DOWN, 512).name == "triton"
    assert choose(told, rows(), UP, DOWN, 512).name == "grouped_mm"


def test_triton_without_gluon_is_broken_where_there_is_a_hopper_gpu(hopper, monkeypatch) -> None:
    def no_gluon(name):
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(matmul.BACKENDS, "_loaded", {"grouped_mm": matmul.BACKENDS._loaded["grouped_mm"]})
    monkeypatch.setattr(matmul.BACKENDS, "_broken", {})
    monkeypatch.setattr(matmul, "import_module", no_gluon)
    monkeypatch.setattr(matmul, "_capabilities", lambda: [(8, 0), (9, 0)])
    assert choose(None, rows(), UP, DOWN, 4096).name == "grouped_mm"
    with pytest.raises(BackendUnavailable, match=r"no module moebius\.core\.kernels\.fused_hopper"):
        choose("triton", rows(), UP, DOWN, 4096)
    monkeypatch.setattr(matmul.BACKENDS, "_broken", {})
    monkeypatch.setattr(matmul, "_capabilities", lambda: [(8, 0)])
    matmul._choose.cache_clear()
    assert choose("triton", rows(), UP, DOWN, 4096).name == "triton"
