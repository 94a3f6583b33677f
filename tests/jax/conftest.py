"""What the tests of the Flax frontend share."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from flax import nnx
from sides import jax_array, rounded

from moebius.core.precision import EXACT
from moebius.core.tolerance import bounds, within
from moebius.jax_frontend import load_parameters, parameters


@pytest.fixture(scope="session")
def agree():
    """agree(found, run, dtype): every array lies within the computed bounds of what `run(arithmetic)` returns."""

    def check(found, run, dtype):
        exact = run(EXACT)
        limits = bounds(run, exact, dtype)
        assert found.keys() == exact.keys()
        for name, value in found.items():
            value = np.asarray(value, np.float64)
            assert value.shape == exact[name].shape, name
            if not within(value, exact[name], limits[name]):
                difference = np.abs(value - exact[name])
                norm, largest, limit = np.linalg.norm(difference), difference.max(), limits[name]
                raise AssertionError(
                    f"{name}: norm {norm:.3g} of {limit.norm:.3g}, largest {largest:.3g} of {limit.largest:.3g}"
                )

    return check


@pytest.fixture(scope="session")
def wide():
    """wide(dtype): a context in which JAX has that dtype."""
    return lambda dtype: jax.enable_x64(True) if dtype == "float64" else nullcontext()


@pytest.fixture(scope="session")
def draws():
    """draws(seed): a function (shape, dtype) -> normal numbers that are exact in dtype, as float64."""

    def of(seed):
        rng = np.random.default_rng(seed)
        return lambda shape, dtype="float32", scale=1.0: rounded(rng.normal(size=shape) * scale, dtype)

    return of


@pytest.fixture(scope="session")
def cast():
    """cast(dtype, *values): JAX arrays of that dtype."""
    return lambda dtype, *values: [jax_array(value, dtype) for value in values]


@pytest.fixture(scope="session")
def build():
    """build(Module, config, ...): a module whose parameters are NumPy's random numbers, biases too.

    Drawing them in JAX would compile a random generator for each shape, two seconds each.
    """

    def make(kind, config, *args, scale=0.4, **settings):
        module = kind(config, *args, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0), **settings)
        rng = np.random.default_rng(0)
        values = parameters(module)
        drawn = {name: value for name, value in values.items() if "correction" not in name}
        values |= {name: np.asarray(rng.normal(size=v.shape) * scale, v.dtype) for name, v in drawn.items()}
        load_parameters(module, values)
        return module

    return make


@pytest.fixture
def traces():
    """traces(f): (jitted f, list that grows by one with each trace)."""

    def of(function, **settings):
        seen = []

        def traced(*args):
            seen.append(None)
            return function(*args)

        return jax.jit(traced, **settings), seen

    return of


@pytest.fixture(scope="session")
def equations():
    """equations(f, *args): every equation that JAX traces of f, nested ones too."""

    def walk(jaxpr):
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            yield equation
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                        yield from walk(inner)

    return lambda function, *args: list(walk(jax.make_jaxpr(function)(*args)))


@pytest.fixture(scope="session")
def run_alone():
    """run_alone(code, **environment): run Python code in a fresh interpreter; it must succeed.

    Flags of XLA are added to those that hold here. Not so with `plain`: loops that compile quickly change the payload
    of a NaN on its way from device to device.
    """

    def run(code, plain=False, **environment):
        flags = environment.get("XLA_FLAGS")
        if flags and not plain:
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
