"""What the tests of core share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from moebius.core import MoEConfig
from moebius.core.tolerance import relative_error


@pytest.fixture
def small() -> Callable[..., MoEConfig]:
    """A config of a small layer: 4 experts, 2 a token, D = 6, I = 5, in float64; settings replace these."""

    def config(**settings: Any) -> MoEConfig:
        sizes = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 6, "moe_inter_dim": 5, "dtype": "float64"}
        return MoEConfig(**(sizes | settings))

    return config


# A fourth-order difference errs by h^4 times a fifth derivative (over 30) and by eps/h of the sum it is taken of:
# h = eps^(1/5) balances the two.
STEP = float(np.finfo(np.float64).eps) ** 0.2
# Both errors, with a hundred for the derivative and for the length of the sum.
SLACK = 100 * STEP**4


@pytest.fixture
def check_gradients() -> Callable[..., None]:
    """check(run, inputs, gradients): each gradient of the scalar `run(**inputs)` against differences of `run`.

    The relative error of every tensor stays below SLACK; a gradient of zeros must be exactly zero.
    """

    def check(run: Callable[..., float], inputs: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]) -> None:
        assert gradients, "nothing to check"
        for name, gradient in gradients.items():
            assert gradient.shape == inputs[name].shape, name
            expected = _differences(run, inputs, name)
            error = relative_error(gradient, expected)
            assert error <= SLACK, f"gradient of {name}: relative error {error:.1e}, bound {SLACK:.1e}"

    return check


def _differences(run: Callable[..., float], inputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Derivative of `run` by every element of one input."""
    result = np.zeros(inputs[name].shape)
    for place in np.ndindex(result.shape):

        def at(shift: float, place: tuple[int, ...] = place) -> float:
            moved = inputs[name].copy()
            moved[place] += shift
            return float(run(**{**inputs, name: moved}))

        near, far = at(STEP) - at(-STEP), at(2 * STEP) - at(-2 * STEP)
        result[place] = (8 * near - far) / (12 * STEP)
    return result
