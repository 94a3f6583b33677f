"""Activation checkpointing of the experts and of whole layers: the bits of a pass without, nothing counted twice."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moebius.core import BackendConfig, MoEConfig
from moebius.torch_frontend import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, MoE

EXPERTS, MATMUL = torch.ops.moebius.experts.default, torch.ops.moebius.grouped_matmul.default
D, E, K = 16, 8, 2


def config(**changes: Any) -> MoEConfig:
    sizes = {"n_routed_experts": E, "n_activated_experts": K, "dim": D, "moe_inter_dim": 8}
    return MoEConfig(**{**sizes, "dtype": "float32", "expert_bias": True, **changes})


def drawn(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return layer


TRAINED = {"aux_loss_coeff": 0.1, "score_func": "sigmoid", "gate_bias_update_factor": 0.1, "n_shared_experts": 1}
LAYERS: dict[str, Any] = {
    "experts": lambda: GroupedExperts(config()),
    "experts, bfloat16, after down": lambda: GroupedExperts(
        config(dtype="bfloat16", apply_router_weight_after_down=True)
    ),
    "DeepEP, loop": lambda: GroupedExpertsDeepEP(config(), BackendConfig(experts="loop")),
    "TE, loop": lambda: GroupedExpertsTE(config(), BackendConfig(experts="loop")),
    "experts by steps": lambda: GroupedExperts(config(), BackendConfig(double_backward=True)),
    "moe": lambda: MoE(config(dtype="bfloat16")),
    "moe, load and losses": lambda: MoE(config(**TRAINED)),
    "moe, noise": lambda: MoE(config(), BackendConfig(fake_balanced_gate=True, fake_gate_noise=0.7)),
    "moe by steps": lambda: MoE(config(), BackendConfig(double_backward=True)),
}
layers = pytest.mark.parametrize("kind", LAYERS)
kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])


def arguments(layer: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(layer.parameters()).dtype
    x = torch.randn(3, 8, D, generator=generator).to(dtype).requires_grad_()
    if isinstance(layer, MoE):
        return (x,)
    weights = torch.rand(24, K, generator=generator).requires_grad_()
    return (
        x.detach().view(24, D).requires_grad_(),
        torch.arange(24) != 2,
        weights,
        torch.randint(-1, 9, (24, K), generator=generator),
    )


def run(layer: Any, forward: Any, given: tuple[torch.Tensor, ...], passes: int = 1) -> dict[str, Any]:
    """Output, every gradient, and what the router recorded."""
    y = forward(*given)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    for more in reversed(range(passes)):
        y.backward(dy, retain_graph=more > 0)
    found = {"y": y.detach(), **{name: value.grad for name, value in layer.named_parameters()}}
    found |= {str(i): value.grad for i, value in enumerate(given) if value.requires_grad}
    gate = getattr(layer, "gate", None)
    return found | {name: getattr(gate, name, None) for name in ("last_load", "cumulative_load", "last_aux_loss")}


def both(kind: str, wrap: Any, passes: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a layer gives called through `wrap`, and what it gives called plainly."""
    torch.manual_seed(0)
    found, wanted = drawn(LAYERS[kind]()), drawn(LAYERS[kind]())
    given = arguments(found)
    same = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in given)
    return run(found, wrap(found), given, passes), run(wanted, wanted, same, passes)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] is None and value is None) or torch.equal(found[name], value), name
    assert all(value.abs().max() > 0 for value in wanted.values() if value is not None)


def checkpointed(layer: Any, **kwargs: Any) -> Any:
    return partial(checkpoint, layer, **kwargs)


@layers
@kinds
def test_layer_checkpointed_gives_the_same_bits_and_records_once(kind: str, reentrant: bool) -> None:
    assert_same(*both(kind, partial(checkpointed, use_reentrant=reentrant)))


@pytest.mark.parametrize("kind", ["experts", "moe, load and losses"])
def test_layer_checkpointed_with_two_backward_passes_gives_the_same_bits(kind: str) -> None:
    assert_same(*both(kind, partial(checkpointed, use_reentrant=False), passes=2))


@kinds
def test_layers_checkpointed_one_inside_the_other_give_the_same_bits(reentrant: bool) -> None:
    def nested(layer: Any) -> Any:
        return partial(checkpoint, checkpointed(layer, use_reentrant=reentrant), use_reentrant=reentrant)

    assert_same(*both("moe, load and losses", nested))


# ------------------------------------------------------------------------------------------------------- what is routed
def tied() -> MoE:
    """Every logit of every token is the same: any order of the experts would be right."""
    layer = drawn(MoE(config()))
    with torch.no_grad():
        layer.gate.weight.zero_()
    return layer


ROUTED: dict[str, Any] = {
    "learned": lambda: drawn(MoE(config())),
    "ties": tied,
    "noise": lambda: drawn(LAYERS["moe, noise"]()),
}


@kinds
@pytest.mark.parametrize("kind", ROUTED)
def test_tokens_are_routed_the_same_when_the_layer_is_recomputed(kind: str, reentrant: bool) -> None:
    layer, seen = ROUTED[kind](), []

    def record(name: str, value: torch.Tensor) -> torch.Tensor:
        seen.append(value.detach().clone()) if name == "ids" else None
        return value

    layer.tap = record
    torch.manual_seed(1)
    checkpoint(layer, *arguments(layer), use_reentrant=reentrant, preserve_rng_state=False).sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


# ------------------------------------------------------------------------------------------------------------ selective
class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func] += 1
        return func(*args, **(kwargs or {}))


def selective(layer: Any, save: tuple[Any, ...]) -> Any:
    """Keeps what the operators in `save` put out, recomputes the rest."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in save else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpointed(layer, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))


SAVED = [
    ("experts", EXPERTS),
    ("moe, load and losses", EXPERTS),
    ("experts by steps", MATMUL),
    ("moe by steps", MATMUL),
]
saved = pytest.mark.parametrize("kind, op", SAVED, ids=[kind for kind, _ in SAVED])


@saved
def test_layer_that_saves_an_operators_output_gives_the_same_bits(kind: str, op: Any) -> None:
    assert_same(*both(kind, partial(selective, save=(op,))))


@saved
def test_layer_that_saves_an_operators_output_does_not_run_it_again(kind: str, op: Any) -> None:
    found = {}
    for name, save in (("none", ()), ("all", ()), ("saved", (op,))):
        layer = drawn(LAYERS[kind]())
        forward = layer if name == "none" else selective(layer, save)
        given = arguments(layer)
        with Calls() as calls:
            forward(*given).sum().backward()
        found[name] = calls.of[op]
    # Where the steps run one by one their backward pass multiplies too; that is in all three.
    forward_calls = found["all"] - found["none"]
    assert found["saved"] == found["none"] and forward_calls == (1 if op is EXPERTS else 2)
