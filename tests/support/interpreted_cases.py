"""Experts of both frontends in Triton's interpreter, every step a kernel: see tests/cross/test_interpreted.py."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from sides import Problem, Side, expected, problem

from moebius.core.kernels.interpreter import mend
from moebius.core.tolerance import within
from moebius.jax_frontend import lean

SMALL = {"tokens": 12, "dim": 24, "inter": 10, "n_experts": 3, "k": 2}
CASES: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "biased and clamped": {"expert_activation": "quick_geglu", "expert_bias": True},
    "one half": {"expert_activation": "relu2"},
    "weights after down": {"apply_router_weight_after_down": True},
    "no token": {"tokens": 0},
}


def in_torch(p: Problem) -> dict[str, np.ndarray]:
    return Side("torch", "triton", "cpu").experts(p)


def in_flax(p: Problem, remat: str) -> dict[str, np.ndarray]:
    """By the rule itself: the registry asks for jax-triton, which the interpreter does not need."""
    names = "gate_and_up_projs", "down_projs", "gate_up_proj_bias", "down_proj_bias"
    w = lean.Weights(*(jnp.asarray(p.parameters[n], p.dtype) if n in p.parameters else None for n in names))
    how = lean.How(p.config.activation, p.config.apply_router_weight_after_down, False, "triton", remat)
    ids = jnp.where(jnp.asarray(p.token_mask)[:, None], jnp.asarray(p.ids), p.config.n_routed_experts)
    x, weights = jnp.asarray(p.x, p.dtype), jnp.asarray(p.weights, p.weights_dtype).astype(jnp.float32)

    @jax.jit
    def both(x: Any, weights: Any, w: Any) -> Any:
        y, pull = jax.vjp(lambda x, weights, w: lean._experts(how, x, weights, ids.astype(jnp.int32), w), x, weights, w)
        return y, *pull(jnp.asarray(p.dy, p.dtype))

    y, dx, dweights, dw = both(x, weights, w)
    found = {"y": y, "dx": dx, "dweights": dweights.astype(p.weights_dtype)}
    found |= {name: value for name, value in zip(names, dw, strict=True) if value is not None}
    return {name: np.asarray(value.astype(jnp.float32), np.float64) for name, value in found.items()}


def check(dtype: str, settings: dict[str, Any]) -> None:
    p = problem(**{**SMALL, "dtype": dtype, **settings})
    one, other = in_torch(p), in_flax(p, "act")
    exact, limits = expected(p)
    assert one.keys() == other.keys() == exact.keys()
    for name, value in one.items():
        assert within(value, exact[name], limits[name]), f"{name} is not the reference's"
        np.testing.assert_array_equal(other[name], value, err_msg=f"{name} of Flax and of PyTorch")
    for remat in ("none", "full") if settings == {} else ():
        for name, value in in_flax(p, remat).items():
            np.testing.assert_array_equal(value, other[name], err_msg=f"{name} with remat {remat}")


def main() -> None:
    mend()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    torch.set_num_threads(1)
    found: dict[str, str | None] = {}
    for dtype in sys.argv[1:]:
        for name, settings in CASES.items():
            try:
                check(dtype, settings)
                found[f"{name} {dtype}"] = None
            except Exception:
                found[f"{name} {dtype}"] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
