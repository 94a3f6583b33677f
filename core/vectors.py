"""Golden vectors: inputs that any language can rebuild bit for bit, with the outputs and every gradient.

    python -m moebius.core.vectors            compute every case again and print the largest deviation from the file
    python -m moebius.core.vectors --write    write the file again; where nothing changed, the same bytes

The inputs are small integers over a power of two, drawn by the integer recipe that the file states: exact in float64,
float32, float16 and bfloat16. Outside the latent projections so are the pre-activations and the logits (fewer than
2^8 steps of their grid), so that clamps and ties fall alike in every dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moebius.core import reference
from moebius.core.config import MoEConfig
from moebius.core.precision import EXACT, Arithmetic
from moebius.core.reference.route import top_k
from moebius.core.routing import LOSSES
from moebius.core.vector_cases import LAYOUTS, config_of, declared

Kind = Literal["experts", "gate", "moe"]
Arrays = dict[str, np.ndarray]

FILE = Path(__file__).with_name("vectors.json")
DIGITS = 12
TOLERANCE = 1e-11
# Elements below this share of their tensor's largest are compared relative to that share: what is left of a sum
# that cancels carries the rounding of its terms.
_SMALL = 1e-3

_ABOUT = {
    "array": "values, or shape and a recipe: element n in C order is (low + s[n] mod span) / over,"
    " where s[0] = 48271 seed mod 2147483647 and s[n] = 48271 s[n-1] mod 2147483647",
    "case": "kind, config (what differs from the defaults), inputs (name: array), outputs (or the case that has"
    " the same ones); d before a name is the gradient of the sum of y * dy (gate: of weights * dweights), with"
    " each of the router's losses times its coefficient",
    "digits": DIGITS,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """One golden vector; every array is the caller's own.

    Attributes:
        name: unique, of lower-case words.
        kind: "experts", "gate" or "moe": which function of `moebius.core.reference` it is of.
        config: the layer; float32 parameters.
        inputs: float64, int64 or bool. Every parameter by its name in `moebius.core.layout`, and
            experts: x [T, D], token_mask [T], weights and ids [T, K], dy [T, D];
            gate: x [T, D], token_mask [T], dweights [T, K], correction_bias [E] where the config has one, and
            n_sequences [] that the tokens make up where it has a loss of sequences;
            moe: x and dy [B, T, D], padding_mask [B, T] (True: padding), and correction_bias.
        outputs: float64 or int64. The gradient of each parameter as "d" + its name, dx, and
            experts: y, dweights; gate: weights, ids, load [E], aux_loss; moe: y, ids, load, aux_loss. The loss is
            that before its coefficient, and there even where the coefficient is 0. z_loss and seq_aux_loss, likewise
            before their coefficients, where the config has them.
    """

    name: str
    kind: Kind
    config: MoEConfig
    inputs: Arrays
    outputs: Arrays

    @property
    def parameters(self) -> Arrays:
        """The inputs that are parameters, in the order of the layout."""
        return {row.name: self.inputs[row.name] for row in LAYOUTS[self.kind](self.config)}


def load(file: Path = FILE) -> list[Case]:
    """Every case of the file, with arrays of its own."""
    return _cases(json.loads(file.read_text()))


def compute(case: Case, arithmetic: Arithmetic = EXACT) -> Arrays:
    """The outputs of `case` by the reference.

    Args:
        arithmetic: rounding to simulate; the experts are then those of `case.outputs`, not chosen again.
    """
    ids_TK = None if arithmetic is EXACT else case.outputs.get("ids")
    return {"experts": _experts, "gate": _gate, "moe": _moe}[case.kind](case, ids_TK, arithmetic)


def deviation(values: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Largest relative deviation of each output; infinite where shapes, integers or zeros differ, or on nan."""
    worst = {name: float("inf") for name in values.keys() ^ stored.keys()}
    return worst | {name: _deviation(values[name], stored[name]) for name in values.keys() & stored.keys()}


