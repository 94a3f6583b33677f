"""A callable as a side: what it is called with, what it may return, and what is said of anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import Layer, answer, problem
from torch import nn

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

from moebius import torch_frontend
from moebius.compare import InJax
from moebius.compare.judge import judge
from moebius.compare.sides.answer import Desk
from moebius.compare.verdict import FAIL, PASS
from moebius.core.errors import ConfigError, DTypeError, MoEError, ShapeError
from moebius.torch_frontend import MoE, load_parameters

SMALL = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 24, "tokens": 16}


@pytest.fixture(scope="module")
def p():
    return problem("swiglu", **SMALL)


def judged(p, call):
    """What is found of one callable, its column named "mine"."""
    with Desk() as desk:
        return judge(p, {"mine": answer(p, call, desk)})


def output(p):
    """A plain function that returns the output alone."""
    plain = Layer(p.config)
    return lambda x, w: plain(x, w)["output"]


def moe(p, **changes):
    layer = MoE(replace(p.config, **changes))
    if not changes:
        load_parameters(layer, p.parameters)
    return layer


def of_jax(x, w):
    """The same layer in JAX, every token by the matrices of its experts."""
    logits = x @ w["gate.weight"].T
    best, ids = jax.lax.top_k(logits, 2)
    weights = jax.nn.softmax(best.astype(jnp.float32), axis=-1)
    gate, up = jnp.split(jnp.einsum("td,tkdu->tku", x, w["experts.gate_and_up_projs"][ids]), 2, axis=-1)
    act = (jax.nn.silu(gate.astype(jnp.float32)) * up * weights[..., None]).astype(x.dtype)
    return jnp.einsum("tki,tkid->td", act, w["experts.down_projs"][ids]).astype(x.dtype)


def names(layer):
    return {row.name for row in layer.rows if "mine" in row.whole}


def gradients(p):
    return {"grad.x", *(f"grad.{name}" for name in p.parameters)}


# ---------------------------------------------------------------------------------------------------------- what it may
def test_function_that_returns_the_output_is_compared_with_every_gradient(p):
    layer = judged(p, output(p))
    assert names(layer) == {"output", *gradients(p)} and layer.verdict == PASS, layer.faults
    assert not layer.routing and not layer.row("output").step


def test_function_that_returns_stages_is_compared_step_by_step(p):
    layer = judged(p, Layer(p.config))
    stages = {"logits", "weights", "rows", "up", "activation", "down", "output"}
    backward = {f"grad.{name}" for name in stages - {"output"}}
    assert names(layer) == stages | backward | gradients(p) and layer.verdict == PASS, layer.faults
    assert {row.name for row in layer.rows if "mine" in row.step} >= stages
    assert layer.routing["mine"].equal == 16


def test_function_sees_the_problem_in_its_dtype(p):
    seen = {}

    def look(x, w):
        seen.update(w, x=x)
        return output(p)(x, w)

    judged(p, look)
    assert torch.equal(seen.pop("x").detach(), p.tensor(p.x_TD))
    assert seen.keys() == p.parameters.keys() and all(value.dtype == torch.float32 for value in seen.values())


def test_function_without_a_gradient_is_compared_by_its_values_alone(p):
    layer = judged(p, lambda x, w: output(p)(x, w).detach())
    assert layer.notes == ("mine gives no gradient: its backward pass is not compared",)
    assert names(layer) == {"output"} and layer.verdict == PASS


def test_function_that_lets_no_gradient_through_to_a_parameter_fails_there_alone(p):
    name = "experts.down_projs"
    layer = judged(p, lambda x, w: output(p)(x, {**w, name: w[name].detach()}))
    assert [row.name for row in layer.rows if row.verdict == FAIL] == [f"grad.{name}"]


def test_gradients_that_are_returned_count_in_place_of_autograds(p):
    def by_hand(x, w, factor=1.0):
        y = output(p)(x, w)
        dx = torch.autograd.grad(y, x, p.tensor(p.dy_TD), retain_graph=True)[0]
        return {"output": y, "grad.x": factor * dx}

    assert judged(p, by_hand).verdict == PASS
    layer = judged(p, lambda x, w: by_hand(x, w, 1.01))
    assert [row.name for row in layer.rows if row.verdict == FAIL] == ["grad.x"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_module_is_called_with_x_alone_and_its_parameters_by_our_names_are_compared(dtype):
    p = problem("swiglu", dtype, **SMALL)

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Module(), nn.Module()
            for name, value in p.parameters.items():
                home, _, own = name.partition(".")
                getattr(self, home).register_parameter(own, nn.Parameter(value.clone()))
            self.head = nn.Linear(3, 3)  # a name that nobody knows

        def forward(self, x):
            return output(p)(x, dict(self.named_parameters()))

    module = Mine()
    layer = judged(p, module)
    assert names(layer) == {"output", *gradients(p)} and layer.verdict == PASS, layer.faults
    assert all(value.grad is None for value in module.parameters())


def test_module_that_freezes_a_parameter_is_noted(p):
    layer = moe(p)
    layer.experts.down_projs.requires_grad_(False)
    found = judged(p, layer)
    assert found.verdict == PASS
    assert "mine gives no gradient of experts.down_projs: not compared" in found.notes


def test_moebius_layer_is_traced_as_it_stands(p):
    layer = moe(p)
    found = judged(p, layer)
    assert {"logits", "up", "grad.down"} <= names(found) and found.verdict == PASS, found.faults
    assert found.routing["mine"].equal == 16
    with torch.no_grad():
        layer.experts.down_projs[1] *= 1.1
    broken = judged(p, layer)
    first = next(row.name for row in broken.rows if row.step and row.step["mine"].verdict == FAIL)
    assert first == "down"


def test_jax_function_is_compared_with_every_gradient(p):
    layer = judged(p, InJax(of_jax))
    assert names(layer) == {"output", *gradients(p)} and layer.verdict == PASS, layer.faults


def test_jax_function_may_return_stages_and_a_wider_output():
    p = problem("swiglu", "bfloat16", **SMALL)

    def wide(x, w):
        y = of_jax(x.astype(jnp.float32), {name: value.astype(jnp.float32) for name, value in w.items()})
        return {"output": y, "logits": (x @ w["gate.weight"].T).astype(jnp.float32)}

    layer = judged(p, InJax(wide))
    assert {"logits", "output", "grad.x"} <= names(layer) and layer.verdict == PASS, layer.faults


# ------------------------------------------------------------------------------------------------------ what it may not
WRONG = {
    "nothing": (lambda x, w: None, ConfigError, "NoneType"),
    "a tuple": (lambda x, w: (x, x), ConfigError, "tuple"),
    "an array": (lambda x, w: x.detach().numpy(), ConfigError, "numpy.ndarray"),
    "another shape": (lambda x, w: x[:3], ShapeError, r"\(3, 32\)"),
    "integers": (lambda x, w: x.int(), DTypeError, "int32"),
    "an unknown name": (lambda x, w: {"output": x, "hidden": x}, ConfigError, "hidden"),
    "a gradient of nothing": (lambda x, w: {"output": x, "grad.hidden": x}, ConfigError, r"grad\.hidden"),
    "a gradient that no stage has": (lambda x, w: {"output": x, "grad.output": x}, ConfigError, r"grad\.output"),
    "a stage that this layer has not": (lambda x, w: {"output": x, "latent": x}, ConfigError, "latent"),
    "a number for a name": (lambda x, w: {"output": x, 3: x}, ConfigError, "output, 3"),
    "no output": (lambda x, w: {"logits": x[:, :4]}, ConfigError, "the names logits"),
    "an empty mapping": (lambda x, w: {}, ConfigError, "none"),
    "a stage of another shape": (lambda x, w: {"output": x, "logits": x}, ShapeError, r"logits.*\(16, 4\)"),
    "ids that are no integers": (lambda x, w: {"output": x, "ids": x[:, :2]}, DTypeError, "float32"),
    "ids that are true or false": (lambda x, w: {"output": x, "ids": x[:, :2] > 0}, DTypeError, "bool"),
    "ids of another shape": (lambda x, w: {"output": x, "ids": x[:, :3].int()}, ShapeError, r"ids.*\(16, 2\)"),
    "ids out of range": (
        lambda x, w: {"output": x, "ids": x[:, :2].int() * 0 + 4},
        ConfigError,
        r"\[4, 4\] at token 0",
    ),
    "an error": (lambda x, w: 1 / 0, ConfigError, "ZeroDivisionError: division by zero"),
    "an unknown parameter": (lambda x, w: x * w["nonsense"], ConfigError, "KeyError: 'nonsense'"),
    "nothing, in JAX": (InJax(lambda x, w: None), ConfigError, "NoneType"),
    "another shape, in JAX": (InJax(lambda x, w: x[:3]), ShapeError, r"\(3, 32\)"),
    "integers, in JAX": (InJax(lambda x, w: x.astype(jnp.int32)), DTypeError, "int32"),
    "an unknown name, in JAX": (InJax(lambda x, w: {"output": x, "hidden": x}), ConfigError, "hidden"),
    "an error, in JAX": (InJax(lambda x, w: 1 / 0), ConfigError, "ZeroDivisionError"),
    "no JAX type": (InJax(lambda x, w: "words"), ConfigError, "str"),
    "JAX's function unwrapped": (of_jax, ConfigError, "InJax"),
}


@pytest.mark.parametrize("what", WRONG)
def test_callable_that_returns_something_else_is_refused(p, what):
    call, error, words = WRONG[what]
    with pytest.raises(error, match=words) as caught:
        judged(p, call)
    assert "'mine'" in caught.value.asked and caught.value.do


def test_callable_whose_backward_raises_is_refused(p):
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 1

        @staticmethod
        def backward(context, dy):
            raise RuntimeError("no backward here")

    with pytest.raises(ConfigError, match="no backward here"):
        judged(p, lambda x, w: Forward.apply(x))


def test_callables_own_words_come_through(p):
    def refuse(x, w):
        raise ShapeError("16 tokens", "15", "bring one more")

    with pytest.raises(ShapeError, match="bring one more"):
        judged(p, refuse)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_routed_experts": 8},
        {"n_activated_experts": 3},
        {"dim": 16},
        {"moe_inter_dim": 16},
        {"expert_bias": True},
        {"n_shared_experts": 1},
        {"expert_activation": "relu2"},
    ],
    ids=str,
)
def test_moebius_layer_of_other_sizes_is_refused(p, changes):
    with pytest.raises(MoEError) as caught:
        judged(p, moe(p, **changes))
    assert isinstance(caught.value, ConfigError | ShapeError)


def test_module_with_a_parameter_of_another_shape_is_refused(p):
    module = nn.Module()
    module.experts = nn.Module()
    module.experts.down_projs = nn.Parameter(torch.zeros(2, 24, 32))
    module.forward = lambda x: x + module.experts.down_projs.sum()
    with pytest.raises(ShapeError, match=r"grad\.experts\.down_projs.*\(4, 24, 32\)"):
        judged(p, module)


def test_function_that_writes_into_its_parameters_harms_nobody(p):
    before = {name: value.clone() for name, value in p.parameters.items()}

    def careless(x, w):
        with torch.no_grad():
            for value in w.values():
                value.mul_(2)
        return output(p)(x, w)

    assert judged(p, careless).verdict == FAIL
    assert all(torch.equal(before[name], value) for name, value in p.parameters.items())


def test_weights_without_their_experts_are_refused(p):
    def by_slot(x, w):
        found = Layer(p.config)(x, w)
        return {"output": found["output"], "weights": found["weights"]}

    with pytest.raises(ConfigError, match="no 'ids'"):
        judged(p, by_slot)


def test_an_error_of_moebius_inside_a_function_names_the_side(p):
    with pytest.raises(ShapeError, match="side 'mine': logits"):
        judged(p, lambda x, w: torch_frontend.route(x, p.config))


# ---------------------------------------------------------------------------------------------- routes without room
@pytest.mark.parametrize("count", [0, 3])
def test_routes_that_found_no_room_fail_the_comparison(p, count):
    in_jax = InJax(lambda x, w: {"output": of_jax(x, w), "dropped": jnp.asarray([count, 0])})
    in_torch = lambda x, w: {"output": output(p)(x, w), "dropped": torch.tensor(count)}  # noqa: E731
    for call in (in_jax, in_torch):
        layer = judged(p, call)
        assert layer.verdict == (FAIL if count else PASS) and layer.dropped == ({"mine": 3} if count else {})
        assert ["3 routes found no room; raise dispatcher_bound" in fault for fault in layer.faults] == [True] * (
            count > 0
        )


def test_count_of_dropped_routes_that_is_no_integer_is_refused(p):
    with pytest.raises(DTypeError, match=r"'dropped' of side 'mine'\nfound: dtype torch.float32"):
        judged(p, lambda x, w: {"output": output(p)(x, w), "dropped": torch.zeros(())})
