"""What the GPU benchmarks compute: the shapes of four models' experts, random inputs, and what a candidate is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One layer's sizes: T tokens, each to K of E experts of width I."""

    name: str
    tokens: int
    n_experts: int
    k: int
    dim: int
    inter: int
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        """R, tokens times experts of a token."""
        return self.tokens * self.k

    def flops(self, backward: bool) -> float:
        """Of the matrix products: 6 T K D I forward, three times that with both gradients."""
        return (3.0 if backward else 1.0) * 6 * self.rows * self.dim * self.inter

    def least_bytes(self, element: int = 2) -> int:
        """Rows, pre-activations, output and input gradient, each once: the memory that a ratio never goes below."""
        return element * (self.rows * self.dim + self.rows * 2 * self.inter + 2 * self.tokens * self.dim)

    def weight_bytes(self, element: int = 2) -> int:
        """Of the experts' weights, and so of their gradients."""
        return element * self.n_experts * 3 * self.dim * self.inter

    def result_bytes(self, element: int = 2) -> int:
        """What a forward and backward pass returns: y, and the gradients of x, routing weights and experts."""
        return element * (2 * self.tokens * self.dim + self.rows) + self.weight_bytes(element)

    def work_bytes(self, element: int = 2) -> int:
        """What it may hold besides, and 2 % more: pre-activations, their gradient, one [R, I], one [R, D]."""
        return element * self.rows * (5 * self.inter + self.dim)

    def sizes(self) -> dict[str, int]:
        """All of these, by name."""
        return {name: getattr(self, name)() for name in ("weight_bytes", "least_bytes", "result_bytes", "work_bytes")}

    def tiny(self) -> Shape:
        """The same kind of layer in sizes for a dry run on a CPU."""
        return replace(self, tokens=64, n_experts=8, k=min(self.k, 4), dim=64, inter=32)


SHAPES = {
    key: Shape(name=name, tokens=tokens, n_experts=n_experts, k=k, dim=dim, inter=inter)
    for key, name, tokens, n_experts, k, dim, inter in (
        ("qwen3", "Qwen3-30B-A3B", 16384, 128, 8, 2048, 768),
        ("gptoss", "GPT-OSS-20B", 16384, 32, 4, 2880, 2880),
        ("mixtral", "Mixtral-8x7B", 16384, 8, 2, 4096, 14336),
        ("dsv3", "DeepSeek-V3 slice", 4096, 32, 8, 7168, 2048),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Routing weights [T, K], a leaf that takes a gradient, and expert ids [T, K], int64."""

    weights: Tensor
    indices: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Inputs on the device: x and dy [T, D], weights up [E, D, 2I] and down [E, I, D]; gate first, with SwiGLU.

    Attributes:
        activation: another one of moebius.core.activations, which says where the gate lies.
        biases: of up [E, 2I] and down [E, D], where there are any.
    """

    shape: Shape
    x: Tensor
    dy: Tensor
    up: Tensor
    down: Tensor
    routing: Routing
    activation: str = "swiglu"
    biases: tuple[Tensor, Tensor] | None = None

    @property
    def compiler(self) -> str:
        """torch.compile's backend: its default; on a CPU tracing alone, where the default would call a C++ compiler."""
        return "inductor" if self.x.is_cuda else "aot_eager"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One implementation, holding the problem's weights.

    Attributes:
        call: (x [T, D], weights [T, K], indices [T, K]) -> y [T, D].
        parameters: its leaves; call and backward leave a gradient in each.
        gradients: expert -> gradients of up [D, 2I] and down [I, D], as the problem lays them out; of their biases
            too, where it has them.
        note: what it is, in a few words.
    """

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    parameters: Sequence[nn.Parameter]
    gradients: Callable[[int], tuple[Tensor, ...]]
    note: str = ""


def draw(shape: Shape, device: str, seed: int = 0, dtype: torch.dtype | None = None) -> Problem:
    """Random inputs and weights that keep unit variance through both products; uniform routing.

    Args:
        dtype: of all of them; None for the shape's.
    """
    generator, dtype = torch.Generator(device).manual_seed(seed), dtype or getattr(torch, shape.dtype)

    def normal(*sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype).mul_(std)

    s = shape
    return Problem(
        shape=s,
        x=normal(s.tokens, s.dim).requires_grad_(),
        dy=normal(s.tokens, s.dim),
        up=normal(s.n_experts, s.dim, 2 * s.inter, std=s.dim**-0.5),
        down=normal(s.n_experts, s.inter, s.dim, std=s.inter**-0.5),
        routing=route(s, device, seed=seed, dtype=dtype),
    )


def with_layer(problem: Problem, activation: str, bias: bool, seed: int = 0) -> Problem:
    """The same inputs for a layer with another activation and, where asked for, random biases."""
    if not bias:
        return replace(problem, activation=activation)
    s, like = problem.shape, problem.up
    generator = torch.Generator(like.device).manual_seed(seed + 2)
    up, down = (
        torch.randn(s.n_experts, width, generator=generator, device=like.device, dtype=like.dtype)
        for width in (2 * s.inter, s.dim)
    )
    return replace(problem, activation=activation, biases=(up, down))


def route(
    shape: Shape, device: str, *, zipf: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Routing:
    """Softmax routing of random logits; weights in x's dtype, as the routers of moebius and of its peers hand them on.

    Args:
        zipf: exponent of the experts' popularity; 0 for equal popularity.
    """
    generator = torch.Generator(device).manual_seed(seed + 1)
    if zipf:
        # Gumbel noise on log-probabilities: the top K are K draws without replacement.
        uniform = torch.rand(shape.tokens, shape.n_experts, generator=generator, device=device).clamp_(1e-9, 1 - 1e-6)
        rank = torch.randperm(shape.n_experts, generator=generator, device=device) + 1
        logits = -torch.log(-torch.log(uniform)) - zipf * torch.log(rank)
    else:
        logits = torch.randn(shape.tokens, shape.n_experts, generator=generator, device=device)
    weights, indices = logits.softmax(-1).topk(shape.k)
    return Routing(weights=weights.to(dtype).requires_grad_(), indices=indices)
