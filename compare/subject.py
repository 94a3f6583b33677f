"""What is compared: MoE layers of a checkpoint, or a layer in memory. Gives each layer's problem, one at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moebius.compare import hidden as inputs
from moebius.compare import memory
from moebius.compare import sides as kinds
from moebius.compare import text as texts
from moebius.compare.problem import Problem, rounded, upstream
from moebius.compare.sides.transformers_side import block_of
from moebius.core import checkpoint as checkpoints
from moebius.core import layout
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError
from moebius.core.folder import listed, read_folder
from moebius.core.routing import LOSSES
from moebius.torch_frontend import MoE, load_moe, parameters, state

Say = Callable[[str], None]


class Checkpoint:
    """A folder: its plan, its input, its layers.

    Args:
        path: of the folder. layer: index, None for the first MoE layer, "all". dtype: to compute in.
        recipe: one of the family's, or None.

    Attributes:
        name, family, recipe, words: for the report; `words` says what was read.
        layers: all MoE layers. chosen: those to compare. config: of each.
    """

    def __init__(self, path: Any, layer: int | str | None, dtype: str, recipe: str | None):
        self.path, self.dtype, self.recipe_asked = Path(path).expanduser(), dtype, recipe
        self.folder = read_folder(self.path)
        first = None if layer == "all" else _index(layer)
        self.plan = checkpoints.plan(self.folder, first, dtype=dtype, recipe=recipe)
        self.layers = self.plan.layers
        self.chosen = self.layers if layer == "all" else (self.plan.layer,)
        self.config, self.name = self.plan.config, str(path)
        self.family, self.recipe = self.plan.family.model_type, self.plan.recipe
        self.words = ""
        self._model: inputs.Model | None = None
        self._hidden: dict[int, np.ndarray] = {}

    def read(self, hidden: Any, text: Any, tokens: int, asked: Sequence[kinds.Side], say: Say) -> None:
        """Have the blocks' input ready, once it is known to fit into memory."""
        if hidden is not None and text is not None:
            raise ConfigError("hidden states and a text", "both", "pass one of them")
        if hidden is not None:
            self._hidden = inputs.read(hidden, self.chosen, self.config.dim, tokens)
            memory.require(self.config, self.dtype, _most(self._hidden), len(asked))
            self.words = f"hidden states of {hidden}" if isinstance(hidden, str | os.PathLike) else "hidden states"
            return
        words, source = (texts.read(text), str(text)) if text is not None else texts.own()
        most = min(tokens, len(words.encode()))  # a token takes a byte or more
        memory.require(
            self.config,
            self.dtype,
            most,
            len(asked),
            heads=memory.heads(self.folder.config),
            beside=self._model_bytes(),
        )
        say(f"running layers 0 to {max(self.chosen)} with transformers")
        self._model = inputs.Model(self.path, self.chosen, words, tokens)
        self.words = f"{source}, by {self._model.kind}"
        if not any(side.kind == kinds.TRANSFORMERS for side in asked):
            for layer in self.chosen:  # nobody else asks for them: they need not stay in memory
                self._model.block(layer)

    def _model_bytes(self) -> int:
        """What transformers' model takes in float32, up to the last layer that is compared."""
        last = max(self.chosen)
        names = [name for name in self.folder.files if (_layer_of(name) or 0) <= last]
        return 4 * sum(prod(stored.shape) for stored in self.folder.stored(names).values())

    def problem(self, index: int, dtype: str, seed: int) -> Problem:
        """One layer's parameters and its input."""
        x_TD = self._hidden[index] if self._model is None else self._model.inputs[index]
        layer = load_moe(self.path, index, dtype=dtype, recipe=self.recipe_asked)
        return _problem(layer, x_TD, dtype, seed, f"layer {index} of {self.path}")

    def block(self, index: int, p: Problem) -> tuple[tuple[nn.Module, Any, str], list[str]]:
        """((transformers' block, family, recipe), what is to be noted of it)."""
        family, recipe = self.plan.family, self.plan.recipe
        if self._model is not None:
            return (self._model.block(index), family, recipe), []
        note = "transformers' block holds the weights that moebius read: how the checkpoint is read is not checked"
        return (block_of(self.path, index, family, recipe, p), family, recipe), [note]


