"""What ranks share: settings in seconds, names of ranks, and waiting no longer than said."""

import threading
import time

import pytest

from moebius.core import ConfigError
from moebius.core.store import Members, seconds, within


@pytest.mark.parametrize("text, value", [("", 7.0), ("2.5", 2.5), ("off", None)])
def test_seconds_are_those_of_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("MOEBIUS_X", text)
    assert seconds("MOEBIUS_X", 7.0) == value
    monkeypatch.delenv("MOEBIUS_X")
    assert seconds("MOEBIUS_X", 7.0) == 7.0


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "OFF"])
def test_seconds_that_are_none_are_refused_with_their_name(monkeypatch, text):
    monkeypatch.setenv("MOEBIUS_X", text)
    with pytest.raises(ConfigError, match=f"MOEBIUS_X='{text}'"):
        seconds("MOEBIUS_X", 7.0)


def test_members_of_all_ranks_are_named_by_rank():
    assert Members(ranks=(0, 1, 2), place=0).named([1, 2]) == "rank 1, rank 2"


def test_members_of_a_part_of_the_ranks_are_named_by_rank_and_place():
    members = Members(ranks=(4, 6), place=1)
    assert members.named([1]) == "rank 6 (1 in its group)" and members.others == (0,)
    assert Members(ranks=(1, 0), place=0).named([0]) == "rank 1 (0 in its group)"


def test_members_of_another_kind_are_called_so():
    assert Members(ranks=(0, 1), place=0).counted == "2 ranks"
    members = Members(ranks=(0, 2), place=0, kind="process")
    assert members.counted == "2 processes" and members.named([1]) == "process 2 (1 in its group)"


def test_members_that_say_the_same_are_named_together():
    members = Members(ranks=(0, 1, 2, 3), place=0)
    assert members.grouped(["a", "b", None, "a"]) == "rank 0, rank 3: a; rank 1: b"


def test_within_returns_or_raises_what_the_function_does():
    assert within(5.0, lambda: 3) == 3
    assert within(5.0, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)


def test_within_leaves_a_function_behind_that_does_not_return():
    release, began = threading.Event(), time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        within(0.1, release.wait)
    assert time.monotonic() - began < 5.0
    release.set()
