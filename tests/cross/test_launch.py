"""Both frontends launch the kernels of core.kernels alike: recorded, not run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from moebius.core.activations import ACTIVATIONS
from moebius.core.kernels.plan_grouped import Device
from moebius.jax_frontend import launch as jax_launch
from moebius.jax_frontend import play as jax_play
from moebius.torch_frontend import launch as torch_launch
from moebius.torch_frontend import play as torch_play

S, K, E, D, I = 30, 2, 4, 136, 72
R, U = S * K, 2 * I
OAI, PAIRS, RELU2 = (ACTIVATIONS[name] for name in ("swigluoai", "quick_geglu", "relu2"))
Record = dict[str, Any]
BF16, F32, I32 = "bfloat16", "float32", "int32"


SHAPES = {
    "x": ((S, D), BF16),
    "rows": ((R, D), BF16),
    "hidden": ((R, U), BF16),
    "act": ((R, I), BF16),
    "row_of_slot": ((S, K), I32),
    "row_experts": ((R,), I32),
    "row_weights": ((R,), F32),
    "sizes": ((E,), I32),
    "tiles": ((9, 4), I32),
    "starts": ((E + 1,), I32),
    "up": ((E, D, U), BF16),
    "down": ((E, I, D), BF16),
    "up_of_one_half": ((E, D, I), BF16),
    "up_bias": ((E, U), BF16),
    "down_bias": ((E, D), BF16),
    "dots": ((R, 3), F32),
    "wide": ((R, D), F32),
    "wide_down": ((E, I, D), F32),
    "odd": ((R, 33), BF16),
    "odd_down": ((E, I, 33), BF16),
}


class Sides:
    """What both frontends are given, by name: an array each, on the CPU."""

    def __init__(self, frontend: Any):
        make = torch.zeros if frontend is torch_launch else jnp.zeros
        dtypes = torch if frontend is torch_launch else jnp
        self.launch = frontend
        for name, (shape, dtype) in SHAPES.items():
            setattr(self, name, make(shape, dtype=getattr(dtypes, dtype)))
        self.float32 = dtypes.float32


CALLS = {
    "scatter_rows": lambda s: s.launch.scatter_rows(s.x, s.row_of_slot),
    "sum_dots": lambda s: s.launch.sum_dots(s.dots, s.row_of_slot),
    "sum_slots": lambda s: s.launch.sum_slots(s.rows, s.row_of_slot),
    "sum_slots_biased": lambda s: s.launch.sum_slots(
        s.rows, s.row_of_slot, bias_eD=s.down_bias, row_experts_R=s.row_experts, row_weights_R=s.row_weights
    ),
    "sum_slots_after": lambda s: s.launch.sum_slots(
        s.rows, s.row_of_slot, row_weights_R=s.row_weights, after=True, dtype=s.float32
    ),
    "activate_rows": lambda s: s.launch.activate_rows(
        s.hidden, s.row_weights, PAIRS, bias_eU=s.up_bias, row_experts_R=s.row_experts
    ),
    "activate_rows_unweighted": lambda s: s.launch.activate_rows(s.act, None, RELU2),
    "activate_rows_backward": lambda s: s.launch.activate_rows_backward(
        s.act, s.hidden, s.row_weights, PAIRS, bias_eU=s.up_bias, row_experts_R=s.row_experts
    ),
    "sum_rows": lambda s: s.launch.sum_rows(s.hidden, s.sizes),
    "sum_rows_weighted": lambda s: s.launch.sum_rows(s.rows, s.sizes, s.row_weights),
    "dot_rows": lambda s: s.launch.dot_rows(s.rows, s.down_bias, s.row_experts),
    "list_tiles": lambda s: s.launch.list_tiles(s.sizes, R, 64),
    "grouped_product": lambda s: s.launch.grouped_product(s.rows, s.up, s.tiles, False),
    "grouped_product_transposed": lambda s: s.launch.grouped_product(s.rows, s.down, s.tiles, True),
    "grouped_product_in_float32": lambda s: s.launch.grouped_product(s.wide, s.wide_down, s.tiles, True),
    "grouped_product_of_odd_widths": lambda s: s.launch.grouped_product(s.odd, s.odd_down, s.tiles, True),
    "grouped_weight_gradient_in_float32": lambda s: s.launch.grouped_weight_gradient(s.wide, s.wide, s.starts),
    "grouped_weight_gradient": lambda s: s.launch.grouped_weight_gradient(s.rows, s.hidden, s.starts),
    "activated_product": lambda s: s.launch.activated_product(s.rows, s.up, s.tiles, s.row_weights, OAI, s.up_bias),
    "activated_product_of_one_half": lambda s: s.launch.activated_product(
        s.rows, s.up_of_one_half, s.tiles, None, RELU2
    ),
    "differentiated_product": lambda s: s.launch.differentiated_product(
        s.rows, s.down, s.tiles, s.hidden, s.row_weights, OAI
    ),
}


def described(value: Any) -> Any:
    """A number, or an array's shape and dtype, and the block that it is copied in."""
    if isinstance(value, int):
        return value
    if isinstance(value, tuple):
        return (*described(value[0]), value[1])
    return tuple(value.shape), str(value.dtype).removeprefix("torch.")


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Record]]:
    """What each frontend launches from now on."""
    found: dict[str, list[Record]] = {"torch": [], "jax": []}

    class Recorder:
        def __init__(self, name: str, grid: tuple[int, ...] = ()):
            self.name, self.grid = name, grid

        def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
            return Recorder(self.name, grid)

        def __call__(self, *arguments: Any, **constants: Any) -> None:
            given = [described(value) for value in arguments]
            found["torch"].append({"kernel": self.name, "grid": self.grid, "given": given, "constants": constants})

    def triton_call(
        *arguments: Any, kernel: Recorder, out_type: Any, grid: Any, backend_options: Any, **rest: Any
    ) -> Any:
        given = [described(value) for value in (*arguments, *out_type)]
        told = {"kernel": kernel.name, "grid": grid, "given": given, "constants": {**rest, **backend_options}}
        found["jax"].append(told)
        return [jnp.zeros(result.shape, result.dtype) for result in out_type]

    jax_triton = SimpleNamespace(triton_call=triton_call)
    monkeypatch.setattr(jax_play, "import_module", lambda name: jax_triton)
    for play in (torch_play, jax_play):
        monkeypatch.setattr(play, "kernel_of", Recorder)
        monkeypatch.setattr(play, "descriptor", lambda operand, block: (operand, block))
    hopper = Device((9, 0), 132)
    monkeypatch.setattr(torch_launch, "_device", lambda device: hopper)
    monkeypatch.setattr(jax_launch, "_where", lambda operand: (str(operand.dtype), hopper))
    jax.clear_caches()
    return found


