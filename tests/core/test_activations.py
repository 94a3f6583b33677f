"""The table of activations: every row, and what a config makes of it."""

from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest

from moebius.core import ACTIVATIONS, Activation, ConfigError
from moebius.core.activations import CONFIG_ACTIVATIONS, is_gated, resolve

rows = pytest.mark.parametrize("row", ACTIVATIONS.values(), ids=lambda row: row.name)


def settings(**values):
    return SimpleNamespace(**values)


@rows
def test_activation_row_has_its_name_and_a_source(row):
    assert ACTIVATIONS[row.name] is row
    assert len(row.source) > 5


@rows
def test_activation_row_with_a_limit_names_the_setting_of_it(row):
    assert (row.limit is None) == (row.limit_field is None)


@rows
def test_activation_row_is_frozen(row):
    with pytest.raises(FrozenInstanceError):
        row.alpha = 2.0


def test_activations_of_a_config_are_the_documented_ones():
    assert CONFIG_ACTIVATIONS == ("swiglu", "swigluoai", "quick_geglu", "geglu", "relu2")


@pytest.mark.parametrize(
    ("name", "gated"),
    [
        ("swiglu", True),
        ("swigluoai", True),
        ("quick_geglu", True),
        ("geglu", True),
        ("relu2", False),
        ("", False),
        ("gelu", False),
        ("swiglu_clamped", False),
        (None, False),
        (3, False),
        (["swiglu"], False),
    ],
)
def test_is_gated_of_a_name_is_true_for_the_four_gated_ones(name, gated):
    assert is_gated(name) is gated


@rows
def test_up_width_of_a_gated_row_is_twice_the_hidden_width(row):
    assert row.up_width(7) == (14 if row.gated else 7)


def test_activation_of_an_unknown_curve_is_refused():
    with pytest.raises(ConfigError, match="'tanh'"):
        Activation(name="new", curve="tanh", gated=True, source="nowhere")


def test_activation_with_a_limit_below_zero_is_refused():
    with pytest.raises(ConfigError, match=r"limit=-1\.0\nfound: bounds that cross"):
        resolve("quick_geglu", settings(activation_limit=-1.0))
    assert resolve("swigluoai", settings(activation_limit=-1.0)).limit is None


def test_activation_interleaved_without_halves_is_refused():
    with pytest.raises(ConfigError, match="interleaved"):
        Activation(name="new", curve="relu2", gated=False, interleaved=True, source="nowhere")


@pytest.mark.parametrize("name", ["gelu", "swiglu_clamped", "", None, ["swiglu"]])
def test_resolve_of_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError) as caught:
        resolve(name, settings())
    assert repr(name) in caught.value.asked and "quick_geglu" in caught.value.found


@pytest.mark.parametrize("name", CONFIG_ACTIVATIONS)
def test_resolve_without_settings_gives_the_row_itself(name):
    assert resolve(name, settings()) == ACTIVATIONS[name]


@pytest.mark.parametrize("name", ["swigluoai", "quick_geglu"])
def test_resolve_of_a_gpt_oss_activation_takes_alpha_and_limit(name):
    row = resolve(name, settings(activation_alpha=1.5, activation_limit=3, swiglu_limit=9.0))
    assert row == replace(ACTIVATIONS[name], alpha=1.5, limit=3.0)
    assert type(row.limit) is float


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_resolve_of_swigluoai_with_no_positive_limit_does_not_clamp(limit):
    assert resolve("swigluoai", settings(activation_limit=limit)).limit is None


def test_resolve_of_quick_geglu_with_limit_zero_clamps_to_zero():
    assert resolve("quick_geglu", settings(activation_limit=0.0)).limit == 0.0


def test_resolve_of_swiglu_with_a_positive_limit_is_the_clamped_row():
    row = resolve("swiglu", settings(swiglu_limit=2.0, activation_limit=3.0, activation_alpha=9.0))
    assert row == replace(ACTIVATIONS["swiglu_clamped"], limit=2.0)
    assert (row.alpha, row.up_offset) == (1.0, 0.0)


@pytest.mark.parametrize("limit", [0.0, -1.0, None])
def test_resolve_of_swiglu_without_a_positive_limit_does_not_clamp(limit):
    assert resolve("swiglu", settings(swiglu_limit=limit)) is ACTIVATIONS["swiglu"]


@pytest.mark.parametrize("name", ["geglu", "relu2"])
def test_resolve_of_an_activation_without_settings_ignores_all_of_them(name):
    assert resolve(name, settings(swiglu_limit=2.0, activation_limit=3.0, activation_alpha=9.0)) is ACTIVATIONS[name]
