"""What an older Triton is given for tokamax's kernels, and that a newer one is left alone."""

from __future__ import annotations

from importlib import import_module

import jax
import pytest
from fakes import forget, tokamax
from fakes.tokamax import Constexpr, Tuple

from moebius.jax_frontend import matmul_tokamax


@pytest.fixture
def loaded(monkeypatch):
    """loaded(version of triton): the stand-in for tokamax's Triton kernels, after the backend was loaded."""

    def load(triton):
        tokamax.fake(monkeypatch, triton=triton)
        matmul_tokamax.load()
        return import_module("tokamax._src.ops.ragged_dot.triton")

    yield load
    monkeypatch.undo()
    forget()
    jax.clear_caches()


def test_name_tf32_comes_before_jax_triton_asks_for_it(loaded):
    loaded("3.6.0")
    assert import_module("jax_triton.triton_lib").tf32 == 11


def test_name_tf32_leaves_a_triton_that_has_it_as_it_is(monkeypatch):
    tokamax.fake(monkeypatch, triton="3.7.1")
    driver = import_module("triton.backends.nvidia.driver")
    driver.TMA_TF32 = 12
    matmul_tokamax.load()
    assert driver.TMA_TF32 == 12
    forget()


def test_unpack_strides_hands_an_older_triton_its_own_tuples_and_nothing_else_changed(loaded):
    module = loaded("3.6.0")
    args, settings = module.jt.triton_call("rows", batch_strides=((), (0, 3)), a_strides=(5,), batch_shape=(), n=7)
    zero, three, five = (Constexpr(value) for value in (0, 3, 5))
    assert args == ("rows",) and settings.pop("batch_shape") == () and settings.pop("n") == 7
    assert settings == {"batch_strides": Tuple([Tuple(), Tuple([zero, three])]), "a_strides": Tuple([five])}
    assert isinstance(settings["batch_strides"][0], Tuple)
    assert module.jt.strides_from_shape((1, 2, 3)) == import_module("jax_triton").strides_from_shape((1, 2, 3))
    assert import_module("jax_triton").triton_call is tokamax.triton_call


@pytest.mark.parametrize("triton", ["3.7.0", "3.10.0", "4.0.0"])
def test_unpack_strides_leaves_a_newer_triton_alone(loaded, triton):
    assert loaded(triton).jt is import_module("jax_triton")
