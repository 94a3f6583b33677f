"""Facts of ranks compared: in which words they differ, and that all ranks end alike."""

import time

import pytest
from stores import Broken, Silent, Table, together

from moebius.core import ConfigError, RankLost
from moebius.core.preflight import Facts, agree, differences, differing, exchange, meet, timeout
from moebius.core.store import Members

VERSIONS = {"moebius": "1", "torch": "2"}
LAYER = {"name": None, "D": 8, "E": 4, "K": 2, "dtype": "bfloat16", "combine_dtype": None}


def _facts(*layers, **versions):
    return Facts(versions=VERSIONS | versions, layers=tuple(LAYER | layer for layer in layers))


def _members(n, place=0, ranks=None, host=None):
    return Members(ranks=tuple(ranks or range(n)), place=place, host=host)


def test_facts_survive_their_text():
    facts = _facts({}, {"name": "blocks.1", "D": 16})
    assert Facts.of(facts.text()) == facts


def test_differences_of_equal_facts_are_none_whatever_layers_are_called():
    assert differences([_facts({"name": "a"}, {}), _facts({"name": "b"}, {}), _facts({}, {})], _members(3)) == []


@pytest.mark.parametrize(
    "facts, words",
    [
        ([_facts({}), _facts({"D": 16}), _facts({})], "layer 0: D is 8 on rank 0, rank 2, 16 on rank 1"),
        ([_facts({"K": 1}), _facts({}), _facts({})], "layer 0: K is 2 on rank 1, rank 2, 1 on rank 0"),
        ([_facts({}), _facts({"combine_dtype": "float32"})], "combine_dtype is null on rank 0, float32 on rank 1"),
        ([_facts({}, {"name": "b"}), _facts({}, {"E": 8})], "layer 1 (b): E is 4 on rank 0, 8 on rank 1"),
        ([_facts({}, {}), _facts({})], "layers is 2 on rank 0, 1 on rank 1"),
        ([_facts(torch="2.11"), _facts()], "torch is 2.11 on rank 0, 2 on rank 1"),
        ([_facts(jax="1"), _facts()], "jax is 1 on rank 0, null on rank 1"),
    ],
)
def test_differences_name_rank_layer_and_field(facts, words):
    (line,) = differences(facts, _members(len(facts)))
    assert line.endswith(words)


def test_differences_of_layers_in_another_order_name_both():
    wide, narrow = {"D": 16}, {"D": 8}
    found = differences([_facts(wide, narrow), _facts(narrow, wide)], _members(2), first=3)
    assert found == [
        "layer 3: D is 16 on rank 0, 8 on rank 1",
        "layer 4: D is 8 on rank 0, 16 on rank 1",
    ]


def test_differences_in_a_part_of_the_ranks_name_global_ranks():
    (line,) = differences([_facts({}), _facts({"E": 8})], _members(2, ranks=(4, 6)))
    assert line == "layer 0: E is 4 on rank 4 (0 in its group), 8 on rank 6 (1 in its group)"


@pytest.mark.parametrize("text, value", [("", 300.0), ("5", 5.0), ("off", None)])
def test_timeout_is_set_or_switched_off_by_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("MOEBIUS_PREFLIGHT", text)
    assert timeout() == value


def test_agree_of_equal_ranks_returns_on_all():
    store = Table()
    found = together(lambda place: agree(store, _members(3, place), _facts({}), 10.0), [0, 1, 2])
    assert found == {0: None, 1: None, 2: None}


