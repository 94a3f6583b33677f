"""Heartbeats of ranks that are threads: who is missing when a collective fails, and that nobody waits for ever."""

import logging
import subprocess
import sys
import threading
import time

import pytest
from stores import Broken, Silent, Table, together

from moebius.core import RankLost
from moebius.core.liveness import MARGIN, Position, Watch, interval
from moebius.core.sightings import Beat
from moebius.core.store import Members

BEAT = 0.1
AT = Position("blocks.3", 17, "backward")


def _watch(store, place, n=4, every=BEAT, host=None, at=AT):
    watch = Watch(lambda: store, Members(ranks=tuple(range(n)), place=place, host=host), every)
    watch.at = at
    return watch


@pytest.fixture
def watches():
    made = []
    yield made
    for watch in made:
        watch.close()


def _living(watches, store, places, **settings):
    watches += [_watch(store, place, **settings) for place in places]
    for watch in watches[-len(places) :]:
        watch.start()
    return watches[-len(places) :]


def _dies(watch):
    """Its heartbeats end, as where its process is killed."""
    watch.close(silently=True)


def test_judge_names_the_rank_whose_heartbeats_ended_on_all_that_fail(watches):
    living = _living(watches, Table(), [0, 1, 2, 3])
    time.sleep(3 * BEAT)
    _dies(living[2])
    found = together(lambda place: living[place].judge(True), [0, 1, 3])
    for error in found.values():
        assert isinstance(error, RankLost) and error.missing == (2,)
        assert (error.layer, error.step, error.phase) == AT
        assert "asked: layer blocks.3, step 17, backward, over 4 ranks\nfound: missing: rank 2" in str(error)


def test_judge_takes_no_rank_for_missing_that_has_not_failed_yet(watches):
    """Rank 1 still waits in the collective, and writes on."""
    living = _living(watches, Table(), [0, 1, 2])
    living[1].enter()
    error = living[0].judge(True)
    assert error.missing == (3,) and "no sign of life yet" in str(error)


def test_judge_believes_what_a_rank_wrote_before_it_left(watches):
    living = _living(watches, Table(), [0, 1, 2])
    time.sleep(2 * BEAT)
    living[1].enter()
    assert living[0].judge(True).missing == (3,)
    _dies(living[0])
    began = time.monotonic()
    error = living[1].judge(True)
    assert error.missing == (3,) and "missing: rank 3, says rank 0" in str(error)
    assert time.monotonic() - began < 2.5 * BEAT + 2.0


def test_judge_knows_who_is_missing_though_the_store_left_with_the_rank_that_said_so(watches):
    store = Table()
    living = _living(watches, store, [0, 1], n=3, host=0)
    living[1].enter()
    assert living[0].judge(True).missing == (2,)
    store.get = store.set = Broken().get
    assert living[1].judge(True).missing == (2,)


def test_judge_of_a_rank_that_others_took_for_missing_says_so(watches):
    store = Table()
    (here,) = _living(watches, store, [0], n=2)
    store.set("beat/1", Beat(1, missing=(0,)).text())
    assert "rank 1 took this rank for missing" in str(here.judge(True))


def test_judge_where_all_ranks_live_says_where_they_are(watches):
    living = _living(watches, Table(), [0, 1], n=2)
    living[1].at = Position("blocks.2", 16, "forward")
    error = living[0].judge(True)
    assert error.missing == () and "all ranks live, but do not meet: rank 1 past layer blocks.2, step 16" in str(error)


def test_judge_takes_no_rank_for_missing_that_left_because_the_ranks_did_not_meet(watches):
    living = _living(watches, Table(), [0, 1], n=2)
    living[1].enter()
    assert living[0].judge(True).missing == ()
    _dies(living[0])
    assert living[1].judge(True).missing == ()


def test_heartbeats_go_on_after_a_store_that_was_slow(watches):
    store, silent = Table(), Silent()
    _living(watches, store, [0], n=2)
    time.sleep(2 * BEAT)
    works, store.set = store.set, silent.set
    time.sleep((MARGIN + 2) * BEAT)
    before, store.set = store.values["beat/0"], works
    silent.release.set()
    time.sleep(3 * BEAT)
    assert store.values["beat/0"] != before


def test_judge_where_all_ranks_live_leaves_another_error_alone_and_the_watch_as_it_was(watches):
    living = _living(watches, Table(), [0, 1], n=2)
    began = time.monotonic()
    assert living[0].judge(False) is None
    assert time.monotonic() - began < MARGIN * BEAT + 1.0
    _dies(living[1])
    assert living[0].judge(False).missing == (1,)


def test_judge_names_the_host_of_a_store_that_is_gone(watches):
    error = _living(watches, Broken(), [1], host=0)[0].judge(True)
    assert error.missing == (0,) and "missing: rank 0, which hosts the group's store" in str(error)
    assert "(Broken pipe)" in str(error) and "frame" not in str(error)


