"""Every error: its three parts, its built-in parent, and that it survives a pickle."""

import copy
import pickle
import warnings

import pytest

from moebius.core import errors

PARENTS = {
    "ConfigError": ValueError,
    "ShapeError": ValueError,
    "DTypeError": TypeError,
    "RoutingError": ValueError,
    "BackendUnavailable": ImportError,
    "Unsupported": NotImplementedError,
    "RankLost": RuntimeError,
    "CheckpointError": ValueError,
    "StateDictError": RuntimeError,
}
CLASSES = [
    thing
    for thing in vars(errors).values()
    if isinstance(thing, type) and issubclass(thing, errors.MoEError) and thing.__module__ == errors.__name__
]
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def test_errors_are_the_documented_ones():
    assert {kind.__name__ for kind in CLASSES} == PARENTS.keys() | {"MoEError"}


@pytest.mark.parametrize("name", PARENTS)
def test_error_is_caught_as_the_built_in_that_a_caller_expects(name):
    kind = getattr(errors, name)
    assert issubclass(kind, errors.MoEError) and issubclass(kind, PARENTS[name])


@every_class
def test_error_as_text_says_asked_found_do(kind):
    error = kind("a thing", "no thing", "make one")
    assert (error.asked, error.found, error.do) == ("a thing", "no thing", "make one")
    assert str(error) == "asked: a thing\nfound: no thing\ndo: make one"


@every_class
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_error_pickled_and_back_is_the_same(kind, protocol):
    """Test runners and multiprocessing send errors between processes."""
    error = kind("a thing", "no thing", "make one")
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is kind and str(back) == str(error)
    assert (back.asked, back.found, back.do) == (error.asked, error.found, error.do)
    assert str(copy.copy(error)) == str(error)


@every_class
def test_error_without_its_three_parts_cannot_be_made(kind):
    with pytest.raises(TypeError):
        kind("a thing")


def test_warning_is_a_user_warning():
    assert issubclass(errors.MoEWarning, UserWarning)
    with pytest.warns(errors.MoEWarning, match="has no effect"):
        warnings.warn("has no effect", errors.MoEWarning, stacklevel=1)
