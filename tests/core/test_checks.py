"""Shape and dtype checks: what passes, and what the error says."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from moebius.core import DTypeError, MoEConfig, MoEError, ShapeError, checks, layout


@dataclass
class Array:
    """Another framework's array, or a tracer of one: it has a shape and a dtype that prints."""

    shape: tuple
    dtype: object


def array(*shape, dtype="torch.float32"):
    return Array(shape, dtype)


def refusal(kind, check, *arguments):
    with pytest.raises(kind) as caught:
        check(*arguments)
    error = caught.value
    assert error.asked and error.found and error.do
    return error


@pytest.mark.parametrize("dtype", [np.dtype("float32"), "torch.float32", "float32"])
def test_dtype_text_of_any_framework_is_the_plain_name(dtype):
    assert checks.dtype_text(SimpleNamespace(dtype=dtype)) == "float32"


@pytest.mark.parametrize("dtype", ["torch.float64", "float32", "torch.bfloat16", np.dtype("float16")])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_tokens_of_the_right_width_pass(tokens, dtype):
    checks.tokens(array(tokens, 8, dtype=dtype), 8)


@pytest.mark.parametrize("shape", [(8,), (3, 7), (8, 3), (), (2, 3, 7)])
def test_tokens_of_another_shape_are_refused_with_the_width(shape):
    error = refusal(ShapeError, checks.tokens, array(*shape), 8)
    assert "[tokens, 8]" in error.asked and str(shape) in error.found


def test_tokens_with_leading_axes_are_told_to_flatten():
    assert "x.reshape(-1, 8)" in refusal(ShapeError, checks.tokens, array(2, 3, 8), 8).do


@pytest.mark.parametrize("dtype", ["torch.int64", "bool", "torch.float8_e4m3fn", "complex64"])
def test_tokens_of_another_dtype_are_refused_by_name(dtype):
    error = refusal(DTypeError, checks.tokens, array(3, 8, dtype=dtype), 8, "rows")
    assert error.found == dtype.rsplit(".", 1)[-1] and "rows" in error.asked


def test_token_mask_of_one_bool_a_token_passes():
    checks.token_mask(array(3, dtype="torch.bool"), 3)
    checks.token_mask(np.ones(0, bool), 0)


@pytest.mark.parametrize("dtype", ["torch.int64", "float32", "torch.uint8"])
def test_token_mask_of_another_dtype_is_refused(dtype):
    """A float or integer mask inverts or fails far from here."""
    assert "bool" in refusal(DTypeError, checks.token_mask, array(3, dtype=dtype), 3).asked


@pytest.mark.parametrize("shape", [(2,), (3, 1), ()])
def test_token_mask_of_another_shape_is_refused(shape):
    assert "[3]" in refusal(ShapeError, checks.token_mask, array(*shape, dtype="bool"), 3).asked


@pytest.mark.parametrize("indices", ["torch.int32", "int64"])
@pytest.mark.parametrize("weights", ["torch.float32", "bfloat16"])
def test_routes_of_one_shape_pass(weights, indices):
    checks.routes(array(3, 2, dtype=weights), array(3, 2, dtype=indices), 3)


@pytest.mark.parametrize(
    ("kind", "weights", "indices", "asked"),
    [
        (DTypeError, array(3, 2), array(3, 2), "indices of dtype int32 or int64"),
        (DTypeError, array(3, 2), array(3, 2, dtype="int16"), "indices of dtype int32 or int64"),
        (DTypeError, array(3, 2), array(3, 2, dtype="torch.bool"), "indices of dtype int32 or int64"),
        (DTypeError, array(3, 2, dtype="int32"), array(3, 2, dtype="int32"), "weights of a dtype"),
        (ShapeError, array(3), array(3, dtype="int32"), "indices of shape [3, K]"),
        (ShapeError, array(4, 2), array(4, 2, dtype="int32"), "indices of shape [3, K]"),
        (ShapeError, array(3, 1), array(3, 2, dtype="int32"), "shape of indices (3, 2)"),
        (ShapeError, array(3, 2, 1), array(3, 2, dtype="int32"), "shape of indices (3, 2)"),
    ],
    ids=str,
)
def test_routes_that_do_not_fit_are_refused(kind, weights, indices, asked):
    assert asked in refusal(kind, checks.routes, weights, indices, 3).asked


