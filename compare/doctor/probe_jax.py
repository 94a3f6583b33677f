"""Asks JAX: version, devices, what a float32 product and a 16-bit rounding are worth, and its frontend's backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moebius.compare.doctor.reply import reply
from moebius.compare.doctor.rounding import OPERAND, WIDTH, error_of


def main(question: str = "all", *arguments: str) -> None:
    """Reply to "all", to "support", to "load" of an operation's backend, or to "explain" of a layer."""
    questions: dict[str, dict[str, Callable[[], Any]]] = {
        "all": {"import": _import, "devices": _devices, "precision": _precision, "backends": _backends},
        "support": {"support": _support},
        "load": {"load": lambda: _load(*arguments)},
        "explain": {"explain": lambda: _explain(*arguments)},
    }
    reply(questions[question])


def _import() -> dict[str, Any]:
    import jax

    return {"version": jax.__version__}


def _devices() -> dict[str, Any]:
    return devices()


def devices() -> dict[str, Any]:
    """JAX's default backend, its devices, and where that is the CPU, what JAX says of a GPU."""
    import jax

    backend, config = jax.default_backend(), _config()
    return {
        "backend": backend,
        "platforms": config.jax_platforms,
        "devices": [{"platform": device.platform, "name": device.device_kind} for device in jax.devices()],
        "why": _why_no_gpu() if backend == "cpu" else None,
    }


def _config() -> Any:
    """jax.config, whose attributes no type checker knows."""
    import jax

    return jax.config


def _why_no_gpu() -> str | None:
    import jax

    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _precision() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    config = _config()
    # As an argument: XLA would fold a constant at compile time, by its own arithmetic.
    short = jax.jit(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))(jnp.float32(OPERAND))
    return {
        "default_matmul_precision": config.jax_default_matmul_precision,
        "x64": bool(config.jax_enable_x64),
        "product_error": _product_error(),
        "keeps_16_bit_roundings": float(short) != OPERAND,
    }


def _product_error() -> float:
    import jax
    import jax.numpy as jnp

    a = jnp.full((WIDTH, WIDTH), OPERAND, jnp.float32)
    return error_of(float(jax.jit(jnp.matmul)(a, a)[0, 0]))


def _backends() -> list[dict[str, Any]]:
    import jax

    from moebius.compare.doctor.registries import states
    from moebius.jax_frontend.matmul import device_of

    kind, capability = device_of(jax.numpy.zeros(()))
    return states(_registries(), capability if kind == "cuda" else None)


def _support() -> list[dict[str, Any]]:
    from moebius.compare.doctor.registries import support

    return support(_registries())


def _load(operation: str, name: str) -> dict[str, str]:
    from moebius.compare.doctor.registries import load

    return load(_registries(), operation, name)


def _explain(*sizes: str) -> dict[str, Any]:
    import jax

    from moebius.compare.doctor.registries import explain
    from moebius.jax_frontend.dispatch_ranks import candidates
    from moebius.jax_frontend.matmul import device_of

    kind, capability = device_of(jax.numpy.zeros(()))
    here = capability if kind == "cuda" else None
    split = jax.device_count() > 1
    return explain("jax", _registries()[:2], candidates, here, tuple(map(int, sizes)), split)


def _registries() -> tuple[Any, ...]:
    from moebius.jax_frontend.dispatch import DISPATCHERS
    from moebius.jax_frontend.matmul import BACKENDS
    from moebius.jax_frontend.permute import PERMUTERS
    from moebius.jax_frontend.route import ROUTERS

    return BACKENDS, DISPATCHERS, PERMUTERS, ROUTERS
