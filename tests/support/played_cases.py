"""Experts of few rows played from tapes: one list of cases for CUDA and for Triton's interpreter.

Each compares, bit for bit, with the same calls step by step. A program that prints {"case dtype": error or null}: the
interpreter can be switched on only before triton is imported. See tests/torch/test_few.py.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moebius.core import BackendConfig, MoEConfig
from moebius.torch_frontend import GroupedExperts, few
from moebius.torch_frontend.tape import Tape

E, K, D, I, T = 3, 2, 16, 8, 5
CALLS = 4  # the third is the first that is played
Tensors = dict[str, Any]


def layer(device: str, dtype: str, seed: int = 0, **changes: Any) -> GroupedExperts:
    sizes = {"n_routed_experts": E, "n_activated_experts": K, "dim": D, "moe_inter_dim": I}
    made = GroupedExperts(MoEConfig(**sizes, dtype=dtype, **changes), BackendConfig(experts="triton"), device=device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return made


def given(device: str, dtype: str, seed: int, tokens: int = T, **needs: bool) -> Tensors:
    """Inputs of a call, and the gradient of its output; a masked token, ids of no expert, an expert without a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E + 1, (tokens, K), generator=generator)
    found = {
        "x": torch.randn(tokens, D, generator=generator).to(getattr(torch, dtype)),
        "token_mask": torch.arange(tokens) % 4 != 2,
        "weights": torch.rand(tokens, K, generator=generator),
        "indices": torch.where(ids == 1, 2, ids),
        "dy": torch.randn(tokens, D, generator=generator).to(getattr(torch, dtype)),
    }
    found = {name: value.to(device) for name, value in found.items()}
    for name in ("x", "weights"):
        found[name].requires_grad_(needs.get(name, True))
    return found


def forward(experts: Any, call: Tensors) -> torch.Tensor:
    y: torch.Tensor = experts(*(call[name] for name in ("x", "token_mask", "weights", "indices")))
    return y


def both(experts: GroupedExperts, call: Tensors, through: Callable[..., torch.Tensor] = forward) -> Tensors:
    """The output and each gradient that is asked for."""
    leaves = {"x": call["x"], "weights": call["weights"], **dict(experts.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    y = through(experts, call)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), call["dy"]), strict=True))}


@contextmanager
def step_by_step() -> Iterator[None]:
    with mock.patch.object(few, "ROWS", 0):
        yield


@contextmanager
def counted() -> Iterator[list[bool]]:
    """Whether each tape that was tried played."""
    plays, play = [], Tape.play

    def counting(tape: Tape, inputs: Any) -> Any:
        results = play(tape, inputs)
        plays.append(results is not None)
        return results

    with mock.patch.object(Tape, "play", counting):
        yield plays


def same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def compare(experts: GroupedExperts, calls: list[Tensors], played: int, run: Callable[..., Tensors] = both) -> None:
    """`run` of each call, from tapes `played` times, then all of them once more step by step."""
    with counted() as plays:
        found = [run(experts, call) for call in calls]
    assert plays.count(True) == played, plays
    with step_by_step():
        for each, call in zip(found, calls, strict=True):  # at the end: nothing has written over a result
            same(each, run(experts, call))


def plain(device: str, dtype: str, played: int = 2 * (CALLS - 2), **changes: Any) -> None:
    calls = [given(device, dtype, seed) for seed in range(CALLS)]
    compare(layer(device, dtype, **changes), calls, played)


def without_gradients(device: str, dtype: str) -> None:
    def run(experts: GroupedExperts, call: Tensors) -> Tensors:
        with torch.no_grad():
            return {"y": forward(experts, call)}

    compare(layer(device, dtype), [given(device, dtype, seed) for seed in range(CALLS)], CALLS - 2, run)


def some_gradients(device: str, dtype: str) -> None:
    experts = layer(device, dtype)
    compare(experts, [given(device, dtype, seed, x=False) for seed in range(CALLS)], 2 * (CALLS - 2))
    # The forward pass is of the same kind; the backward pass is not.
    compare(experts, [given(device, dtype, seed, weights=False) for seed in range(CALLS)], 2 * CALLS - 2)
    experts.down_projs.requires_grad_(False)
    compare(experts, [given(device, dtype, seed) for seed in range(CALLS)], 2 * CALLS - 2)


def kinds_in_turn(device: str, dtype: str) -> None:
    """Two layers of one kind, and two numbers of tokens: four kinds of calls, of which layers share two."""
    layers = layer(device, dtype, 0), layer(device, dtype, 1)
    turns = [(experts, tokens) for _ in range(CALLS) for tokens in (T, T - 1) for experts in layers]
    calls = [given(device, dtype, seed, tokens) for seed, (_, tokens) in enumerate(turns)]
    with counted() as plays:
        found = [both(experts, call) for (experts, _), call in zip(turns, calls, strict=True)]
    assert plays.count(True) == 2 * 2 * (2 * CALLS - 2)
    with step_by_step():
        for each, (experts, _), call in zip(found, turns, calls, strict=True):
            same(each, both(experts, call))