def test_judge_over_a_store_that_nobody_of_them_hosts_says_so(watches):
    error = _living(watches, Broken(), [1], host=None)[0].judge(True)
    assert error.missing == () and "the group's store is gone" in str(error)


def test_judge_over_a_store_that_does_not_answer_ends_and_names_the_host(watches):
    store, began = Silent(), time.monotonic()
    error = _living(watches, store, [1], host=0)[0].judge(True)
    assert time.monotonic() - began < MARGIN * BEAT + 3.0
    assert error.missing == (0,) and "missing: rank 0, which hosts the group's store" in str(error)
    store.release.set()


def test_judge_without_heartbeats_asks_who_is_there(watches):
    store = Table()
    watches += [_watch(store, place, n=3, every=None) for place in range(2)]
    for watch in watches:
        watch.every = BEAT
        watch.enter()
    assert not store.values
    found = together(lambda place: watches[place].judge(True), [0, 1])
    assert [error.missing for error in found.values()] == [(2,), (2,)] and "has not checked in" in str(found[0])


def test_enter_starts_one_thread_and_writes_nothing_itself(watches):
    store = Table()
    (watch,) = watches[:] = [_watch(store, 0, every=30.0)]
    watch.enter()
    thread = watch._thread
    watch.leave()
    watch.enter()
    deadline = time.monotonic() + 5.0
    while not store.values and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch._thread is thread and thread.daemon and Beat.of(store.values["beat/0"]).number == 1


def _logged(caplog, words):
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        if any(words in record.getMessage() for record in caplog.records):
            break
        time.sleep(0.02)
    return [record.getMessage() for record in caplog.records if record.name == "moebius"]


def test_a_rank_that_stops_while_others_wait_is_logged_once_with_layer_and_step(watches, caplog):
    living = _living(watches, Table(), [0, 1], n=2)
    with caplog.at_level(logging.ERROR, "moebius"):
        living[0].enter()
        time.sleep(3 * BEAT)
        assert not caplog.records
        _dies(living[1])
        _logged(caplog, "missing")
        time.sleep(3 * BEAT)
        (text,) = _logged(caplog, "missing")
    assert text.startswith("rank 0 waits since") and "in layer blocks.3, step 17, backward; missing: rank 1" in text


def test_a_collective_that_returns_before_it_is_done_counts_as_waiting(watches, caplog):
    living = _living(watches, Table(), [0, 1], n=2)
    living[0].asynchronous = True
    with caplog.at_level(logging.ERROR, "moebius"):
        living[0].enter()
        living[0].leave()
        time.sleep(3 * BEAT)
        _dies(living[1])
        assert len(_logged(caplog, "missing: rank 1")) == 1


def test_a_rank_that_stops_while_nobody_waits_is_not_logged(watches, caplog):
    living = _living(watches, Table(), [0, 1], n=2)
    with caplog.at_level(logging.ERROR, "moebius"):
        living[0].enter()
        living[0].leave()
        _dies(living[1])
        time.sleep((MARGIN + 3) * BEAT)
    assert not caplog.records


def test_a_rank_that_has_left_is_not_logged_by_one_whose_collective_may_be_done(watches, caplog):
    living = _living(watches, Table(), [0, 1], n=2)
    living[0].asynchronous = True
    with caplog.at_level(logging.INFO, "moebius"):
        living[0].enter()
        living[0].leave()
        time.sleep(2 * BEAT)
        living[1].close()
        time.sleep((MARGIN + 3) * BEAT)
    assert not caplog.records


def test_a_rank_that_has_left_is_logged_by_one_that_waits_in_a_collective(watches, caplog):
    living = _living(watches, Table(), [0, 1], n=2)
    with caplog.at_level(logging.ERROR, "moebius"):
        living[0].enter()
        time.sleep(2 * BEAT)
        living[1].close()
        (text,) = _logged(caplog, "missing")
    assert "missing: rank 1 (it has left: it ended, or closed the group, past layer blocks.3, step 17" in text


def test_judge_names_a_rank_that_has_left(watches):
    living = _living(watches, Table(), [0, 1], n=2)
    time.sleep(2 * BEAT)
    living[1].close()
    error = living[0].judge(False)
    assert error.missing == (1,) and "missing: rank 1 (it has left: it ended, or closed the group" in str(error)


