"""The other end of a probe: runs in the process of its own and replies stage by stage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

MARK = "moebius-doctor-reply "
_LONGEST = 200


def reply(stages: Mapping[str, Callable[[], Any]]) -> None:
    """Run each stage and write what it returns, or its error; then end the process.

    A stage is announced before it is run, so that whoever reads knows where the process died. Where the first fails,
    the rest is left out: it imports what the others use.
    """
    for number, (name, stage) in enumerate(stages.items()):
        _write(stage=name)
        try:
            _write(stage=name, facts=stage())
        except BaseException as error:  # a library may call sys.exit, or derive its error from what it likes
            _write(stage=name, error=shortened(f"{type(error).__name__}: {error}"))
            if number == 0:
                break
    # Everything is said: a crash while the frameworks are torn down would only hide it.
    os._exit(0)


def shortened(text: str) -> str:
    """On one line, and not longer than a table bears."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _write(**reply: Any) -> None:
    # One write, on lines of its own: a library may have left its last line unfinished.
    os.write(1, f"\n{MARK}{json.dumps(reply)}\n".encode())