def test_grouped_matmul_of_fitting_arrays_passes():
    checks.grouped_matmul(array(5, 3), array(2, 3, 4), array(2, dtype="int32"))


@pytest.mark.parametrize(
    ("kind", "rows", "weight", "sizes", "asked"),
    [
        (ShapeError, array(5, 3), array(3, 4), array(2, dtype="int32"), "[e, D, F]"),
        (ShapeError, array(5, 4), array(2, 3, 4), array(2, dtype="int32"), "rows of shape [tokens, 3]"),
        (DTypeError, array(5, 3), array(2, 3, 4, dtype="bfloat16"), array(2, dtype="int32"), "dtype float32"),
        (DTypeError, array(5, 3), array(2, 3, 4), array(2), "group_sizes of dtype int32"),
        (ShapeError, array(5, 3), array(2, 3, 4), array(3, dtype="int32"), "group_sizes of shape [2]"),
        (ShapeError, array(5, 3), array(2, 3, 4), array(2, 1, dtype="int32"), "group_sizes of shape [2]"),
    ],
    ids=str,
)
def test_grouped_matmul_of_arrays_that_do_not_fit_is_refused(kind, rows, weight, sizes, asked):
    assert asked in refusal(kind, checks.grouped_matmul, rows, weight, sizes).asked


def rows():
    return layout.experts(
        MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=6, moe_inter_dim=3, expert_bias=True)
    )


def test_parameters_that_are_all_there_pass():
    checks.parameters({row.name: array(*row.shape) for row in rows()} | {"more": None}, rows())


def test_parameters_that_are_missing_are_all_named():
    error = refusal(ShapeError, checks.parameters, {"down_projs": array(4, 3, 6)}, rows())
    assert error.found == "no gate_and_up_projs, gate_up_proj_bias, down_proj_bias"


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 6, 6, 1), (3, 6, 6), (4, 36)])
def test_parameter_of_another_shape_is_refused_by_name(shape):
    given = {row.name: array(*row.shape) for row in rows()} | {"gate_and_up_projs": array(*shape)}
    error = refusal(ShapeError, checks.parameters, given, rows())
    assert error.asked == "gate_and_up_projs of shape [4, 6, 6]" and str(list(shape)) in error.found


def test_parameter_of_the_transposed_shape_is_refused():
    assert "[experts, in, out]" in refusal(ShapeError, checks.parameter, "down_projs", array(4, 6, 3), (4, 3, 6)).do


@pytest.mark.parametrize(("word", "found"), [(None, "off"), ("full", "full"), ("off", "off")])
def test_environment_gives_the_word_or_off(word, found, monkeypatch):
    monkeypatch.delenv("MOEBIUS_CHECKS", raising=False)
    if word is not None:
        monkeypatch.setenv("MOEBIUS_CHECKS", word)
    assert checks.environment() == found


def test_checks_read_shape_and_dtype_alone():
    """A tracer has no values: nothing here may ask for one."""

    class Tracer:
        shape, dtype = (3, 2), "int32"

        def __getattr__(self, name):
            raise AssertionError(f"a check asked for {name}")

    checks.routes(array(3, 2), Tracer(), 3)


def test_errors_of_checks_are_of_one_family():
    assert issubclass(ShapeError, MoEError) and issubclass(DTypeError, MoEError)


def test_upstream_of_another_shape_or_dtype_is_refused():
    dy = np.zeros((3, 4), np.float32)
    checks.upstream(dy, (3, 4), "float32")
    with pytest.raises(ShapeError, match="one gradient per element"):
        checks.upstream(dy, (4, 3), "float32")
    with pytest.raises(DTypeError, match="cast dy_TD"):
        checks.upstream(dy, (3, 4), "bfloat16")
