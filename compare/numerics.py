"""The numerics report: MoE blocks of a real checkpoint, or a layer of yours, through every side and the reference."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moebius import __version__
from moebius.compare.result import Report
from moebius.compare.verdict import Layer
from moebius.core.errors import ConfigError
from moebius.core.precision import dtype_name

DTYPES = ("float32", "bfloat16", "float16")
_PACKAGES = ("torch", "jax", "flax", "transformers", "numpy")


def report(
    source: Any,
    *,
    layer: int | str | None = None,
    text: Any = None,
    hidden: Any = None,
    dtype: Any = "float32",
    tokens: int = 256,
    seed: int = 0,
    sides: Sequence[str] | Mapping[str, Any] | str | None = None,
    recipe: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compare MoE blocks in PyTorch, Flax and whatever else, stage by stage, forward and backward.

    Every side holds the same weights, rounded to `dtype`, and sees the block's real input: the model's own layers
    before it, run by transformers on a text, or hidden states of yours. Errors are held against what rounding explains
    for this dtype and this data (docs/numerics.md), fails and warnings against the limits of moebius.compare.verdict.

    Args:
        source: a Hugging Face folder of a family in moebius.core.families, or a moebius.torch_frontend.MoE, of which
            config and parameters are taken.
        layer: index of the layer; None for the first MoE layer; "all" for every one.
        text: a text file; None for this project's own documents.
        hidden: in place of a text, hidden states [tokens, dim]: a safetensors file, an array or a tensor.
        dtype: "float32", "bfloat16" or "float16". tokens: at most this many. seed: of the upstream gradient.
        sides: names such as "torch:loop" or "flax@gpu"; or a mapping of names to such names or to callables
            (`compare.sides.callable_side.run` says what they are called with); None for PyTorch, Flax and, of a
            folder, transformers' own block.
        recipe: one of the family's recipes; None for the one that the tensors' names tell.
        say: is told, in a line, what is being done. progress: is told layers done and in all.
    Raises:
        CheckpointError, ConfigError, ShapeError, BackendUnavailable, Unsupported: the input cannot be used; says why.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    dtype = _checked(dtype, tokens, seed)
    say("loading PyTorch, JAX and transformers")
    from moebius.compare import sides as kinds
    from moebius.compare.subject import Checkpoint, Module

    subject: Any
    if isinstance(source, str | os.PathLike):
        asked = kinds.parse(kinds.DEFAULT if sides is None else sides)
        subject = Checkpoint(source, layer, dtype, recipe)
    else:
        asked = kinds.parse(kinds.FRONTENDS if sides is None else sides)
        subject = Module(source, layer, dtype, recipe, hidden, asked)
    kinds.check(asked, subject.config, dtype)
    clock = _Clock()
    with clock("input"):
        subject.read(hidden, text, tokens, asked, say)
    found: list[Layer] = []
    devices: dict[str, str] = {}
    n_tokens = 0
    for done, index in enumerate(subject.chosen):
        progress(done, len(subject.chosen))
        one, where, n_tokens = _layer(subject, index, asked, dtype, seed, say, clock)
        found.append(one)
        devices |= where
    progress(len(found), len(found))
    from moebius.compare.sides.precise import SETTINGS

    return Report(
        checkpoint=subject.name,
        family=subject.family,
        recipe=subject.recipe,
        moe_layers=subject.layers,
        config=subject.config,
        dtype=dtype,
        tokens=n_tokens,
        text=subject.words,
        seed=seed,
        versions={"moebius": __version__} | {name: _version(name) for name in _PACKAGES},
        devices=devices,
        settings=SETTINGS,
        layers=tuple(found),
        seconds=dict(clock.seconds),
    )


def _layer(
    subject: Any,
    index: int,
    asked: list[Any],
    dtype: str,
    seed: int,
    say: Callable[[str], None],
    clock: _Clock,
) -> tuple[Layer, dict[str, str], int]:
    """(what was found in one layer, side -> device, tokens)."""
    from moebius.compare import sides as kinds
    from moebius.compare.judge import judge
    from moebius.compare.sides.answer import Desk

    say(f"layer {index}: loading")
    with clock("loading"):
        p = subject.problem(index, dtype, seed)
    answers: dict[str, Any] = {}
    notes: list[str] = []
    with Desk() as desk:
        for side in asked:
            say(f"layer {index}: {side.name}, forward and backward")
            with clock(side.name):
                if side.kind == kinds.TRANSFORMERS:
                    call, more = subject.block(index, p)
                    side, notes = replace(side, call=call), [*notes, *more]
                answers[side.name] = kinds.run(p, side, desk)
                del side
        say(f"layer {index}: the float64 reference and its noise")
        with clock("reference"):
            found = judge(p, answers, index)
    where = {name: answer.device for name, answer in answers.items()}
    return replace(found, notes=(*found.notes, *notes)), where, p.tokens


class _Clock:
    """Seconds of each part, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


def _checked(dtype: Any, tokens: Any, seed: Any) -> str:
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise ConfigError(f"a comparison in {name}", f"the dtypes {DTYPES}", "name one of them")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ConfigError(f"{tokens!r} tokens", "not a positive integer", "ask for 1 or more")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"seed {seed!r}", "not an integer of 0 or more", "use 0 or more")
    return name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