def interleaved(device: str, dtype: str) -> None:
    """The forward passes of all calls before the first backward pass."""
    experts, leaves = layer(device, dtype), ("x", "weights")

    def run(calls: list[Tensors]) -> list[Tensors]:
        outputs = [forward(experts, call) for call in calls]
        return [
            dict(zip(leaves, torch.autograd.grad(y, [call[name] for name in leaves], call["dy"]), strict=True))
            for y, call in zip(outputs, calls, strict=True)
        ]

    calls = [given(device, dtype, seed) for seed in range(CALLS)]
    with counted() as plays:
        found = run(calls)
    assert plays.count(True) == 2 * (CALLS - 2)
    with step_by_step():
        for each, wanted in zip(found, run(calls), strict=True):
            same(each, wanted)


def kept_graph(device: str, dtype: str) -> None:
    """Two backward passes through one graph: the first may not write over what is kept."""

    def run(experts: GroupedExperts, call: Tensors) -> Tensors:
        y = forward(experts, call)
        first = torch.autograd.grad(y, [call["x"], experts.down_projs], call["dy"], retain_graph=True)
        second = torch.autograd.grad(y, [call["x"], experts.down_projs], call["dy"])
        same(dict(enumerate(second)), dict(enumerate(first)))
        return {"y": y.detach(), "x": first[0], "down": first[1]}

    compare(layer(device, dtype), [given(device, dtype, seed) for seed in range(CALLS)], 2 * (CALLS - 2), run)


def checkpointed(device: str, dtype: str, reentrant: bool) -> None:
    """A step's forward pass and the one that is done again may be of two sorts: recorded, and played."""

    def through(experts: GroupedExperts, call: Tensors) -> torch.Tensor:
        y: torch.Tensor = checkpoint(forward, experts, call, use_reentrant=reentrant)
        return y

    def accumulate(experts: GroupedExperts, call: Tensors) -> Tensors:
        leaves = {"x": call["x"], "weights": call["weights"], **dict(experts.named_parameters())}
        for leaf in leaves.values():
            leaf.grad = None
        y = checkpoint(experts, *(call[n] for n in ("x", "token_mask", "weights", "indices")), use_reentrant=True)
        y.backward(call["dy"])
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}

    experts, calls = layer(device, dtype), [given(device, dtype, seed) for seed in range(CALLS)]
    run = accumulate if reentrant else partial(both, through=through)
    with counted() as plays:
        found = [run(experts, call) for call in calls]
    assert plays.count(True) > CALLS
    with step_by_step():
        for each, call in zip(found, calls, strict=True):
            same(each, both(experts, call))


def saved(device: str, dtype: str, pack: Callable[[torch.Tensor], Any], played: int) -> None:
    """What is kept comes back as other tensors."""

    def through(experts: GroupedExperts, call: Tensors) -> torch.Tensor:
        with saved_tensors_hooks(pack, lambda packed: packed.to(device)):
            return forward(experts, call)

    calls = [given(device, dtype, seed) for seed in range(CALLS)]
    compare(layer(device, dtype), calls, played, partial(both, through=through))


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in another layout, where there is one."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor.clone()


def between_16_bytes(device: str, dtype: str) -> None:
    """A tape does not serve it; what was recorded of others does not compute it."""
    experts, calls = layer(device, dtype), [given(device, dtype, seed) for seed in range(CALLS)]
    for call in calls:
        both(experts, call)
    call = calls[0]
    shifted = torch.cat([call["x"].detach().flatten()[:1], call["x"].detach().flatten()])[1:].view(T, D)
    assert shifted.data_ptr() % 16
    with counted() as plays:
        found = both(experts, call | {"x": shifted.requires_grad_()})
    assert False in plays
    with step_by_step():
        same(found, both(experts, call))


def weights_changed_between(device: str, dtype: str) -> None:
    """The tape reads what the parameters hold now, also where they were moved to other memory."""
    experts, call = layer(device, dtype), given(device, dtype, 0)
    for _ in range(CALLS):
        with torch.no_grad():
            experts.down_projs.mul_(1.5)
            experts.gate_and_up_projs.data = experts.gate_and_up_projs.data.clone()
        compare_once(experts, call)


def compare_once(experts: GroupedExperts, call: Tensors) -> None:
    found = both(experts, call)
    with step_by_step():
        same(found, both(experts, call))


CASES: dict[str, Callable[[str, str], None]] = {
    "swiglu": plain,
    "clamped, interleaved": partial(plain, expert_activation="swigluoai"),
    "weights after down": partial(plain, apply_router_weight_after_down=True),
    # Biases' gradients are sums by torch: that pass goes step by step.
    "biases": partial(plain, expert_bias=True, played=CALLS - 2),
    "without gradients": without_gradients,
    "some gradients": some_gradients,
    "kinds in turn": kinds_in_turn,
    "interleaved": interleaved,
    "kept graph": kept_graph,
    "checkpoint": partial(checkpointed, reentrant=False),
    "reentrant checkpoint": partial(checkpointed, reentrant=True),
    "saved as copies": partial(saved, pack=torch.clone, played=2 * (CALLS - 2)),
    "saved in another layout": partial(saved, pack=turned, played=CALLS - 2),
    "between 16 bytes": between_16_bytes,
    "weights changed between": weights_changed_between,
}


def check(case: str, device: str, dtype: str) -> None:
    from moebius.torch_frontend import lean

    with mock.patch.object(lean._FORWARD, "_found", {}), mock.patch.object(lean._BACKWARD, "_found", {}):
        CASES[case](device, dtype)


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, str | None] = {}
    for dtype in sys.argv[1:]:
        for case in CASES:
            try:
                check(case, "cpu", dtype)
                found[f"{case} {dtype}"] = None
            except Exception:
                found[f"{case} {dtype}"] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
