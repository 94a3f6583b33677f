"""A float32 product that shows whether a device rounds its operands: what a setting says is one thing."""

from __future__ import annotations

WIDTH = 256  # of both square matrices: wide enough that no library takes another road than for a real product
# What fills them. The last bit is kept by float32 (23 bits) and lost by TF32 (10), bfloat16 (7) and float16 (10).
OPERAND = 1 + 2.0**-12
# Between float32's own rounding, below 1e-6 here, and that of a lost operand bit, 5e-4.
LARGEST_ERROR = 1e-5


def error_of(element: float) -> float:
    """Relative error of any element of their product."""
    exact = WIDTH * OPERAND**2
    return abs(element - exact) / exact
