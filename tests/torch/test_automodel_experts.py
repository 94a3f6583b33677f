"""The documented modules on one rank: numbers of the original, the reference, and what its callers rely on."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sides import Problem, cached_problem, expected, problem, rounded
from torch import nn

from moebius.core import BackendConfig, ConfigError, MoEConfig, layout
from moebius.core.tolerance import within
from moebius.torch_frontend import automodel, load_parameters
from moebius.torch_frontend.automodel import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_vectors.json").read_text())["experts"]

# Class and backend; Transformer Engine's own backend needs a GPU, but its class takes any.
KINDS: dict[str, tuple[Any, str]] = {
    "experts-loop": (GroupedExperts, "torch"),
    "experts-grouped": (GroupedExperts, "torch_mm"),
    "deepep-loop": (GroupedExpertsDeepEP, "torch"),
    "deepep-grouped": (GroupedExpertsDeepEP, "torch_mm"),
    "te-loop": (GroupedExpertsTE, "torch"),
    "te-grouped": (GroupedExpertsTE, "torch_mm"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def built(kind: str, config: MoEConfig, **backend: Any) -> Any:
    cls, name = KINDS[kind]
    return cls(config, BackendConfig(experts=name, **backend))


def run(kind: str, p: Problem, activation: Any = None) -> dict[str, np.ndarray]:
    """y, dx, dweights and each parameter's gradient of a module that holds the problem's parameters."""
    module = built(kind, p.config)
    load_parameters(module, {name: torch.from_numpy(value) for name, value in p.parameters.items()})
    if activation is not None:
        setattr(module, attribute(kind), activation)
    x, dy = (torch.from_numpy(value).to(getattr(torch, p.dtype)) for value in (p.x, p.dy))
    weights = torch.from_numpy(p.weights).to(getattr(torch, p.weights_dtype)).requires_grad_()
    y = module(x.requires_grad_(), torch.from_numpy(p.token_mask), weights, torch.from_numpy(p.ids))
    y.backward(dy)
    grads = {name: value.grad for name, value in module.named_parameters()}
    found = {"y": y, "dx": x.grad, "dweights": weights.grad, **grads}
    return {name: value.detach().double().numpy() for name, value in found.items()}


def attribute(kind: str) -> str:
    return "expert_activation_grouped" if kind.startswith("experts") else "expert_activation"


def assert_correct(kind: str, p: Problem, **settings: Any) -> None:
    exact, limits = expected(p)
    found = run(kind, p, **settings)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert within(value, exact[name], limits[name]), name


# --------------------------------------------------------------------------------------------------------- the numbers
def published_problem(case: dict[str, Any]) -> Problem:
    config = MoEConfig(**PUBLISHED["config"], **case["config"], dtype="float32")
    mask, ids = np.array(PUBLISHED["token_mask"]), np.array(PUBLISHED["ids"])
    shapes = {"x": (len(mask), config.dim), "weights": ids.shape, "dy": (len(mask), config.dim)}
    shapes |= {row.name: row.shape for row in layout.experts(config)}
    values = {}
    for name, shape in shapes.items():
        recipe = PUBLISHED["recipes"][name]
        flat = recipe["offset"] + recipe["scale"] * np.sin(recipe["seed"] + 1.37 * np.arange(np.prod(shape)))
        values[name] = rounded(flat, "float32").reshape(shape)
    x, weights, dy = (values.pop(name) for name in ("x", "weights", "dy"))
    return Problem(config=config, x=x, token_mask=mask, weights=weights, ids=ids, parameters=values, dy=dy)


PROBLEMS = [published_problem(case) for case in PUBLISHED["cases"]]


def case_name(number: int) -> str:
    settings = PUBLISHED["cases"][number]["config"]
    return "-".join(key if value is True else str(value) for key, value in settings.items() if value is not False)


@kinds
@pytest.mark.parametrize("number", range(len(PROBLEMS)), ids=case_name)
def test_modules_give_the_published_numbers(kind: str, number: int) -> None:
    case, p = PUBLISHED["cases"][number], PROBLEMS[number]
    found, limits = run(kind, p), expected(p)[1]
    for name in ("y", "dx", "dweights"):
        published = np.reshape(case[name], found[name].shape)
        # What float32 explains, and as much again as the published numbers are off.
        slack = limits[name].largest + 1e-6 + 1e-6 * np.abs(published).max()
        assert np.abs(found[name] - published).max() <= slack, name
    for name, norm in case["norms"].items():
        assert abs(np.linalg.norm(found[name]) - norm) <= limits[name].norm + 1e-6 + 1e-6 * norm, name


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_modules_and_their_gradients_agree_with_reference(kind: str, dtype: str, bias: bool) -> None:
    activation = "quick_geglu" if bias else "swiglu"
    assert_correct(kind, cached_problem(dtype=dtype, expert_bias=bias, expert_activation=activation))


@kinds
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_modules_with_the_weight_after_down_agree_with_reference(kind: str, bias: bool) -> None:
    p = cached_problem(
        n_experts=2, k=2, dim=2, inter=2, expert_bias=bias, apply_router_weight_after_down=True, dtype="bfloat16"
    )
    assert_correct(kind, p)


@kinds
@pytest.mark.parametrize("weights_dtype", ["bfloat16", "float32"])
def test_modules_of_routing_weights_in_either_dtype_agree_with_reference(kind: str, weights_dtype: str) -> None:
    p = cached_problem(dtype="bfloat16", expert_bias=True)
    exact = p.but(weights=rounded(p.weights, "bfloat16"))
    found = run(kind, exact.but(weights_dtype=weights_dtype))
    wanted, limits = expected(exact)
    assert within(found["y"], wanted["y"], limits["y"])
    if weights_dtype == "bfloat16":  # the same sums, rounded to the weights' dtype
        unrounded = run(kind, exact.but(weights_dtype="float32"))["dweights"]
        np.testing.assert_array_equal(found["dweights"], rounded(unrounded, "bfloat16"))


# --------------------------------------------------------------------------------------------------------- the routes
@kinds
def test_modules_of_duplicates_and_ids_out_of_range_agree_with_reference(kind: str) -> None:
    p = cached_problem(dtype="bfloat16", expert_bias=True)
    ids = p.ids.copy()
    ids[0], ids[1], ids[2] = (1, 1), (-1, 4), (2**31, 2)
    assert_correct(kind, p.but(ids=ids))


@kinds
def test_modules_take_int32_and_int64_indices_alike(kind: str) -> None:
    p = cached_problem(expert_bias=True)
    for one, other in zip(run(kind, p).values(), run(kind, p.but(ids=p.ids.astype(np.int32))).values(), strict=True):
        np.testing.assert_array_equal(one, other)


@kinds
def test_modules_keep_nan_of_masked_tokens_to_themselves(kind: str) -> None:
    p = cached_problem(expert_bias=True, seed=1, dtype="bfloat16")
    mask = p.token_mask.copy()
    mask[3] = False
    clean = p.but(token_mask=mask)
    x, weights = p.x.copy(), p.weights.copy()
    x[3], weights[3] = np.nan, np.inf
    wanted = run(kind, clean)
    for name, value in run(kind, clean.but(x=x, weights=weights)).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    assert not wanted["y"][3].any() and not wanted["dx"][3].any() and not wanted["dweights"][3].any()


@kinds
@pytest.mark.parametrize("activation", ["swiglu", "quick_geglu", "relu2"])
@pytest.mark.parametrize("tokens", [4, 0], ids=["all_masked", "none"])
def test_modules_without_a_route_give_zeros_and_every_gradient(kind: str, activation: str, tokens: int) -> None:
    p = problem(tokens=4, expert_bias=True, expert_activation=activation, dtype="bfloat16")
    cut = {name: getattr(p, name)[:tokens] for name in ("x", "weights", "ids", "dy")}
    found = run(kind, p.but(token_mask=np.zeros(tokens, bool), **cut))
    assert found["y"].shape == (tokens, 16)
    assert all(not value.any() for value in found.values())  # a gradient of None would not have come this far


@kinds
def test_modules_without_a_route_survive_clipping_and_a_step(kind: str) -> None:
    module = built(kind, cached_problem(expert_bias=True).config)
    before = [value.clone() for value in module.parameters()]
    x, weights = torch.randn(3, 16), torch.rand(3, 2)
    module(x, torch.zeros(3, dtype=torch.bool), weights, torch.zeros(3, 2, dtype=torch.long)).sum().backward()
    assert torch.isfinite(nn.utils.clip_grad_norm_(module.parameters(), 1.0))
    torch.optim.SGD(module.parameters(), 1.0).step()
    assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))


@kinds
def test_modules_with_one_used_expert_agree_with_reference(kind: str) -> None:
    p = cached_problem(expert_bias=True, k=1)
    assert_correct(kind, p.but(ids=np.full_like(p.ids, 2)))


@kinds
def test_modules_of_zero_weights_give_zero_bias_included(kind: str) -> None:
    p = cached_problem(expert_bias=True)
    assert not run(kind, p.but(weights=np.zeros_like(p.weights)))["y"].any()


@kinds
def test_modules_of_non_contiguous_x_equal_contiguous(kind: str) -> None:
    p = cached_problem(expert_bias=True)
    module = built(kind, p.config)
    mask, ids = torch.from_numpy(p.token_mask), torch.from_numpy(p.ids)
    x, weights = torch.from_numpy(p.x).float(), torch.from_numpy(p.weights).float()
    results = []
    for bend in (torch.clone, lambda t: torch.stack([t, t], -1)[..., 0], lambda t: t.T.contiguous().T):
        bent_x, bent_w = bend(x).detach().requires_grad_(), bend(weights).detach().requires_grad_()
        y = module(bent_x, mask, bent_w, bend(ids))
        y.sum().backward()
        results.append((y.detach(), bent_x.grad, bent_w.grad))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------------ the parameters
SHAPES = {
    "swiglu": {"gate_and_up_projs": (8, 128, 512), "gate_up_proj_bias": (8, 512)},
    "relu2": {"gate_and_up_projs": (8, 128, 256), "gate_up_proj_bias": (8, 256)},
}


@kinds
@pytest.mark.parametrize("activation", SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_modules_hold_the_documented_parameters(kind: str, activation: str, bias: bool) -> None:
    module = built(kind, config(expert_activation=activation, expert_bias=bias))
    wanted = {"down_projs": (8, 256, 128), "down_proj_bias": (8, 128)} | SHAPES[activation]
    if not bias:
        wanted = {name: shape for name, shape in wanted.items() if "bias" not in name}
        assert module.gate_up_proj_bias is None and module.down_proj_bias is None
    assert {name: tuple(value.shape) for name, value in module.named_parameters()} == wanted
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == wanted
    assert all(value.dtype == torch.bfloat16 for value in module.parameters())


def config(**settings: Any) -> MoEConfig:
    return MoEConfig(n_routed_experts=8, n_activated_experts=2, dim=128, moe_inter_dim=256, **settings)


@kinds
def test_modules_tell_what_they_are(kind: str) -> None:
    module = built(kind, config(expert_bias=True))
    assert (module.n_routed_experts, module.expert_bias, module.is_gated) == (8, True, True)
    assert module.use_torch_mm == kind.endswith("grouped") and module.use_mxfp8 is False
    assert isinstance(module.config, MoEConfig)


def test_modules_without_a_backend_do_not_name_torchs_product() -> None:
    assert GroupedExperts(config()).use_torch_mm is False
    assert GroupedExpertsDeepEP(config()).use_torch_mm is False


def test_modules_take_any_config_and_backend_with_the_attributes() -> None:
    given = SimpleNamespace(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=4, dtype=torch.float32)
    module = GroupedExpertsDeepEP(given, SimpleNamespace(experts="torch_mm"))
    assert module.use_torch_mm and module.down_projs.dtype == torch.float32


@pytest.mark.parametrize("cls", [GroupedExpertsDeepEP, GroupedExpertsTE])
def test_dispatcher_settings_are_kept_and_unknown_ones_refused(cls: Any) -> None:
    backend = BackendConfig(experts="torch")
    module = cls(config(), backend, "hybridep", 64, False, True)
    kept = module.dispatcher_backend, module.dispatcher_num_sms
    assert kept == ("hybridep", 64)
    assert (module.dispatcher_share_token_dispatcher, module.dispatcher_async_dispatch) == (False, True)
    assert cls(config(), backend).dispatcher_backend == "deepep"
    with pytest.raises(ConfigError, match="'carrier pigeon'"):
        cls(config(), backend, dispatcher_backend="carrier pigeon")


@kinds
def test_bias_changes_the_output(kind: str) -> None:
    module = built(kind, config(expert_bias=True, dtype="float32"))
    x, mask = torch.randn(4, 128), torch.ones(4, dtype=torch.bool)
    weights, ids = torch.full((4, 2), 0.5), torch.tensor([[0, 1]] * 4)
    without = module(x, mask, weights, ids)
    with torch.no_grad():
        module.down_proj_bias.fill_(3.0)
    torch.testing.assert_close(module(x, mask, weights, ids), without + 3.0)
    with torch.no_grad():
        module.gate_up_proj_bias.fill_(1.0)
    assert (module(x, mask, weights, ids) - without - 3.0).abs().min() > 0


# ------------------------------------------------------------------------------------------------------ the activation
@kinds
def test_activation_is_the_documented_one_until_another_is_assigned(kind: str) -> None:
    module, name = built(kind, config()), attribute(kind)
    assert getattr(module, name) is automodel.weighted_bias_swiglu_impl
    setattr(module, name, torch.mul)
    assert getattr(module, name) is torch.mul
    clamped = getattr(built(kind, config(swiglu_limit=2.0)), name)
    assert clamped.func is automodel.swiglu_clamped_deepep and clamped.keywords == {"limit": 2.0}


@kinds
@pytest.mark.parametrize("after", [False, True], ids=["", "after_down"])
def test_an_assigned_activation_is_computed(kind: str, after: bool) -> None:
    settings = {"expert_bias": True, "dtype": "bfloat16", "apply_router_weight_after_down": after}
    p = cached_problem(**settings)
    as_quick = p.but(config=cached_problem(expert_activation="quick_geglu", **settings).config)
    shapes = []

    def quick(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        shapes.append((x.shape[1], tuple(probs.shape) == (x.shape[0], 1)))
        return automodel.quick_geglu_deepep(x, probs, limit=1.0)

    found, wanted = run(kind, p, quick), expected(as_quick)
    assert shapes and set(shapes) == {(16, True)}
    for name, value in found.items():
        assert within(value, wanted[0][name], wanted[1][name]), name


@kinds
def test_an_assigned_module_is_computed_and_its_parameters_are_the_layers(kind: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
            return self.scale * automodel.weighted_bias_swiglu_impl(x, probs)

    p, name = cached_problem(), attribute(kind)
    module = built(kind, p.config)
    arguments = torch.from_numpy(p.x).float(), torch.from_numpy(p.token_mask), torch.from_numpy(p.weights).float()
    plain = module(*arguments, torch.from_numpy(p.ids))
    setattr(module, name, Scaled())
    scaled = module(*arguments, torch.from_numpy(p.ids))
    torch.testing.assert_close(scaled, 2 * plain)
    scaled.sum().backward()
    assert sum(value.ndim == 0 and value.grad is not None for value in module.parameters()) == 1
    setattr(module, name, None)
    assert torch.equal(module(*arguments, torch.from_numpy(p.ids)), plain) and len(list(module.parameters())) == 2


@kinds
def test_modules_are_copied_and_pickled_with_their_weights(kind: str) -> None:
    module = built(kind, config(expert_bias=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(one, two) for one, two in zip(module.parameters(), other.parameters(), strict=True))
        assert other.load_state_dict(module.state_dict()) == ([], [])


# ---------------------------------------------------------------------------------------------------------- the methods
def forward_through(module: Any, name: str, p: Problem, start: int, end: int) -> torch.Tensor:
    """One of the two documented forward methods, over the experts [start, end)."""
    dtype = getattr(torch, p.dtype)
    x, mask, ids = torch.from_numpy(p.x).to(dtype), torch.from_numpy(p.token_mask), torch.from_numpy(p.ids)
    weights = torch.from_numpy(p.weights).float()
    tensors = {key: torch.from_numpy(value)[start:end].to(dtype) for key, value in p.parameters.items()}
    stacked = tensors["gate_and_up_projs"], tensors["down_projs"]
    biases = tensors.get("gate_up_proj_bias"), tensors.get("down_proj_bias")
    if name == "_forward_loop":
        return module._forward_loop(x, weights, ids, mask, *stacked, *biases, end - start, start, end)
    return module._forward_grouped_mm(x, mask, weights, ids, *stacked, *biases, end - start, start)


ways = pytest.mark.parametrize("way", ["_forward_loop", "_forward_grouped_mm"])


@ways
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_forward_methods_of_parts_of_the_experts_add_up_to_the_whole(way: str, dtype: str, bias: bool) -> None:
    p = cached_problem(dtype=dtype, expert_bias=bias)
    module = GroupedExperts(p.config)
    parts = [forward_through(module, way, p, *held) for held in ((0, 1), (1, 3), (3, 4))]
    assert all(part.dtype == torch.float32 for part in parts)
    exact, limits = expected(p)
    assert within(sum(parts).numpy(), exact["y"], limits["y"])
    backend = "loop" if way == "_forward_loop" else "grouped_mm"
    kind = {"loop": "experts-loop", "grouped_mm": "experts-grouped"}[backend]
    whole = forward_through(module, way, p, 0, 4)
    np.testing.assert_array_equal(whole.to(getattr(torch, dtype)).double().numpy(), run(kind, p)["y"])


def test_forward_loop_ends_where_it_is_told_to() -> None:
    p = cached_problem()
    x, mask, ids = torch.from_numpy(p.x).float(), torch.from_numpy(p.token_mask), torch.from_numpy(p.ids)
    weights, module = torch.from_numpy(p.weights).float(), GroupedExperts(p.config)
    stacked = [torch.from_numpy(p.parameters[name]).float() for name in ("gate_and_up_projs", "down_projs")]
    found = module._forward_loop(x, weights, ids, mask, *stacked, None, None, 4, 0, 2)
    wanted = module._forward_loop(x, weights, torch.where(ids < 2, ids, -1), mask, *stacked, None, None, 4, 0, 4)
    assert wanted.any() and torch.equal(found, wanted)


@ways
def test_forward_methods_with_the_weight_after_down_leave_the_slots_apart(way: str) -> None:
    p = cached_problem(dtype="bfloat16", expert_bias=True, apply_router_weight_after_down=True)
    slots = forward_through(GroupedExperts(p.config), way, p, 0, 4)
    assert slots.shape == (12, 2, 16) and slots.dtype == torch.float32
    exact, limits = expected(p)
    assert within(slots.sum(1).double().numpy(), exact["y"], limits["y"])
    one = np.where(np.arange(2) == 0, p.ids, -1)
    exact, limits = expected(p.but(ids=one))
    assert within(slots[:, 0].double().numpy(), exact["y"], limits["y"])


@ways
def test_forward_methods_compute_an_assigned_activation_and_pass_gradients(way: str) -> None:
    p = cached_problem()
    module = GroupedExperts(p.config)
    module.expert_activation_grouped = lambda x, probs: x[:, :8] * probs
    x = torch.randn(3, 16, requires_grad=True)
    weights, ids, mask = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    up, down = torch.randn(1, 16, 16), torch.randn(1, 8, 16)
    if way == "_forward_loop":
        y = module._forward_loop(x, weights, ids, mask, up, down, None, None, 1, 0, 1)
    else:
        y = module._forward_grouped_mm(x, mask, weights, ids, up, down, None, None, 1, 0)
    torch.testing.assert_close(y, x @ up[0, :, :8] @ down[0])
    y.sum().backward()
    torch.testing.assert_close(x.grad, (torch.ones_like(y) @ down[0].T @ up[0, :, :8].T))


@kinds
def test_init_weights_draws_anew_and_leaves_other_modules_alone(kind: str) -> None:
    module, other = built(kind, config(expert_bias=True)), nn.Linear(4, 4)
    with torch.no_grad():
        module.down_proj_bias.fill_(1.0)
    before = other.weight.clone()
    both = nn.ModuleList([module, other])
    both.apply(lambda each: automodel._init_weights(each, torch.device("cpu"), init_std=0.5))
    for name in ("gate_and_up_projs", "down_projs"):
        value = getattr(module, name).float()
        assert abs(value.std().item() - 0.5) < 5 * 0.5 / (2 * value.numel()) ** 0.5, name
    assert not module.down_proj_bias.any() and torch.equal(other.weight, before)
    drawn = [value.clone() for value in module.parameters()]
    for _ in range(2):
        torch.manual_seed(7)
        module.init_weights(torch.device("cpu"), 0.5)
        drawn.append(module.down_projs.clone())
    assert torch.equal(drawn[-1], drawn[-2]) and not torch.equal(drawn[-1], drawn[1])


@kinds
def test_modules_are_built_on_the_device_of_the_context(kind: str) -> None:
    with torch.device("meta"):
        module = built(kind, config())
    assert all(value.is_meta for value in module.parameters())


@kinds
def test_modules_compiled_equal_eager(kind: str) -> None:
    torch.compiler.reset()
    p = cached_problem(expert_bias=True, dtype="bfloat16")
    module = built(kind, p.config)
    inputs = torch.from_numpy(p.x).bfloat16(), torch.from_numpy(p.token_mask), torch.from_numpy(p.weights).float()
    grads = []
    for call in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.zero_grad()
        y = call(*inputs, torch.from_numpy(p.ids))
        y.backward(torch.ones_like(y))
        grads.append([y.detach(), *(value.grad for value in module.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_a_subclass_may_assign_the_documented_attributes() -> None:
    class Mine(GroupedExperts):
        def __init__(self, *args):
            super().__init__(*args)
            self.use_torch_mm = self.use_mxfp8 = False

    assert Mine(config(), BackendConfig(experts="torch_mm")).use_torch_mm is False
