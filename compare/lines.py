"""The lines above and below the tables of a report: what was compared, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moebius.compare import verdict as v
from moebius.compare.sheet import INFORMATION, all_sides, counts, fault_text, plain
from moebius.core import checkpoint as checkpoints

if TYPE_CHECKING:
    from moebius.compare.result import Report

_Z = (
    f"error over the standard deviation that rounding explains; one correct rounding gives {v.THEORY:.2f}; "
    f"fails above z_rms {v.FAIL_RMS:g} or z_max {v.FAIL_MAX:g}, warns above z_rms {v.WARN_RMS:g}"
)
_ONE_LAYER = (
    "z_rms, z_max: from the layer's input on; step: z_rms of this step alone, fed with the side's own inputs; "
    "equal: share of elements equal in every bit"
)
_MANY_LAYERS = (
    "z_rms, z_max: worst of the stages; grad.: worst z_rms of the gradients; output: relative error of the layer's "
    "output; routing: tokens with the same experts, or others by a tie, worst column"
)
_ENDS = {
    v.PASS: "pass: rounding explains every difference",
    v.WARN: "warn: larger than rounding should be, below the limit",
    v.FAIL: "FAIL: rounding does not explain the differences",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A named line; its verdict is "" where none counts."""

    name: str
    text: str
    verdict: str = ""


def header(report: Report) -> list[Line]:
    """What was compared: checkpoint, layer, input, devices, settings, versions."""
    c = report.config
    sizes = f"{c.n_routed_experts} experts, {c.n_activated_experts} per token, D={c.dim}, I={c.moe_inter_dim}"
    here, all_layers = _ranges([layer.index for layer in report.layers]), _ranges(report.moe_layers)
    lines = {
        "checkpoint": report.checkpoint,
        "family": f"{report.family}; {report.recipe}",
        "layer": f"{here} (MoE layers: {all_layers}): {sizes}, {c.expert_activation}",
        "input": f"{report.tokens} tokens of {report.text}; {report.dtype}, seed {report.seed}",
        "sides": ", ".join(f"{side} on {device}" for side, device in report.devices.items()),
        "settings": "; ".join(report.settings),
        "versions": ", ".join(f"{name} {value}" for name, value in report.versions.items()),
    }
    return [Line(name=name, text=plain(text)) for name, text in lines.items() if text]


def footer(report: Report) -> list[Line]:
    """The load of the experts, clamping, notes, every fault, what the numbers mean, the time it took, the verdict."""
    many = len(report.layers) != 1
    lines = [Line(name="load", text=text) for text in _loads(report.layers)]
    lines += [Line(name="clamped", text=text) for text in _clamped(report.layers)]
    lines += [Line(name="note", text=text) for text in _notes(report.layers)]
    lines += _faults(report.layers)
    informing = [c for c in _columns(report.layers) if not any(counts(layer, c) for layer in report.layers)]
    if informing:
        lines.append(Line(name=INFORMATION, text=f"{', '.join(informing)}: information only, no part of the verdict"))
    lines.append(Line(name="z", text=_Z))
    lines.append(Line(name="columns", text=_MANY_LAYERS if many else _ONE_LAYER))
    if report.seconds:
        lines.append(Line(name="time", text=", ".join(f"{part} {t:.1f} s" for part, t in report.seconds.items())))
    return [*lines, Line(name="verdict", text=_ENDS[report.verdict], verdict=report.verdict)]


def _ranges(numbers: Sequence[int]) -> str:
    return checkpoints.ranges(tuple(numbers))


def _columns(layers: Sequence[v.Layer]) -> tuple[str, ...]:
    pairs = dict.fromkeys(column for layer in layers for column in layer.columns)
    return tuple(dict.fromkeys((*all_sides(layers), *pairs)))


def _loads(layers: Sequence[v.Layer]) -> list[str]:
    """The range of the experts' loads; of one layer, for each set of sides that differ in it."""
    loads: dict[tuple[int, ...], list[str]] = {}
    for layer in layers:
        for side, load in layer.load.items():
            loads.setdefault(tuple(load), []).append(side)
    if len(layers) == 1:
        return [f"{min(load)} to {max(load)} tokens per expert: {', '.join(s)}" for load, s in loads.items() if load]
    numbers = [n for load in loads for n in load]
    return [f"{min(numbers)} to {max(numbers)} tokens per expert, over all layers"] if numbers else []


def _clamped(layers: Sequence[v.Layer]) -> list[str]:
    found = [layer.clamped for layer in layers if layer.clamped is not None]
    if not found:
        return []
    low, high = (f"{f(c.share for c in found):.1%}" for f in (min, max))
    undecided = sum(c.undecided for c in found)
    near = f"; {undecided} within their noise of it, where either gradient is right" if undecided else ""
    limits = ", ".join(dict.fromkeys(f"{c.limit:g}" for c in found))
    shares = low if low == high else f"{low} to {high}"
    return [f"{shares} of the pre-activations, by the limit {limits}{near}"]


def _notes(layers: Sequence[v.Layer]) -> list[str]:
    """Each note once, with its layers where not all have it."""
    found: dict[str, list[int]] = {}
    for layer in layers:
        for note in layer.notes:
            found.setdefault(note, []).append(layer.index)
    where = {note: "" if len(i) == len(layers) else f"layer {_ranges(i)}: " for note, i in found.items()}
    return [plain(f"{place}{note}") for note, place in where.items()]


def _faults(layers: Sequence[v.Layer]) -> list[Line]:
    lines = []
    for layer in layers:
        place = "" if len(layers) == 1 else f"layer {layer.index}: "
        faults = layer.faults if layer.rows else [*layer.faults, "nothing was compared"]
        for fault in faults:
            verdict = v.WARN if ": warn," in fault else v.FAIL
            lines.append(Line(name=verdict, text=f"{place}{fault_text(fault)}", verdict=verdict))
    return lines if layers else [Line(name=v.FAIL, text="nothing was compared", verdict=v.FAIL)]
