"""Which step computes in which dtype, where it rounds, and how large the rounding noise of a correct run is.

The rule of every backend of both frontends: accumulate, activate and weight in `accumulate_dtype(x.dtype)`, then
round once to x.dtype. `STEPS` says it step by step; `Arithmetic` is the same rule as something to run: the reference
calls it at each rounding, `EXACT` leaves float64 untouched and `Noise` perturbs as that dtype would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moebius.core.errors import ConfigError

# dtype -> (unit roundoff: half the distance from 1 to the next number; granularity near zero: the smallest
# subnormal of float16, the smallest normal of the others, since XLA on a CPU flushes float32 subnormals to zero)
DTYPES: dict[str, tuple[float, float]] = {
    "float64": (2.0**-53, 2.0**-1022),
    "float32": (2.0**-24, 2.0**-126),
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-126),
}
_ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}


def dtype_name(dtype: Any) -> str:
    """The plain name of a floating dtype given as a string, or as torch's, JAX's or NumPy's object.

    Returns:
        "float64", "float32", "float16" or "bfloat16".
    Raises:
        ConfigError: anything else.

    >>> dtype_name("torch.bfloat16"), dtype_name(np.float32), dtype_name("fp16")
    ('bfloat16', 'float32', 'float16')
    """
    text: Any
    if dtype is float:  # Python's and NumPy's float; the string "float" is torch's, float32
        return "float64"
    if isinstance(dtype, str):
        text = dtype
    elif isinstance(dtype, type) or hasattr(dtype, "dtype"):  # numpy's scalar classes, jax.numpy.bfloat16
        text = getattr(getattr(dtype, "dtype", None), "name", None) or getattr(dtype, "__name__", str(dtype))
    else:  # numpy.dtype, torch.dtype
        text = getattr(dtype, "name", None) or str(dtype)
    short = text.rsplit(".", 1)[-1]
    name = _ALIASES.get(short, short)
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}", f"the dtypes {tuple(DTYPES)}", "name one of them")
    return name


def accumulate_dtype(dtype: Any) -> str:
    """promote_types(dtype, float32): where sums, activations and weights are computed."""
    return "float64" if dtype_name(dtype) == "float64" else "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of the forward pass: the dtype it computes in and the dtype it rounds to, once."""

    name: str
    computes: str
    rounds_to: str


STEPS: tuple[Step, ...] = (
    Step(name="logits", computes="accumulate", rounds_to="gate_precision, else x"),
    Step(name="route", computes="accumulate", rounds_to="accumulate"),
    Step(name="weights", computes="-", rounds_to="x, unless router_weights_fp32"),
    Step(name="permute", computes="-", rounds_to="x; its gradient sums over K in accumulate"),
    Step(name="up", computes="accumulate", rounds_to="x"),
    Step(name="up bias", computes="accumulate", rounds_to="x"),
    Step(name="activation x weight", computes="accumulate", rounds_to="x"),
    Step(name="down", computes="accumulate", rounds_to="x"),
    Step(name="down bias x weight", computes="accumulate", rounds_to="x"),
    Step(name="unpermute", computes="accumulate", rounds_to="x; of several ranks each part to combine_dtype, else x"),
    Step(name="combine", computes="accumulate", rounds_to="x; of one rank nothing is left to round"),
)


class Arithmetic:
    """Exact arithmetic: the reference's default. Every method returns its value untouched."""

    def dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """A matrix product, accumulated."""
        return a @ b

    def sum(self, value: np.ndarray, axis: int | None = None, keepdims: bool = False) -> np.ndarray:
        """A sum, accumulated."""
        return value.sum(axis=axis, keepdims=keepdims)

    def curve(self, value: np.ndarray) -> np.ndarray:
        """The result of an elementwise formula in the accumulate dtype."""
        return value

    def store(self, value: np.ndarray, dtype: str | None = None) -> np.ndarray:
        """One rounding to the tensors' dtype (or to `dtype`)."""
        return value


EXACT = Arithmetic()

# An elementwise formula is a handful of float32 operations, each rounded; measured exp, tanh and log1p of both
# frameworks stay within 3 units in the last place.
_CURVE_ROUNDINGS = 6.0


class Noise(Arithmetic):
    """Arithmetic whose every rounding is drawn at random: one sample of the error of a correct run.

    A rounding to a dtype of unit roundoff u multiplies by 1 + u * uniform(-1, 1); below the dtype's granularity it
    moves by half of that. A dot of length n accumulated with unit
    roundoff v adds a normal error of standard deviation v * sqrt(n / 2) * sqrt(sum a^2 b^2).

    Source: Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019.

    Args:
        dtype: dtype of the activations.
        seed: of the draw.
    """

    def __init__(self, dtype: Any, seed: int):
        self.dtype = dtype_name(dtype)
        self.accumulate = accumulate_dtype(self.dtype)
        self._generator = np.random.default_rng(seed)

    def dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        spread = np.sqrt(np.maximum((a * a) @ (b * b), 0.0)) * np.sqrt(max(a.shape[-1], 1) / 2)
        return a @ b + self._accumulated(spread)

    def sum(self, value: np.ndarray, axis: int | None = None, keepdims: bool = False) -> np.ndarray:
        length = value.size if axis is None else value.shape[axis]
        spread = np.sqrt((value * value).sum(axis=axis, keepdims=keepdims)) * np.sqrt(max(length, 1) / 2)
        return value.sum(axis=axis, keepdims=keepdims) + self._accumulated(spread)

    def curve(self, value: np.ndarray) -> np.ndarray:
        return self._rounded(value, self.accumulate, _CURVE_ROUNDINGS)

    def store(self, value: np.ndarray, dtype: str | None = None) -> np.ndarray:
        return self._rounded(value, dtype or self.dtype, 1.0)

    def _accumulated(self, spread: np.ndarray) -> np.ndarray:
        return DTYPES[self.accumulate][0] * spread * self._generator.standard_normal(np.shape(spread))

    def _rounded(self, value: np.ndarray, dtype: str, times: float) -> np.ndarray:
        roundoff, granularity = DTYPES[dtype]
        scale = times * np.maximum(roundoff * np.abs(value), 0.5 * granularity * (value != 0))
        return value + scale * self._generator.uniform(-1.0, 1.0, np.shape(value))
