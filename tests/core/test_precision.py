"""dtypes by name, and the noise that stands for rounding."""

from types import SimpleNamespace

import numpy as np
import pytest

from moebius.core import ConfigError
from moebius.core.precision import DTYPES, EXACT, STEPS, Noise, accumulate_dtype, dtype_name


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("bfloat16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("jax.numpy.float16", "float16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("float", "float32"),
        ("fp64", "float64"),
        ("double", "float64"),
        ("torch.double", "float64"),
        (np.float32, "float32"),
        (np.dtype("float64"), "float64"),
        (SimpleNamespace(name="bfloat16"), "bfloat16"),
        (SimpleNamespace(dtype=np.dtype("float16")), "float16"),
    ],
    ids=str,
)
def test_dtype_name_of_any_spelling_is_the_plain_name(given, name):
    assert dtype_name(given) == name


@pytest.mark.parametrize("given", ["int32", "float8_e4m3fn", "torch.int64", "", None, 3, np.int32, object()])
def test_dtype_name_of_anything_else_is_refused(given):
    with pytest.raises(ConfigError) as caught:
        dtype_name(given)
    assert all(name in caught.value.found for name in DTYPES)


@pytest.mark.parametrize(
    ("given", "name"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), (np.float64, "float64")],
)
def test_accumulate_dtype_is_at_least_float32(given, name):
    assert accumulate_dtype(given) == name


@pytest.mark.parametrize("name", ["float64", "float32", "float16"])
def test_dtypes_hold_what_numpy_says(name):
    """float16 with its subnormals; the others without, which XLA flushes to zero."""
    info = np.finfo(name)
    granularity = info.smallest_subnormal if name == "float16" else info.smallest_normal
    assert DTYPES[name] == (float(info.eps) / 2, float(granularity))


def test_steps_have_names_of_their_own_and_round():
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(step.computes and step.rounds_to for step in STEPS)


def test_exact_leaves_every_value_alone():
    value = np.random.default_rng(0).normal(size=(3, 4))
    assert EXACT.curve(value) is value and EXACT.store(value) is value
    np.testing.assert_array_equal(EXACT.dot(value, value.T), value @ value.T)
    assert EXACT.sum(value, axis=0, keepdims=True).shape == (1, 4) and EXACT.sum(value) == value.sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_a_seed_is_the_same_again_and_other_seeds_differ(dtype):
    value = np.ones((4, 4))
    one, again, other = (Noise(dtype, seed).store(value) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_of_store_stays_within_half_a_unit_in_the_last_place(dtype):
    value = np.linspace(1.0, 2.0, 1000)
    error = np.abs(Noise(dtype, 0).store(value) / value - 1)
    assert 0.5 * DTYPES[dtype][0] < error.max() <= DTYPES[dtype][0] * (1 + 1e-6) + 2.0**-52


def test_noise_of_store_in_another_dtype_is_that_dtypes():
    value = np.ones(1000)
    assert np.abs(Noise("bfloat16", 0).store(value, "float32") - 1).max() <= DTYPES["float32"][0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_leaves_exact_zeros_zero(dtype):
    noise, zeros = Noise(dtype, 0), np.zeros((2, 2))
    assert not noise.store(zeros).any() and not noise.curve(zeros).any()
    assert not noise.dot(zeros, np.ones((2, 2))).any() and not noise.sum(zeros, axis=0).any()


def test_noise_below_the_smallest_number_is_that_number():
    error = np.abs(Noise("float16", 0).store(np.full(1000, 1e-12)) - 1e-12)
    assert 0.4 * 2.0**-24 < error.max() <= 0.5 * 2.0**-24


@pytest.mark.parametrize("length", [1, 16, 256])
def test_noise_of_dot_grows_with_the_root_of_its_length(length):
    """Of ones: spread v * sqrt(n / 2) * sqrt(n)."""
    a, b = np.ones((100, length)), np.ones((length, 100))
    spread = (Noise("bfloat16", 0).dot(a, b) - length).std()
    assert spread == pytest.approx(DTYPES["float32"][0] * length / np.sqrt(2), rel=0.05)


def test_noise_of_no_elements_is_empty():
    noise = Noise("float32", 0)
    assert noise.dot(np.ones((0, 3)), np.ones((3, 2))).shape == (0, 2)
    assert noise.dot(np.ones((2, 0)), np.ones((0, 2))).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert noise.sum(np.ones((0, 2)), axis=0).tolist() == [0.0, 0.0]
