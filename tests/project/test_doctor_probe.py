"""Probes of `moebius doctor` that raise, abort, hang and print what they like."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from moebius.compare.doctor.probe import Probe, ask


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Asks probes, one for each tuple of arguments, whose `main` has the given body."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def put_all(body, *arguments, timeout=60.0):
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "patient.py").write_text(f"import os, sys, time, subprocess\ndef main(*arguments):\n{lines}")
        probes = {words: Probe(module="patient", arguments=words) for words in arguments or [("one", "two")]}
        answers = list(ask(probes, timeout=timeout).values())
        return answers if arguments else answers[0]

    return put_all


REPLY = "from moebius.compare.doctor.reply import reply\n"


def test_ask_probe_that_prints_junk_is_understood(put):
    junk = "lambda: print('moebius-doctor-reply {', 'no end of line', '\\x00', end='') or {'a': 1}"
    answer = put(f"{REPLY}print('junk', end='')\nreply({{'first': {junk}, 'second': lambda: list(arguments)}})")
    assert answer.facts == {"first": {"a": 1}, "second": ["one", "two"]}
    assert answer.failure is None and answer.trouble("second") is None


def test_ask_probe_that_prints_junk_alone_has_not_replied(put):
    answer = put("print('moebius-doctor-reply []')\nprint('moebius-doctor-reply {\"stage\": 1}')")
    assert answer.facts == {} and answer.trouble("first") == "it did not reply"


def test_ask_probe_that_aborts_keeps_what_it_said_and_names_the_stage(put):
    answer = put(f"{REPLY}sys.stderr.write('cuDNN mismatch\\n')\nreply({{'import': lambda: 1, 'devices': os.abort}})")
    assert answer.facts == {"import": 1}
    assert answer.trouble("import") is None
    assert answer.trouble("devices") == "ended by SIGABRT at 'devices': cuDNN mismatch"
    assert answer.trouble("never begun") == answer.failure


def test_ask_probe_that_hangs_is_killed_with_its_child_that_holds_the_output(put, tmp_path):
    start, note = time.monotonic(), tmp_path / "child"
    child = f"open({str(note)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    answer = put(f"{REPLY}{child}\nreply({{'import': lambda: time.sleep(60)}})", timeout=4.0)
    assert time.monotonic() - start < 20
    assert "no reply within 4 s" in answer.trouble("import")
    while _runs(int(note.read_text())):  # the signal is sent; when it arrives is the system's affair
        assert time.monotonic() - start < 30
        time.sleep(0.05)


def _runs(process):
    """Whether a process is there and is no mere entry that nobody has collected yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_ask_probe_whose_first_stage_raises_leaves_the_rest_out(put):
    answer = put(f"{REPLY}reply({{'import': lambda: sys.exit('no\\nCUDA'), 'devices': lambda: 1}})")
    assert answer.facts == {} and answer.failure is None
    assert answer.trouble("import") == answer.trouble("devices") == "SystemExit: no CUDA"


def test_ask_probe_whose_later_stage_raises_goes_on(put):
    stages = "{'import': lambda: 1, 'devices': lambda: 1 / 0, 'unprintable': lambda: {1j: 2}, 'last': lambda: 3}"
    answer = put(f"{REPLY}reply({stages})")
    assert answer.facts == {"import": 1, "last": 3}
    assert answer.trouble("devices") == "ZeroDivisionError: division by zero"
    assert "TypeError" in answer.trouble("unprintable")


def test_ask_probe_that_cannot_be_imported_says_so():
    answer = ask({"nothing": Probe(module="moebius.compare.doctor.nothing")}, timeout=60)["nothing"]
    assert answer.failure.startswith("ended with code 1: ModuleNotFoundError")


def test_ask_probes_run_at_once(put, tmp_path):
    """Each waits for the file of the other."""
    body = "open(arguments[0], 'w').close()\nwhile not os.path.exists(arguments[1]): time.sleep(0.01)\n"
    names = str(tmp_path / "a"), str(tmp_path / "b")
    answers = put(f"{REPLY}{body}reply({{'met': lambda: True}})", names, names[::-1])
    assert [answer.facts for answer in answers] == [{"met": True}, {"met": True}]