@pytest.mark.parametrize("name", CALLS)
def test_launches_of_both_frontends_are_the_same(records: dict[str, list[Record]], name: str) -> None:
    ours, theirs = (CALLS[name](Sides(frontend)) for frontend in (torch_launch, jax_launch))
    launched = records["jax"][: len(records["torch"])]  # traced first, then run: each twice
    assert records["torch"] == launched and launched
    hopper = "hopper" in launched[-1]["kernel"]
    portable = "float32" in name or "odd" in name
    assert hopper == (("grouped" in name or "product" in name) and not portable)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert described(one) == described(other)


def test_a_launch_of_a_problem_without_elements_is_zeros_and_launches_nothing(
    records: dict[str, list[Record]],
) -> None:
    none = jnp.zeros((0, D), jnp.bfloat16)
    out = jax_launch.grouped_weight_gradient(none, none, jnp.zeros(E + 1, jnp.int32))
    assert out.shape == (E, D, D) and not np.asarray(out, np.float32).any()
    assert records["jax"] == []


def test_descriptor_of_one_row_of_a_wider_tensor_has_the_strides_of_its_shape() -> None:
    pytest.importorskip("triton")
    one = torch.zeros(1, 19, dtype=torch.bfloat16)[:, :8]
    assert one.is_contiguous() and one.stride() == (19, 1)
    assert torch_play.descriptor(one, (64, 64)).strides == [8, 1]


def test_a_launch_under_vmap_runs_one_element_after_the_other(records: dict[str, list[Record]]) -> None:
    x, slots = jnp.zeros((5, S, D), jnp.bfloat16), jnp.zeros((S, K), jnp.int32)
    out = jax.vmap(jax_launch.scatter_rows, in_axes=(0, None))(x, slots)
    assert out.shape == (5, R, D)
    assert {record["given"][0] for record in records["jax"]} == {((S, D), BF16)}
