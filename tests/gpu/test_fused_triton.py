"""The fused products on a Hopper GPU: the bits of the same steps in turn, at every kind of a group's end."""

from __future__ import annotations

from typing import Any

import pytest

from moebius.core.activations import ACTIVATIONS
from moebius.core.kernels import plan_grouped, plan_hopper

torch = pytest.importorskip("torch")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no Hopper GPU is visible")]

SIZES = {
    "ends": [0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 0],
    "padding": [64, 0, 7, 500, 16],
    "one_takes_all": [0, 0, 1000, 0, 0],
    "all_empty": [0, 0, 0, 0, 0],
}
FUSED = list(ACTIVATIONS)
WIDTHS = [(256, 512), (8, 16), (200, 328), (2880, 264)]  # D and I: whole tiles, less than one, tails


@pytest.fixture(autouse=True, params=[False, True], ids=["wide", "few"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of both widths, whichever the number of rows would take."""
    monkeypatch.setattr(plan_hopper, "few", lambda *sizes: request.param)
    plan_grouped.product.cache_clear()


class Operands:
    """Rows of each expert, and two of padding; scaled so that clamps are reached."""

    def __init__(self, sizes: list[int], widths: tuple[int, int], activation: Any, dtype: Any, biased: bool):
        from moebius.torch_frontend import launch

        generator = torch.Generator("cuda").manual_seed(0)
        (D, I), e, R = widths, len(sizes), sum(sizes) + 2
        U = activation.up_width(I)

        def drawn(*shape: int, scale: float = 1.0) -> Any:
            return (torch.randn(shape, device="cuda", generator=generator) * scale).to(dtype)

        self.rows, self.dout = drawn(R, D), drawn(R, D)
        self.up, self.down = drawn(e, D, U, scale=3 * D**-0.5), drawn(e, I, D, scale=I**-0.5)
        self.bias = drawn(e, U) if biased else None
        self.weights = torch.rand(R, device="cuda", generator=generator)
        self.sizes = torch.tensor(sizes, dtype=torch.int32, device="cuda")
        self.experts = torch.repeat_interleave(torch.arange(e + 1), torch.tensor([*sizes, 2])).int().cuda()
        self.tiles, _ = launch.list_tiles(self.sizes, R, plan_hopper.HEIGHT)
        self.activation, self.end = activation, sum(sizes)

    def together(self) -> tuple[Any, ...]:
        """(hidden, act), then (dhidden, the weighted activation, the routing weights' gradients)."""
        from moebius.torch_frontend import launch

        told = self.weights, self.activation
        hidden, act = launch.activated_product(self.rows, self.up, self.tiles, *told, self.bias)
        made = launch.differentiated_product(self.dout, self.down, self.tiles, hidden, *told)
        over = launch.differentiated_product(self.dout, self.down, self.tiles, hidden.clone(), *told, in_place=True)
        for new, written_over in zip(self.kept(*made), self.kept(*over), strict=True):
            assert torch.equal(new, written_over) or not torch.isfinite(new).all()
        slots = torch.arange(len(self.rows), dtype=torch.int32, device="cuda")[:, None]
        return self.kept(hidden, act, *made[:2], launch.sum_dots(made[2], slots)[:, 0])

    def apart(self) -> tuple[Any, ...]:
        from moebius.torch_frontend import launch

        hidden = self.hidden()
        act = launch.activate_rows(hidden, self.weights, self.activation)
        dact = launch.grouped_product(self.dout, self.down, self.tiles, True)
        dhidden, dweights = launch.activate_rows_backward(dact, hidden, self.weights, self.activation)
        return self.kept(hidden, act, dhidden, act, dweights)

    def hidden(self) -> Any:
        """The pre-activation with its bias, which is added to what was rounded."""
        from moebius.torch_frontend import launch

        hidden = launch.grouped_product(self.rows, self.up, self.tiles, False)
        if self.bias is None:
            return hidden
        bias = torch.cat([self.bias, torch.zeros_like(self.bias[:1])])[self.experts.long()]
        return (hidden.float() + bias.float()).to(hidden.dtype)

    def kept(self, *values: Any) -> tuple[Any, ...]:
        return tuple(value[: self.end] for value in values)


def agree(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for place in range(4):
        assert torch.equal(found[place], wanted[place]), ("hidden", "act", "dhidden", "act again")[place]
    # Of numbers around one, thousands at most, added in two orders.
    torch.testing.assert_close(found[4], wanted[4], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_products_have_the_bits_of_the_steps_apart(sizes: str, name: str, biased: bool) -> None:
    given = Operands(SIZES[sizes], (200, 328), ACTIVATIONS[name], torch.bfloat16, biased)
    agree(given.together(), given.apart())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_fused_products_of_every_kind_of_width_have_the_bits_of_the_steps_apart(
    widths: tuple[int, int], dtype: str
) -> None:
    given = Operands(SIZES["ends"], widths, ACTIVATIONS["swiglu"], getattr(torch, dtype), False)
    agree(given.together(), given.apart())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_fused_products_with_poison_in_one_expert_keep_it_there(poison: float) -> None:
    given = Operands([65, 1, 127, 0, 64, 3], (256, 328), ACTIVATIONS["swiglu"], torch.bfloat16, True)
    clean = given.together()
    own = slice(66, 193)
    for value in (given.rows, given.dout):
        value[own], value[given.end :] = poison, poison
    given.up[2], given.down[2], given.bias[2] = poison, poison, poison
    others = [at for at in range(given.end) if not own.start <= at < own.stop]
    for found, wanted in zip(given.together(), clean, strict=True):
        assert torch.equal(found[others], wanted[others])
        assert not torch.isfinite(found[own]).all(-1).any()


@pytest.mark.parametrize("name", FUSED)
def test_fused_products_without_weights_have_the_bits_of_the_steps_apart(name: str) -> None:
    given = Operands(SIZES["ends"], (200, 328), ACTIVATIONS[name], torch.bfloat16, True)
    given.weights = None
    from moebius.torch_frontend import launch

    hidden, act = launch.activated_product(given.rows, given.up, given.tiles, None, given.activation, given.bias)
    wanted = given.hidden()
    activated = launch.activate_rows(wanted, None, given.activation)
    for one, other in zip(given.kept(hidden, act), given.kept(wanted, activated), strict=True):
        assert torch.equal(one, other)


def test_fused_products_again_have_the_same_bits() -> None:
    given = Operands(SIZES["ends"], (2880, 264), ACTIVATIONS["swigluoai"], torch.bfloat16, True)
    for one, two in zip(given.together(), given.together(), strict=True):
        assert torch.equal(one, two)
