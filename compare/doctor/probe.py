"""Questions put to processes of their own, since an import may raise, abort, hang or print anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import moebius
from moebius.compare.doctor.reply import MARK, shortened

# Appended, so that a probe finds this very package and nothing comes before its own standard library.
_HOME = str(Path(moebius.__file__).parents[1])
_CODE = "import sys; sys.path.append(sys.argv.pop(1)); from {module} import main; main(*sys.argv[1:])"
_GRACE = 5.0  # seconds that a killed process is waited for: one inside a driver may never end


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A module with `main(*arguments)`, which replies in stages; see `reply`."""

    module: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        facts: of each stage that replied. errors: of each stage that raised, in a line.
        failure: how the process ended, where it ended otherwise than by itself; None where all is well.
        stage: the last that was begun. said: the last line on standard error.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None
    stage: str = ""
    said: str = ""

    def trouble(self, stage: str) -> str | None:
        """Why there are no facts of `stage`, in words; None where there are."""
        if stage in self.facts:
            return None
        first = next(iter(self.errors.values()), "it did not reply")
        return self.errors.get(stage) or self.failure or first


def ask(probes: Mapping[str, Probe], *, timeout: float) -> dict[str, Answer]:
    """Run all probes at once and collect what they reply; nothing that a probe does is raised here.

    Args:
        probes: by name. timeout: seconds for all of them together.
    """
    deadline = time.monotonic() + timeout
    running = {name: _Process(probe) for name, probe in probes.items()}
    try:
        return {name: process.answer(deadline, timeout) for name, process in running.items()}
    finally:
        for process in running.values():
            process.end()


class _Process:
    def __init__(self, probe: Probe):
        # Files, not pipes: a child of the child that holds a pipe open would be waited for.
        self.out, self.err = TemporaryFile(), TemporaryFile()
        command = [sys.executable, "-P", "-c", _CODE.format(module=probe.module), _HOME, *probe.arguments]
        # JAX would take three quarters of a GPU for the sake of a question.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
            env=environment,
            start_new_session=True,
        )

    def answer(self, deadline: float, timeout: float) -> Answer:
        try:
            code = self.child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._kill()
            return self._read(f"no reply within {timeout:g} s (a longer --timeout may help)")
        return self._read(_ending(code))

    def end(self) -> None:
        """Kill the process and its children where they run still, and let go of what they wrote."""
        self._kill()
        self.out.close()
        self.err.close()

    def _kill(self) -> None:
        if self.child.poll() is None:
            kill = getattr(os, "killpg", None)
            kill(self.child.pid, signal.SIGKILL) if kill else self.child.kill()
            try:
                self.child.wait(_GRACE)
            except subprocess.TimeoutExpired:
                pass  # killed and not gone, as in the middle of a driver's call: no more can be done

    def _read(self, ending: str | None) -> Answer:
        facts, errors, stage = {}, {}, ""
        for reply in _replies(self.out):
            stage = reply["stage"]
            if "facts" in reply:
                facts[stage] = reply["facts"]
            if "error" in reply:
                errors[stage] = reply["error"]
        said = _last_line(self.err)
        failure = ending and "".join([ending, f" at {stage!r}" if stage else "", f": {said}" if said else ""])
        return Answer(facts=facts, errors=errors, failure=failure, stage=stage, said=said)


def _ending(code: int) -> str | None:
    if code == 0:
        return None
    if code > 0:
        return f"ended with code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def _replies(out: IO[bytes]) -> Iterator[dict[str, Any]]:
    """What stands behind the mark; whatever else a library printed is passed over."""
    for line in _lines(out):
        if line.startswith(MARK):
            try:
                reply = json.loads(line.removeprefix(MARK))
            except ValueError:
                continue
            if isinstance(reply, dict) and isinstance(reply.get("stage"), str):
                yield reply


def _last_line(err: IO[bytes]) -> str:
    lines = [line.strip() for line in _lines(err) if line.strip()]
    return shortened(lines[-1]) if lines else ""


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").splitlines()
