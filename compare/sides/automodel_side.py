"""NeMo Automodel's own experts behind moebius' gate, where nemo_automodel is installed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import nn

from moebius.compare.problem import Problem
from moebius.compare.sides import Side
from moebius.compare.sides.answer import Answer, Desk
from moebius.compare.sides.torch_side import build, on, traced
from moebius.core.config import MoEConfig
from moebius.core.errors import BackendUnavailable, ConfigError

_ASKED = "NeMo Automodel's GroupedExperts"
_DO = "pip install nemo_automodel, or leave the side out"
_EXPERTS = "nemo_automodel.components.moe.experts"
_CONFIG = "nemo_automodel.components.moe.config"
# What its class knows; it would take another name for "torch".
BACKENDS = ("torch", "torch_mm", "gmm", "torch_mm_mxfp8")


def check(side: Side, config: MoEConfig, dtype: str) -> None:
    """Refuse a package that is not there, and a backend or device that cannot be used; see `sides.check`."""
    if side.backend not in (None, *BACKENDS):
        raise ConfigError(f"backend {side.backend!r} of {_ASKED}", f"the backends {BACKENDS}", "name one of them")
    on(side.device)
    _imported()


def run(p: Problem, desk: Desk, side: Side) -> Answer:
    """Output and gradients of the original's GroupedExperts; the gate and shared experts are moebius'.

    In 16-bit it rounds elsewhere than documented here (docs/deviations.md), so that it counts in float32 alone.
    """
    layer = build(p)
    layer.experts = _Experts(original(p, side.backend))  # type: ignore[assignment]
    return traced(layer.to(on(side.device)), p, desk, counts=p.dtype == "float32", paired=False)


def original(p: Problem, backend: str | None) -> nn.Module:
    """The original's GroupedExperts with the problem's parameters.

    Raises:
        BackendUnavailable: nemo_automodel is not installed, cannot be imported, or has another class than this knows.
    """
    experts, configs = _imported()
    try:
        known = {field.name for field in fields(configs.MoEConfig)}
        values = {name: value for name, value in asdict(p.config).items() if name in known}
        values |= {"dtype": getattr(torch, p.dtype), "gate_dtype": None, "inter_dim": p.config.inter_dim or 0}
        with torch.device("meta"):
            module: nn.Module = experts.GroupedExperts(configs.MoEConfig(**values), _Backend.of(backend))
        own = {n.removeprefix("experts."): value for n, value in p.parameters.items() if n.startswith("experts.")}
        module.load_state_dict({name: nn.Parameter(value) for name, value in own.items()}, assign=True)
    except Exception as error:
        raise BackendUnavailable(_ASKED, f"of another version: {_words(error)}", _DO) from error
    return module


def _imported() -> tuple[Any, Any]:
    """(the module of the original's experts, the one of its config)."""
    try:
        return import_module(_EXPERTS), import_module(_CONFIG)
    except Exception as error:  # a package of this size fails in many ways
        raise BackendUnavailable(_ASKED, _words(error), _DO) from error


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Experts(nn.Module):
    """The original under the names that moebius gives its parameters."""

    def __init__(self, original: nn.Module):
        super().__init__()
        for name, value in original.named_parameters(recurse=False):
            setattr(self, name, value)
        self._original = [original]  # in a list: its parameters are not to be listed twice

    def forward(self, x: Any, token_mask: Any, weights: Any, indices: Any) -> Any:
        """[T, D], as GroupedExperts of either."""
        return self._original[0](x, token_mask, weights, indices.long())


@dataclass(frozen=True)
class _Backend:
    """What the original reads of its backend config."""

    experts: str
    compile_router_weight: bool = False

    @classmethod
    def of(cls, name: str | None) -> _Backend | None:
        """None, the original's own default, where no backend is named."""
        return None if name is None else cls(name)