def write(file: Path = FILE) -> None:
    """Write every case of this module to `file`. Numbers there that still hold stay as they are: the last digit of
    another machine changes nothing."""
    before = {case.name: case for case in load(file)} if file.exists() else {}
    document = _document()
    stored: dict[str, Arrays] = {}
    for case, entry in zip(_cases(document), document["cases"], strict=True):
        outputs = compute(case)
        twin = next((name for name, others in stored.items() if _same(outputs, others)), None)
        if twin is not None:
            entry["outputs"] = twin
            continue
        if case.name in before and _same(outputs, before[case.name].outputs):
            outputs = before[case.name].outputs
        stored[case.name] = outputs
        entry["outputs"] = {name: _rounded(value) for name, value in outputs.items()}
    parts = [f"{json.dumps(key)}: {_text(part, 3 if key == 'cases' else 1)}" for key, part in document.items()]
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moebius.core.vectors", description="Check the golden vectors.")
    parser.add_argument("--write", action="store_true", help="write the file again instead of checking it")
    if parser.parse_args(arguments).write:
        write()
    document = json.loads(FILE.read_text())
    for entry in document["cases"]:
        del entry["outputs"]
    if document != _document():
        print(f"{FILE.name} and the declared cases differ: --write makes them agree")
        return 1
    cases = load()
    found = {case.name: deviation(compute(case), case.outputs) for case in cases}
    worst, place = max((worst, f"{case}: {name}") for case, each in found.items() for name, worst in each.items())
    print(f"{len(cases)} cases, largest deviation {worst:.1e} ({place}), limit {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


# ------------------------------------------------------------------------------------------------ what is computed


def _experts(case: Case, ids_TK: np.ndarray | None, arithmetic: Arithmetic) -> Arrays:
    given, parameters = case.inputs, case.parameters
    trace = reference.experts(
        given["x"], given["token_mask"], given["weights"], given["ids"], parameters, case.config, arithmetic
    )
    dx_TD, dweights_TK, grads = reference.experts_vjp(trace, parameters, case.config, given["dy"], arithmetic)
    return {"y": trace.y_TD, "dx": dx_TD, "dweights": dweights_TK} | _gradients(grads)


def _gate(case: Case, ids_TK: np.ndarray | None, arithmetic: Arithmetic) -> Arrays:
    given, config, mask_T = case.inputs, case.config, case.inputs["token_mask"]
    bias_E, best_TK = given.get("correction_bias"), _best(given["x"], case.parameters, config)
    settings: dict[str, Any] = {"n_sequences": int(given.get("n_sequences", 1)), "best_TK": best_TK}
    settings["arithmetic"] = arithmetic
    logits_TE, routing = reference.gate(
        given["x"], case.parameters, config, correction_bias_E=bias_E, ids_TK=ids_TK, arithmetic=arithmetic
    )
    load_E = reference.expert_load(routing.ids_TK, mask_T, config.n_routed_experts)
    losses = reference.losses(logits_TE, routing, mask_T, config, **settings)
    dx_TD, grads = reference.gate_vjp(
        given["x"],
        logits_TE,
        routing.ids_TK,
        case.parameters,
        config,
        given["dweights"],
        *reference.losses_vjp(logits_TE, routing, mask_T, config, **settings),
        correction_bias_E=bias_E,
        arithmetic=arithmetic,
    )
    chosen = {"weights": routing.weights_TK, "ids": routing.ids_TK, "load": load_E} | _losses(config, losses)
    return chosen | {"dx": dx_TD} | _gradients(grads)


def _moe(case: Case, ids_TK: np.ndarray | None, arithmetic: Arithmetic) -> Arrays:
    given, config, shape = case.inputs, case.config, case.inputs["x"].shape
    x_TD, dy_TD = given["x"].reshape(-1, config.dim), given["dy"].reshape(-1, config.dim)
    mask_T, bias_E = ~given["padding_mask"].reshape(-1), given.get("correction_bias")
    router = {name[5:]: value for name, value in case.parameters.items() if name.startswith("gate.")}
    settings: dict[str, Any] = {"n_sequences": shape[0], "best_TK": _best(x_TD, router, config)}
    settings |= {"correction_bias_E": bias_E, "arithmetic": arithmetic}
    trace = reference.moe(x_TD, mask_T, case.parameters, config, ids_TK=ids_TK, **settings)
    dx_TD, grads = reference.moe_vjp(trace, x_TD, mask_T, case.parameters, config, dy_TD, **settings)
    losses = {name: getattr(trace, name) for name in LOSSES}
    chosen = {"ids": trace.routing.ids_TK, "load": trace.load_E} | _losses(config, losses)
    return {"y": trace.y_TD.reshape(shape)} | chosen | {"dx": dx_TD.reshape(shape)} | _gradients(grads)


def _best(x_TD: np.ndarray, router: Arrays, config: MoEConfig) -> np.ndarray:
    """[T, K]: each token's best by score, ranked exactly: some logits are equal, and noise would order them anew."""
    return top_k(reference.gate(x_TD, router, config)[0], config.n_activated_experts)


def _losses(config: MoEConfig, losses: Mapping[str, float]) -> Arrays:
    return {name: np.asarray(value) for name, value in losses.items() if name == "aux_loss" or name in config.losses}


def _gradients(grads: Arrays) -> Arrays:
    return {f"d{name}": grads[name] for name in sorted(grads)}


# ------------------------------------------------------------------------------------------------ reading and writing


def _document() -> dict[str, Any]:
    """What the file holds, outputs left out."""
    cases, arrays = declared()
    return {"about": _ABOUT, "arrays": arrays, "cases": cases}


def _cases(document: dict[str, Any]) -> list[Case]:
    stored = {entry["name"]: entry.get("outputs", {}) for entry in document["cases"]}
    cases = []
    for entry in document["cases"]:
        outputs = stored[entry["name"]]
        outputs = stored[outputs] if isinstance(outputs, str) else outputs
        cases.append(
            Case(
                name=entry["name"],
                kind=entry["kind"],
                config=config_of(entry["config"]),
                inputs={name: _array(document["arrays"][key]) for name, key in entry["inputs"].items()},
                outputs={name: np.array(value) for name, value in outputs.items()},
            )
        )
    return cases


def _array(how: dict[str, Any]) -> np.ndarray:
    if "values" in how:
        return np.array(how["values"])
    state, numbers = how["seed"], []
    for _ in range(int(np.prod(how["shape"]))):
        state = 48271 * state % 2147483647
        numbers.append((how["low"] + state % how["span"]) / how["over"])
    return np.array(numbers, np.float64).reshape(how["shape"])


def _deviation(value: np.ndarray, stored: np.ndarray) -> float:
    if value.shape != stored.shape:
        return float("inf")
    difference = np.abs(value - stored)
    if np.issubdtype(stored.dtype, np.integer) or not np.any(stored):
        return 0.0 if not np.any(difference) else float("inf")
    worst = float((difference / np.maximum(np.abs(stored), _SMALL * np.abs(stored).max())).max())
    return float("inf") if np.isnan(worst) else worst


def _same(values: Arrays, others: Arrays) -> bool:
    return max(deviation(values, others).values()) <= TOLERANCE


def _rounded(value: np.ndarray) -> Any:
    if np.issubdtype(value.dtype, np.integer):
        return value.tolist()
    return np.vectorize(lambda number: float(f"{number:.{DIGITS}g}") + 0.0, otypes=[float])(value).tolist()


def _text(value: Any, depth: int) -> str:
    """JSON, with lists and records that hold others opened `depth` deep, one line for each item."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not depth or not any(isinstance(item, dict | list) for item in items):
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, list):
        return "[\n" + ",\n".join(_text(item, depth - 1) for item in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_text(item, depth - 1)}" for key, item in value.items()) + "\n}"


if __name__ == "__main__":
    sys.exit(main())
