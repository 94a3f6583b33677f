"""moebius's own module with another activation, and with biases."""

from __future__ import annotations

from benchmarks.gpu_problem import Candidate, Problem, with_layer
from benchmarks.peers import ours


def build(problem: Problem, *, activation: str, bias: bool, **backend: object) -> Candidate:
    """See ours.build and gpu_problem.with_layer."""
    return ours.build(with_layer(problem, activation, bias), **backend)
