"""One problem, three answers: the PyTorch layer, the Flax layer and the float64 reference, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip

from moebius import jax_frontend, torch_frontend
from moebius.compare.bridge import to_jax, to_torch
from moebius.core import MoEConfig, reference
from moebius.core.precision import EXACT, Arithmetic
from moebius.jax_frontend import MoE as FlaxMoE
from moebius.torch_frontend import MoE as TorchMoE

OUTPUT, INPUT = "output", "x"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What every side is given; all arrays are float64 and exact in `dtype`.

    Attributes:
        config: of the layer. dtype: that the frontends compute in.
        x_TD: the layer's input. dy_TD: the upstream gradient.
        parameters: by the names of core.layout.
    """

    config: MoEConfig
    dtype: str
    x_TD: np.ndarray
    dy_TD: np.ndarray
    parameters: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a side computed.

    Attributes:
        ids_TK: the experts that each token was routed to.
        tensors: OUTPUT, and under INPUT and each parameter's name its gradient; float32 of a frontend, which holds
            every value of its dtypes, float64 of the reference.
    """

    ids_TK: np.ndarray
    tensors: Mapping[str, np.ndarray]


def problem(layer: TorchMoE, x_TD: np.ndarray, dtype: str, seed: int) -> Problem:
    """The problem of a layer's parameters and a block's input, rounded to `dtype`, with a normal upstream gradient."""
    dy_TD = np.random.default_rng(seed).standard_normal(x_TD.shape)
    return Problem(
        config=layer.config,
        dtype=dtype,
        x_TD=_rounded(x_TD, dtype),
        dy_TD=_rounded(dy_TD, dtype),
        parameters={name: _float64(value) for name, value in torch_frontend.parameters(layer).items()},
    )


def flax_layer(layer: TorchMoE) -> FlaxMoE:
    """The Flax layer with the torch layer's parameters, brought over dlpack."""
    from flax import nnx

    flax = FlaxMoE(layer.config, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    carried = {name: to_jax(value) for name, value in torch_frontend.parameters(layer).items()}
    jax_frontend.load_parameters(flax, carried)
    return flax


def run_torch(layer: TorchMoE, p: Problem) -> Answer:
    """Forward and backward in PyTorch."""
    x_TD = _tensor(p.x_TD, p.dtype).requires_grad_()
    ids: list[torch.Tensor] = []
    hook = layer.gate.register_forward_hook(lambda module, args, out: ids.append(out[1]))
    layer.zero_grad()
    try:
        with _precise():
            y_TD = layer(x_TD)
            y_TD.backward(_tensor(p.dy_TD, p.dtype))
    finally:
        hook.remove()
    named = {OUTPUT: y_TD, INPUT: x_TD.grad} | {name: value.grad for name, value in layer.named_parameters()}
    return Answer(ids_TK=ids[0].numpy(), tensors={name: _float32(value) for name, value in named.items()})


def run_flax(layer: FlaxMoE, p: Problem) -> Answer:
    """Forward and backward in Flax, under one jit."""
    from flax import nnx

    graph, parameters, *rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(parameters: Any, x_TD: jax.Array, dy_TD: jax.Array) -> Any:
        def forward(parameters: Any, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
            module = nnx.merge(graph, parameters, *rest)
            _, ids_TK, _ = module.gate(x_TD, jnp.ones(len(x_TD), bool))
            return module(x_TD), ids_TK

        y_TD, pullback, ids_TK = jax.vjp(forward, parameters, x_TD, has_aux=True)
        return y_TD, ids_TK, pullback(dy_TD)

    with _precise():
        x_TD, dy_TD = (to_jax(_tensor(value, p.dtype)) for value in (p.x_TD, p.dy_TD))
        y_TD, ids_TK, (grads, dx_TD) = run(parameters, x_TD, dy_TD)
    named = jax_frontend.parameters(nnx.merge(graph, grads, *rest))
    tensors = {OUTPUT: y_TD, INPUT: dx_TD} | {name: named[name] for name in p.parameters}
    return Answer(ids_TK=np.asarray(ids_TK), tensors={name: _float32(to_torch(v)) for name, v in tensors.items()})


def run_reference(p: Problem, ids_TK: np.ndarray | None = None, arithmetic: Arithmetic = EXACT) -> Answer:
    """Forward and backward in the reference.

    Args:
        ids_TK: the experts of each token; None to route by the exact logits.
        arithmetic: EXACT, or a draw of the noise that a dtype explains.
    """
    mask_T = np.ones(len(p.x_TD), bool)
    trace = reference.moe(p.x_TD, mask_T, p.parameters, p.config, ids_TK=ids_TK, arithmetic=arithmetic)
    dx_TD, grads = reference.moe_vjp(trace, p.x_TD, mask_T, p.parameters, p.config, p.dy_TD, arithmetic=arithmetic)
    return Answer(ids_TK=trace.routing.ids_TK, tensors={OUTPUT: trace.y_TD, INPUT: dx_TD, **grads})


@contextmanager
def _precise() -> Iterator[None]:
    """Full precision in both frameworks: JAX would multiply float32 in TF32 on a GPU, PyTorch sum bfloat16 short."""
    matmul = torch.backends.cuda.matmul
    before = (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction)
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


def _tensor(value: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value)).to(getattr(torch, dtype))


def _rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    return _float64(_tensor(value, dtype))


def _float64(value: torch.Tensor) -> np.ndarray:
    array: np.ndarray = value.detach().double().numpy()
    return array


def _float32(value: torch.Tensor | None) -> np.ndarray:
    """A tensor of at most 32 bits; a gradient that never came is nan, so that no verdict can overlook it."""
    if value is None:
        return np.full((), np.nan, np.float32)
    array: np.ndarray = value.detach().float().numpy()
    return array
