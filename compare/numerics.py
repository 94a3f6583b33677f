"""The numerics report: one MoE block of a real checkpoint through PyTorch, Flax and the float64 reference."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from typing import Any

from moebius import __version__
from moebius.compare import text as texts
from moebius.compare.verdict import PAIRS, Agreement, Clamped, Error, Row
from moebius.core import checkpoint as checkpoints
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError
from moebius.core.folder import read_folder
from moebius.core.precision import dtype_name

DTYPES = ("float32", "bfloat16", "float16")
_PACKAGES = ("torch", "jax", "flax", "transformers", "numpy")
_WIDTH = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `report` found.

    Attributes:
        checkpoint, family, recipe: what was read. layer: which; layers: all MoE layers. config: of the block.
        dtype, tokens, text, seed: of the run. versions: of the packages.
        clamped: how the activation's limit is met; None where it has none.
        routing: pair of sides -> how they agree on each token's experts.
        rows: the output, then the gradients, each with an error per pair of sides.
        loading: transformers' output of the block against the reference; None unless computed in float32.
    """

    checkpoint: str
    family: str
    recipe: str
    layer: int
    layers: tuple[int, ...]
    config: MoEConfig
    dtype: str
    tokens: int
    text: str
    seed: int
    versions: Mapping[str, str]
    clamped: Clamped | None
    routing: Mapping[str, Agreement]
    rows: tuple[Row, ...]
    loading: Row | None

    @property
    def passed(self) -> bool:
        """Whether everything that was compared is inside its bound."""
        verdicts = [self.routing[pair].passed for pair in PAIRS] + [row.passed for row in self.rows]
        complete = bool(self.rows) and all(row.errors.keys() >= set(PAIRS) for row in self.rows)
        return complete and all(verdicts) and (self.loading is None or self.loading.passed)

    @property
    def faults(self) -> list[str]:
        """Everything outside its bound, in words."""
        found = [f"routing, {pair}: {self.routing[pair]}" for pair in PAIRS if not self.routing[pair].passed]
        rows = (*self.rows, *([self.loading] if self.loading else []))
        for row in rows:
            found += [f"{row.name}: nothing to compare"] if not row.errors else []
            for pair, e in row.errors.items():
                if not e.passed:
                    largest = f"largest element off by {e.largest:.1e} of {e.largest_bound:.1e}"
                    found.append(f"{row.name}, {pair}: relative error {e.relative:.1e} of {e.bound:.1e}, {largest}")
        return found

    def to_json(self) -> str:
        """The report as JSON, `passed` and every row's verdict included; numbers that are not finite become null."""
        body = {**asdict(self), "passed": self.passed, "faults": self.faults}
        body["routing"] = {pair: {**asdict(a), "passed": a.passed} for pair, a in self.routing.items()}
        body["rows"] = [{**asdict(row), "passed": row.passed} for row in self.rows]
        return json.dumps(_finite(body), indent=2, allow_nan=False)

    def table(self, color: bool = False) -> str:
        """The report as text of at most 100 columns, with terminal colours if asked."""
        from rich.console import Console

        out = StringIO()
        console = Console(file=out, width=_WIDTH, force_terminal=color, no_color=not color, highlight=False)
        console.print(_named(self._header()))
        console.print(self._rich_table())
        console.print(_named([*self._footer(), ("verdict", f"{_colored(self.passed)} the bounds")]))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def _header(self) -> list[tuple[str, str]]:
        c = self.config
        sizes = f"{c.n_routed_experts} experts, {c.n_activated_experts} per token, D={c.dim}, I={c.moe_inter_dim}"
        others = f" (MoE layers: {checkpoints.ranges(self.layers)})"
        return [
            ("checkpoint", _escaped(self.checkpoint)),
            ("family", f"{self.family}; {self.recipe}"),
            ("layer", f"{self.layer}{others}: {sizes}, {c.expert_activation}"),
            ("input", _escaped(f"{self.tokens} tokens of {self.text}; {self.dtype}, seed {self.seed}")),
            ("versions", ", ".join(f"{name} {value}" for name, value in self.versions.items())),
        ]

    def _footer(self) -> list[tuple[str, str]]:
        lines = []
        if self.clamped is not None:
            c = self.clamped
            near = f"; {c.undecided} within its noise, which the bounds allow for" if c.undecided else ""
            lines.append(("clamped", f"{c.share:.1%} of the pre-activations, by the limit {c.limit}{near}"))
        if self.loading is not None:
            cells = ", ".join(f"{pair} {_cell(e)}" for pair, e in self.loading.errors.items()) or "nothing to compare"
            lines.append(("loading", f"{self.loading.name}, {cells}: {_verdict(self.loading.passed)}"))
        return lines + [("outside", _escaped(fault)) for fault in self.faults]

    def _rich_table(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("relative error / bound", no_wrap=True)
        for pair in PAIRS:
            table.add_column(pair.replace("~", " ~ "), justify="right")
        table.add_column("")
        agreed = all(self.routing[pair].passed for pair in PAIRS)
        table.add_row(
            f"equal experts, {self.tokens} tokens", *(str(self.routing[pair]) for pair in PAIRS), _colored(agreed)
        )
        for row in self.rows:
            name = row.name if row is self.rows[0] else f"gradient of {row.name.removeprefix('experts.')}"
            cells = [_cell(row.errors[pair]) if pair in row.errors else "-" for pair in PAIRS]
            table.add_row(name, *cells, _colored(row.passed))
        return table


def report(
    checkpoint: Any,
    *,
    layer: int | None = None,
    text: Any = None,
    dtype: Any = "float32",
    tokens: int = 256,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Compare one MoE block of a checkpoint in PyTorch, Flax and the float64 reference, forward and backward.

    Both frontends hold the checkpoint's weights, rounded to `dtype`, and see the block's real input: the model's own
    layers before it, run by transformers on a text. The bounds are computed for this dtype and this data.
    Runs on the CPU; measured: 100 million parameters in the block take 6 GB of memory and 100 seconds on two cores.

    Args:
        checkpoint: a Hugging Face folder of a family in moebius.core.families.
        layer: index of the layer; None for the first MoE layer.
        text: a text file; None for this project's own documents.
        dtype: "float32", "bfloat16" or "float16". tokens: at most this many. seed: of the upstream gradient.
        say: is told, in a line, what is being done.
    Raises:
        CheckpointError, ConfigError: the input cannot be used; says why.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    dtype = _checked(dtype, tokens, seed)
    plan = checkpoints.plan(read_folder(checkpoint), layer, dtype=dtype)
    words, source = (texts.read(text), str(text)) if text is not None else texts.own()

    say("loading PyTorch, JAX and transformers")
    from moebius.compare import sides
    from moebius.compare.clamp import clamped
    from moebius.compare.hidden import hidden
    from moebius.compare.judge import Judge
    from moebius.torch_frontend.checkpoint import load_moe

    say(f"running layers 0 to {plan.layer} with transformers")
    block = hidden(checkpoint, plan.layer, words, tokens)
    torch_layer = load_moe(checkpoint, plan.layer, dtype=dtype)
    problem = sides.problem(torch_layer, block.x_TD, dtype, seed)
    say("forward and backward in PyTorch and Flax")
    flax_layer = sides.flax_layer(torch_layer)
    in_torch, in_flax = sides.run_torch(torch_layer, problem), sides.run_flax(flax_layer, problem)
    say("the float64 reference and the bounds")
    exact_ids = sides.run_reference(problem).ids_TK
    found = {"torch": in_torch.ids_TK, "flax": in_flax.ids_TK, "reference": exact_ids}
    judge = Judge(problem)
    routing = {pair: judge.agreement(*(found[side] for side in pair.split("~"))) for pair in PAIRS}
    return Report(
        checkpoint=str(checkpoint),
        family=plan.family.model_type,
        recipe=plan.recipe,
        layer=plan.layer,
        layers=plan.layers,
        config=problem.config,
        dtype=dtype,
        tokens=len(block.x_TD),
        text=f"{source}, by {block.tokens}",
        seed=seed,
        versions={"moebius": __version__} | {name: version(name) for name in _PACKAGES},
        clamped=clamped(problem, exact_ids),
        routing=routing,
        rows=tuple(judge.rows(in_torch, in_flax)),
        loading=judge.loading(block.y_TD, in_torch.ids_TK) if dtype == "float32" else None,
    )


def _checked(dtype: Any, tokens: Any, seed: Any) -> str:
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ConfigError(f"a comparison in {name}", f"the dtypes {DTYPES}", "name one of them")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConfigError(f"{tokens!r} tokens", "not a positive integer", "ask for 1 or more")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed {seed!r}", "not an integer of 0 or more", "use 0 or more")
    return name


def _cell(e: Error) -> str:
    return f"{e.relative:.1e} / {e.bound:.1e}" + ("" if e.passed else " !")


def _verdict(passed: bool) -> str:
    return "inside" if passed else "OUTSIDE"


def _colored(passed: bool) -> str:
    style = "green" if passed else "bold red"
    return f"[{style}]{_verdict(passed)}[/{style}]"


def _named(lines: list[tuple[str, str]]) -> Any:
    """Names beside their values, wrapped values indented."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", min_width=11)
    grid.add_column()
    for line in lines:
        grid.add_row(*line)
    return grid


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
