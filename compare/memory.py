"""Whether a comparison fits into memory, before anything is allocated; and how many tokens do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import isqrt, prod
from pathlib import Path
from typing import Any

from moebius.core import layout
from moebius.core.config import MoEConfig
from moebius.core.errors import ConfigError
from moebius.core.precision import DTYPES

# Per row element: value and variance in float64 of a stage and of its gradient, and temporaries of the same size; a
# third more for two walks at once, whose peaks meet or not as their threads run (measured: a fifth).
_REFERENCE = 64
# Per row element and side: a stage and its gradient, in the framework and as float32.
_SIDE = 16
# Per head and pair of tokens in transformers' plain attention: scores, mask and softmax in float32.
_ATTENTION = 12
# The interpreter with both frameworks and transformers, compiled functions included.
_BASE = 2 << 30
_NARROW = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
# Where a container's limit stands: folder, limit, bytes in use, and those of them that are files in the cache.
_LIMITS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def row_bytes(config: MoEConfig, n_sides: int) -> int:
    """Bytes that each token takes: its K rows through every stage, forward and backward."""
    width = 2 * config.expert_dim + config.activation.up_width(config.moe_inter_dim) + config.moe_inter_dim
    per_token = config.n_activated_experts * width + 4 * config.dim + 8 * config.n_routed_experts
    return per_token * (_REFERENCE + n_sides * _SIDE)


def parameter_bytes(config: MoEConfig, dtype: str) -> int:
    """Bytes that the block takes: its parameters and one side's gradients, in `dtype`."""
    assert dtype in DTYPES
    return 2 * _NARROW[dtype] * sum(prod(row.shape) for row in layout.moe(config))


def available() -> int | None:
    """Bytes of memory that programs may still take, within the container's limit; None where nothing tells."""
    found = [bytes_ for bytes_ in (_machine(), *map(_container, _LIMITS)) if bytes_ is not None]
    return min(found, default=None)


def require(
    config: MoEConfig,
    dtype: str,
    tokens: int,
    n_sides: int,
    *,
    heads: int = 0,
    beside: int = 0,
    free: int | None = None,
) -> None:
    """Refuse more tokens than fit.

    Args:
        config: of the block. dtype: of its parameters. n_sides: whose answers are held at a time.
        heads: of the attention that first runs over all tokens; 0 for none. beside: bytes of the model that runs it.
        free: bytes; None to ask the machine.
    Raises:
        ConfigError: says how many do.
    """
    free = available() if free is None else free
    if free is None:
        return
    per_token = row_bytes(config, n_sides)
    room = max(free - parameter_bytes(config, dtype) - beside - _BASE, 0)
    fit = room // per_token
    if heads:
        fit = min(fit, isqrt(room // (heads * _ATTENTION)))
    if tokens > fit:
        needed = max(tokens * per_token, heads * _ATTENTION * tokens**2)
        model = f" and {beside / 2**30:.1f} GiB of layers before it" if beside else ""
        do = f"ask for at most {fit} tokens" if fit else "free memory, or name fewer sides: not even one token fits"
        raise ConfigError(
            f"{tokens} tokens through {n_sides} sides, {needed / 2**30:.1f} GiB, beside the block itself{model}",
            f"{free / 2**30:.1f} GiB of memory available",
            do,
        )


def heads(config: Mapping[str, Any]) -> int:
    """Attention heads of a model, as its config.json says; 0 where it does not."""
    found = config.get("num_attention_heads")
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0


def _machine() -> int | None:
    """Bytes that the machine has left, whatever the container may take of them."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass  # no Linux, or another /proc: ask the C library
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _container(limits: tuple[str, str, str, tuple[str, ...]]) -> int | None:
    """Bytes that a container has left; None where there is none, or no limit."""
    folder, limit, current, cached = Path(limits[0]), *limits[1:]
    try:
        left = int((folder / limit).read_text()) - int((folder / current).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Files in the cache count as in use, but leave when a program needs the room.
        return left + sum(int(stat.get(name, 0)) for name in cached)
    except (OSError, ValueError):  # no such files, or the limit "max"
        return None