class Module:
    """A layer of the caller's, of which config and parameters are taken, with hidden states.

    Args:
        layer: moebius.torch_frontend.MoE. index, recipe: None. dtype: to compute in.
        hidden: not None; read later. asked: sides.

    Attributes: as of Checkpoint.
    """

    def __init__(self, layer: Any, index: Any, dtype: str, recipe: Any, hidden: Any, asked: Sequence[kinds.Side]):
        what = f"a comparison of a {type(layer).__name__}"
        if not isinstance(layer, MoE):
            do = "pass a folder or a moebius.torch_frontend.MoE; other layers as sides={name: layer}"
            raise ConfigError(what, f"{type(layer).__module__}.{type(layer).__qualname__}", do)
        if hidden is None:
            raise ConfigError(what, "no hidden states", "pass hidden=, [tokens, dim]")
        if index is not None or recipe is not None:
            raise ConfigError(what, "layer or recipe, which a folder has", "leave them out")
        if any(side.kind == kinds.TRANSFORMERS for side in asked):
            raise ConfigError(what, "side 'transformers', which a folder has", "leave it out")
        self.module, self.dtype = layer, dtype
        self.layers: tuple[int, ...] = ()
        self.chosen = (0,)
        self.config: MoEConfig = replace(layer.config, dtype=dtype, gate_dtype=None)
        self.name, self.family, self.recipe = f"a {type(layer).__name__} in memory", "none", "as it is"
        self.words = "hidden states"
        self._hidden: dict[int, np.ndarray] = {}

    def read(self, hidden: Any, text: Any, tokens: int, asked: Sequence[kinds.Side], say: Say) -> None:
        """Have the layer's input ready, once it is known to fit into memory."""
        if text is not None:
            raise ConfigError("a text for a layer in memory", "no model to read it", "pass hidden= alone")
        self._hidden = inputs.read(hidden, self.chosen, self.config.dim, tokens)
        memory.require(self.config, self.dtype, _most(self._hidden), len(asked))

    def problem(self, index: int, dtype: str, seed: int) -> Problem:
        """The layer's parameters and its input."""
        return _problem(self.module, self._hidden[index], dtype, seed, self.name)


def _problem(layer: MoE, x_TD: np.ndarray, dtype: str, seed: int, where: str) -> Problem:
    """The problem of a torch layer's parameters, cast to `dtype` where they differ; finite, and all there."""
    own = parameters(layer)
    missing = [row.name for row in layout.moe(layer.config) if row.name not in own or own[row.name].is_meta]
    if missing:
        found = f"none for {listed(missing)}"
        raise ConfigError(f"the parameters of {where}", found, "pass a layer with a router and with data")
    own = {name: value.to("cpu", getattr(torch, dtype)) for name, value in own.items()}
    x_TD = rounded(x_TD, dtype)
    broken = [name for name, value in own.items() if not torch.isfinite(value).all()]
    broken += [] if np.isfinite(x_TD).all() else ["its input"]
    if broken:
        do = "float16 ends at 65504: use another dtype" if dtype == "float16" else "look for where they arise"
        raise ConfigError(f"finite values in {dtype} at {where}", f"inf or nan in {listed(broken)}", do)
    bias_E = state(layer).get("gate.e_score_correction_bias")
    off: dict[str, Any] = {f"{loss}_coeff": 0.0 for loss in LOSSES}  # of training; the sides run in evaluation
    return Problem(
        config=replace(layer.config, dtype=dtype, gate_dtype=None, **off),
        dtype=dtype,
        x_TD=x_TD,
        dy_TD=upstream(x_TD.shape, dtype, seed),
        parameters=own,
        correction_bias_E=None if bias_E is None else bias_E.cpu(),
    )


def _layer_of(name: str) -> int | None:
    """The layer that a stored tensor belongs to; None for embeddings and the like."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return None if found is None else int(found.group(1))


def _most(hidden: dict[int, np.ndarray]) -> int:
    return max(len(x_TD) for x_TD in hidden.values())


def _index(layer: Any) -> int | None:
    if layer is None or (isinstance(layer, int) and not isinstance(layer, bool)):
        return layer
    try:
        if isinstance(layer, str):
            return int(layer)
    except ValueError:
        pass
    raise ConfigError(f"layer {layer!r}", "neither a number nor 'all'", "pass an index, 'all' or nothing")
