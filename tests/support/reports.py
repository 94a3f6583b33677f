"""Reports made of drawn numbers, to see how they are shown: no framework, no checkpoint, no computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moebius.compare import verdict as v
from moebius.compare.result import Report
from moebius.core import MoEConfig

STAGES = ("logits", "weights", "rows", "up", "activation", "down", "combine", "output")
GRADIENTS = ("combine", "down", "activation", "up", "rows", "weights", "logits", "x")
PARAMETERS = ("experts.down_projs", "experts.down_proj_bias", "experts.gate_and_up_projs", "gate.weight", "gate.bias")
EXACT = ("rows",)


def report(*layers: v.Layer, **changes: Any) -> Report:
    """A report of some layers, by default of a GPT-OSS in bfloat16."""
    config = MoEConfig(
        n_routed_experts=32, n_activated_experts=4, dim=128, moe_inter_dim=96, expert_activation="quick_geglu"
    )
    described = Report(
        checkpoint="models/gpt-oss-20b",
        family="gpt_oss",
        recipe="experts fused, input-major, gate and up interleaved",
        moe_layers=tuple(range(24)),
        config=config,
        dtype="bfloat16",
        tokens=256,
        text="README.md, docs/deviations.md, by bytes",
        seed=0,
        versions={"moebius": "0.1.0", "torch": "2.13.0+cpu"},
        devices={"torch": "cpu", "flax": "cpu"},
        settings=("torch: TF32 off", "jax: default_matmul_precision highest"),
        layers=layers,
        seconds={"reference": 12.3, "torch": 0.4},
    )
    return replace(described, **changes)


def score(rng: np.random.Generator, predicted: float, factor: float = 1.0, n: int = 2000, **changes: Any) -> v.Score:
    """Of `n` elements, each rounded once; `factor` times too far off. Predicted 0: exact."""
    z = np.zeros(n)
    if predicted:
        z = np.abs(factor * np.sqrt(3) * rng.uniform(-1, 1, n) / 2.0 ** rng.uniform(0, 1, n))
    z_rms = float(np.sqrt(np.mean(z**2)))
    found = v.Score(
        n=n,
        bad=0,
        z_rms=z_rms,
        z_max=float(z.max()),
        relative=predicted * z_rms,
        predicted=predicted,
        largest=predicted * float(z.max()),
        equal=float(np.mean(z < 0.7)),
        histogram=tuple(np.histogram(z, v.Z_EDGES)[0].tolist()),
    )
    return replace(found, **changes)


def row(
    rng: np.random.Generator, name: str, predicted: float, sides: tuple[str, ...], informing: tuple[str, ...]
) -> v.Row:
    """A row in which everything passes; sides that inform have no step."""
    pairs = [f"{one}~{other}" for i, one in enumerate(sides) for other in sides[i + 1 :]]
    counted = {column: score(rng, predicted) for column in (*sides, *pairs)}
    others = {column: score(rng, predicted, 1.1, counts=False) for column in informing if "experts." not in name}
    return v.Row(name=name, whole=counted | others, step={side: score(rng, predicted / 2) for side in sides})


def layer(
    index: int = 0, sides: tuple[str, ...] = ("torch", "flax"), informing: tuple[str, ...] = ("transformers",)
) -> v.Layer:
    """A layer in bfloat16 that passes, with one token whose experts tie."""
    rng = np.random.default_rng(index)
    grow = 0.0015 * (1 + 0.3 * index)
    names = (*STAGES, *(f"grad.{name}" for name in (*GRADIENTS, *PARAMETERS)))
    rows = [
        row(rng, name, 0.0 if name in EXACT else grow * (1 + i / 4), sides, informing) for i, name in enumerate(names)
    ]
    pairs = tuple(f"{one}~{other}" for i, one in enumerate(sides) for other in sides[i + 1 :])
    columns = (*sides, *informing, *pairs)
    routing = {c: v.Agreement(tokens=256, equal=255, ties=1, unexplained=0, counts=c not in informing) for c in columns}
    load = rng.multinomial(1024, rng.dirichlet(np.full(32, 3.0)))
    moved = np.array([1, -1] + [0] * 30)
    loads = {"reference": tuple(load.tolist())} | {s: tuple((load + i * moved).tolist()) for i, s in enumerate(sides)}
    return v.Layer(
        index=index,
        sides=(*sides, *informing),
        columns=columns,
        routing=routing,
        load=loads,
        rows=tuple(rows),
        clamped=v.Clamped(limit=7.0, share=0.04, undecided=2),
        worst=worst(sides),
        notes=("transformers computes the gate in float32.",),
    )


def worst(sides: tuple[str, ...]) -> tuple[v.Element, ...]:
    """A row stage's element and one of a parameter's gradient, per side."""
    first = v.Element(
        row="up", column=sides[0], step=False, index=(1012, 95), token=253, expert=7,
        found=-1.2345678e-5, due=-1.2345600e-5, noise=2.1e-12, z=3.8,
    )  # fmt: skip
    second = replace(first, row="grad.experts.gate_and_up_projs", step=True, index=(31, 127, 191), token=None, z=-3.1)
    return tuple(replace(element, column=side) for element in (first, second) for side in sides)


def broken(found: v.Layer, name: str, column: str, **changes: Any) -> v.Layer:
    """The layer with one score replaced in part."""
    rows = [
        replace(r, whole={**r.whole, column: replace(r.whole[column], **changes)}) if r.name == name else r
        for r in found.rows
    ]
    return replace(found, rows=tuple(rows))


def passing() -> Report:
    """Two sides, transformers for information, one pair; one layer."""
    return report(layer())


def failing() -> Report:
    """A warning, a failure, an infinite z, bad elements, and tokens routed otherwise."""
    found = broken(layer(), "weights", "torch", z_rms=1.3)
    found = broken(found, "down", "flax", z_rms=31234.0, z_max=812345.0, relative=0.7, histogram=(*[0] * 32, 2000))
    found = broken(found, "rows", "torch~flax", z_rms=float("inf"), z_max=float("inf"), relative=1e-3)
    found = broken(found, "grad.gate.weight", "flax", bad=17, z_rms=float("nan"), z_max=float("nan"))
    strayed = v.Agreement(tokens=256, equal=200, ties=3, unexplained=53, examples=(4, 7, 19))
    return report(replace(found, routing={**found.routing, "flax": strayed}))


def of_four_sides() -> Report:
    """Four sides with six pairs, no side for information."""
    return report(layer(3, ("torch-loop", "torch-grouped_mm", "flax-loop", "flax-ragged_dot"), ()))


def of_six_layers() -> Report:
    """The fourth of them with a fault in each pass."""
    layers = [layer(index) for index in range(6)]
    layers[3] = broken(broken(layers[3], "up", "flax", z_rms=4.0, relative=0.02), "grad.x", "torch", z_max=9.5)
    return report(*layers)