def test_agree_of_ranks_that_differ_raises_the_same_error_on_all():
    store = Table()
    found = together(lambda place: agree(store, _members(3, place), _facts({"D": 8 + place // 2}), 10.0), [0, 1, 2])
    assert {type(error) for error in found.values()} == {ConfigError} and len({str(e) for e in found.values()}) == 1
    assert "layer 0: D is 8 on rank 0, rank 1, 9 on rank 2" in str(found[0])


def test_agree_of_many_differences_names_the_first_of_them():
    store = Table()
    layers = [{"D": number} for number in range(20)]
    found = together(
        lambda place: agree(store, _members(2, place), _facts(*(layers if place else [{}] * 20)), 9.0), [0, 1]
    )
    assert "layer 11: D" in str(found[0]) and "layer 13" not in str(found[0]) and "and 7 more" in str(found[0])


def test_differing_of_fields_names_each_that_differs_but_the_name():
    fields = [{"name": "a", "D": 8, "K": None}, {"name": "b", "D": 8, "K": 2}]
    assert differing(fields, _members(2)) == ["K is null on rank 0, 2 on rank 1"]
    assert differing(fields, _members(2), "layer 3: ") == ["layer 3: K is null on rank 0, 2 on rank 1"]


def test_meet_of_ranks_that_do_the_same_gives_each_what_all_said():
    store = Table()
    found = together(lambda place: meet(store, _members(2, place), "adds", [place], 10.0, "x", f" {place}"), [0, 1])
    assert found == {0: [[0], [1]], 1: [[0], [1]]}


def test_meet_of_ranks_that_do_different_things_tells_all_of_them_at_once_who_does_what():
    store = Table()
    does = ["adds", "adds", "multiplies"]
    found = together(lambda place: meet(store, _members(3, place), does[place], None, 60.0, "x", " 2"), [0, 1, 2])
    assert {type(error) for error in found.values()} == {ConfigError} and len({str(e) for e in found.values()}) == 1
    assert "asked: 3 ranks that do the same\nfound: rank 0, rank 1: adds 2; rank 2: multiplies 2\n" in str(found[0])


def test_exchange_without_a_rank_names_it_on_all_that_came_and_to_it_when_it_comes():
    store, began = Table(), time.monotonic()
    found = together(lambda place: exchange(store, _members(4, place), "", 0.3, "x"), [0, 1, 3])
    assert time.monotonic() - began < 5.0
    found[2] = together(lambda place: exchange(store, _members(4, place), "", 30.0, "x"), [2])[2]
    assert time.monotonic() - began < 10.0
    for place in range(4):
        error = found[place]
        assert isinstance(error, RankLost) and error.missing == (2,), place
        assert "found: missing: rank 2, not come within" in str(error)


def test_exchange_ends_on_all_ranks_when_the_first_gives_up():
    store, began = Table(), time.monotonic()
    found = together(lambda place: exchange(store, _members(3, place), "", 0.3 if place else 30.0, "x"), [0, 1])
    assert [error.missing for error in found.values()] == [(2,), (2,)] and time.monotonic() - began < 10.0


def test_exchange_in_a_part_of_the_ranks_names_global_ranks():
    with pytest.raises(RankLost, match=r"rank 6 \(1 in its group\)") as caught:
        exchange(Table(), _members(2, ranks=(4, 6)), "", 0.05, "x")
    assert caught.value.missing == (6,)


def test_exchange_waits_until_the_others_have_read_so_that_the_host_takes_no_store_away():
    """The last to come knows all at once, and would be gone before the first looks again."""
    store = Table()

    def one(place):
        if place == 0:
            time.sleep(0.3)
        found = exchange(store, _members(2, place, host=0), str(place), 10.0, "x")
        if place == 0:
            store.get = Broken().get
        return found

    assert together(one, [0, 1]) == {0: ["0", "1"], 1: ["0", "1"]}


@pytest.mark.parametrize("host, missing, words", [(0, (0,), "rank 0"), (None, (), "store is gone")])
def test_exchange_over_a_store_that_is_gone_names_its_host(host, missing, words):
    with pytest.raises(RankLost, match=words) as caught:
        exchange(Broken(), _members(2, 1, host=host), "", 5.0, "x")
    assert caught.value.missing == missing


def test_exchange_over_a_store_that_does_not_answer_ends(monkeypatch):
    monkeypatch.setattr("moebius.core.preflight._FAREWELL", -1.9)
    store, began = Silent(), time.monotonic()
    with pytest.raises(RankLost, match="rank 0"):
        exchange(store, _members(2, 1, host=0), "", 0.2, "x")
    assert time.monotonic() - began < 5.0
    store.release.set()
