"""Run ranks of which some die: every process is watched, and none outlives its test.

Unlike `ranks.run`, a rank may be killed, stopped or end by an error: how each ended is the result. The group's store is
a TCPStore that rank 0 hosts, as init_process_group sets it up.
"""

from __future__ import annotations

import gc
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ranks import _SERVER, _function

WAIT = 60.0  # seconds, for all processes of a case


@dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        code: of the exit, -9 where it was killed; None where it had to be ended, by a stop or by the time.
        value: what the function returned. error: what it raised. text: its traceback. stderr: all that it wrote there.
        seconds: until it returned or raised, from the start of all.
    """

    code: int | None
    value: Any = None
    error: BaseException | None = None
    text: str = ""
    stderr: str = ""
    seconds: float = 0.0


def run(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 20.0,
    env: Mapping[str, str] | None = None,
    transport: str = "gloo",
) -> list[End]:
    """function(*args) on each rank of a group; how each ended, by rank.

    Args:
        function: at the top level of its file. timeout: of the group. env: to set in each rank.
        transport: "gloo", or "nccl" with a GPU for each rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        began, port = time.time(), _port()
        work = (
            function.__code__.co_filename,
            function.__qualname__,
            args,
            timeout,
            folder,
            ranks,
            port,
            dict(env or {}),
            transport,
        )
        processes = [
            _SERVER.Process(target=_rank, args=(rank, pickle.dumps(work)), daemon=True) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            codes = _codes(processes, began + WAIT)
        finally:
            for process in processes:
                process.kill()  # a stopped one too
                process.join()
        return [_end(Path(folder), rank, code, began) for rank, code in enumerate(codes)]


def _codes(processes: list[Any], deadline: float) -> list[int | None]:
    """Of each process; None for one that lives at the deadline, or a little after all that are not stopped ended."""
    while time.time() < deadline:
        alive = [process for process in processes if process.is_alive()]
        if all(_stopped(process.pid) for process in alive):
            break
        time.sleep(0.05)
    return [process.exitcode for process in processes]


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return False


def _end(folder: Path, rank: int, code: int | None, began: float) -> End:
    stderr = (folder / f"stderr{rank}").read_text() if (folder / f"stderr{rank}").exists() else ""
    answer = folder / f"answer{rank}"
    if not answer.exists():
        return End(code, stderr=stderr)
    value, error, text, when = pickle.loads(answer.read_bytes())
    return End(code, value, error, text, stderr, when - began)


def _rank(rank: int, work: bytes) -> None:
    """The body of a process: 0 where the function returned, 1 where it raised; it ends at once, as a program would."""
    import torch
    import torch.distributed as dist

    gc.freeze()  # as in ranks
    torch.set_num_threads(1)
    file, name, args, timeout, folder, ranks, port, env, transport = pickle.loads(work)
    os.dup2(os.open(os.path.join(folder, f"stderr{rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks), **env)
    value = error = None
    text = ""
    try:
        if transport == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(transport, timeout=timedelta(seconds=timeout))
        value = _function(file, name)(*args)
    except BaseException as raised:
        error, text = raised, traceback.format_exc()
    try:
        answer = pickle.dumps((value, error, text, time.time()))
    except Exception:  # an error of torch's that cannot be pickled
        answer = pickle.dumps((value, RuntimeError(f"{type(error).__name__}: {error}"), text, time.time()))
    place = os.path.join(folder, f"answer{rank}")
    with open(f"{place}.part", "wb") as written:
        written.write(answer)
    os.rename(f"{place}.part", place)
    os._exit(0 if error is None else 1)


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