def test_a_store_that_goes_while_nobody_is_known_to_wait_may_have_gone_with_its_host_by_itself(watches, caplog):
    store = Table()
    (here,) = _living(watches, store, [1], n=2, host=0)
    here.asynchronous = True
    with caplog.at_level(logging.WARNING, "moebius"):
        here.enter()
        here.leave()
        time.sleep(2 * BEAT)
        store.get = store.set = Broken().get
        (text,) = _logged(caplog, "gone")
    assert "(Broken pipe): rank 0, which hosts it, has ended or is missing" in text
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("beats, goes_on", [(MARGIN - 1, True), (MARGIN + 2, False)])
def test_heartbeats_go_on_after_a_store_that_raised_for_less_than_the_margin(watches, beats, goes_on):
    store = Table()
    (watch,) = _living(watches, store, [0], n=2)
    time.sleep(2 * BEAT)
    works, store.set = store.set, Broken().set
    before = store.values["beat/0"]
    time.sleep((beats - 0.5) * BEAT)
    store.set = works
    deadline = time.monotonic() + (5.0 if goes_on else 3 * BEAT)
    while store.values["beat/0"] == before and time.monotonic() < deadline:
        time.sleep(BEAT / 5)
    assert (store.values["beat/0"] != before) == goes_on == watch._thread.is_alive()


def test_a_store_that_raises_for_a_moment_while_a_rank_waits_makes_nobody_missing(watches, caplog):
    store = Table()
    living = _living(watches, store, [0, 1], n=2, host=0)
    with caplog.at_level(logging.WARNING, "moebius"):
        living[1].enter()
        time.sleep(2 * BEAT)
        works, store.get = store.get, Broken().get
        time.sleep(BEAT)
        store.get = works
        time.sleep((MARGIN + 2) * BEAT)
    assert not caplog.records and living[1].judge(False) is None


@pytest.mark.parametrize("kind", [Broken, Silent])
def test_a_store_that_goes_while_a_rank_waits_is_logged_with_its_host(watches, caplog, kind):
    store, other = Table(), kind()
    (here,) = _living(watches, store, [1], n=2, host=0)
    with caplog.at_level(logging.ERROR, "moebius"):
        here.enter()
        time.sleep(2 * BEAT)
        store.get, store.set = other.get, other.set
        assert "missing: rank 0, which hosts the group's store" in _logged(caplog, "missing")[0]
    # Whose heartbeats could not be read is not missing for that.
    assert not any("no sign of life" in record.getMessage() for record in caplog.records)
    getattr(other, "release", threading.Event()).set()


def test_close_ends_the_thread_also_where_the_store_does_not_answer(watches):
    store, silent = Table(), Silent()
    for each, seconds in ((store, 1.0), (silent, 2.0)):
        (watch,) = _living(watches, each, [0])
        began = time.monotonic()
        watch.close()
        assert time.monotonic() - began < seconds + 1.0
    silent.release.set()
    watch._thread.join(5.0)
    assert not any(watch._thread.is_alive() for watch in watches)


def test_close_ends_with_one_heartbeat_that_says_so_and_writes_nothing_more(watches):
    store = Table()
    (watch,) = _living(watches, store, [0], every=20 * BEAT)
    time.sleep(5 * BEAT)
    before = Beat.of(store.values["beat/0"])
    watch.close()
    assert Beat.of(store.values["beat/0"]) == Beat(before.number + 1, AT, left=True)
    after = dict(store.values)
    watch.close()
    time.sleep(BEAT)
    assert store.values == after


def test_close_of_a_watch_that_never_wrote_or_has_judged_says_nothing_of_leaving(watches):
    store = Table()
    _watch(store, 0, n=2).close()
    (said,) = _living(watches, store, [1], n=2)
    time.sleep(2 * BEAT)
    assert said.judge(True).missing == (0,)
    said.close()
    assert store.values.keys() == {"beat/1"} and not Beat.of(store.values["beat/1"]).left


def test_the_thread_ends_where_the_group_is_no_more(watches):
    store = [Table()]
    watch = Watch(lambda: store[0], Members(ranks=(0, 1), place=0), BEAT)
    watches.append(watch)
    watch.enter()
    store[0] = None
    watch._thread.join(5.0)
    assert not watch._thread.is_alive() and watch.judge(False) is None


@pytest.mark.parametrize("text, value", [("", 2.0), ("0.5", 0.5), ("off", None)])
def test_interval_is_set_or_switched_off_by_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("MOEBIUS_HEARTBEAT", text)
    assert interval() == value


EXIT = """
import sys, threading
sys.path.insert(0, {support!r})
from stores import Silent, Table
from moebius.core.liveness import Position, Watch
from moebius.core.store import Members
store = {kind}()
watch = Watch(lambda: store, Members(ranks=(0, 1), place=0), 0.01)
watch.at = Position("0", 1, "forward")
watch.enter()
threading.Event().wait(0.3)
"""


@pytest.mark.parametrize("kind", ["Table", "Silent"])
def test_the_interpreter_exits_with_a_watch_that_nobody_closed(kind, request):
    code = EXIT.format(support=str(request.config.rootpath / "tests/support"), kind=kind)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and not any(word in done.stderr for word in ("Fatal", "Exception")), done.stderr
