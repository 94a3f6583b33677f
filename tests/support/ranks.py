"""Run a function on several ranks of torch.distributed, each a process of its own: gloo on the CPU, or NCCL.

`run` returns what every rank returned, or fails with the words of the rank that failed first. It never waits longer
than its timeout: ranks that wait in a collective for one that is gone are ended.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# A server that has imported torch once forks each rank, well before any thread of torch's or JAX's exists in it. Its
# list holds what ranks came to import: torch._dynamo, a second of each of them, at the first checkpoint or DTensor.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "moebius.torch_frontend.dispatch_allgather",
        "moebius.torch_frontend.grouped_experts",
        "moebius.torch_frontend.moe",
    ]
)


def run(
    function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0, transport: str = "gloo"
) -> list[Any]:
    """function(*args) on each of `ranks` ranks, in an initialised default process group.

    Args:
        function: at the top level of its file. args: and what it returns are pickled, tensors too.
        timeout: seconds for all of it. transport: "gloo", or "nccl" with a GPU for each rank.
    Returns:
        What each rank returned, by rank.
    Raises:
        AssertionError: a rank raised, died or was too slow; says which and where.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = (function.__code__.co_filename, function.__qualname__, args, timeout, folder, ranks, transport)
        processes, pipes = [], []
        for rank in range(ranks):
            ours, theirs = _SERVER.Pipe(duplex=False)
            processes.append(_SERVER.Process(target=_rank, args=(rank, theirs, pickle.dumps(work)), daemon=True))
            pipes.append(ours)
            processes[-1].start()
            theirs.close()
        try:
            answers = _answers(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [answer.value for answer in _judged(answers, Path(folder), timeout)]


class _Answer:
    """What came from a rank: a value, or the words of what went wrong."""

    def __init__(self, value: Any = None, failure: str | None = None):
        self.value, self.failure = value, failure


def _answers(pipes: list[Connection], deadline: float) -> dict[int, _Answer]:
    """By rank, in the order in which they came; after a failure the others have a moment to say what they know."""
    answers: dict[int, _Answer] = {}
    while len(answers) < len(pipes):
        left = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(left, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            try:
                answer = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                answer = _Answer(failure="the process died")
            answers[pipes.index(pipe)] = answer  # type: ignore[arg-type]
            if answer.failure is not None:
                deadline = min(deadline, time.monotonic() + 1.0)
    return answers


def _judged(answers: dict[int, _Answer], folder: Path, timeout: float) -> list[_Answer]:
    failures = [f"rank {rank}: {answer.failure}" for rank, answer in answers.items() if answer.failure is not None]
    if failures:
        raise AssertionError("\n".join(failures))
    stacks = {rank: file.read_text() for rank, file in enumerate(sorted(folder.glob("stack*"))) if rank not in answers}
    if stacks:
        where = "\n".join(f"rank {rank}:\n{stack}" for rank, stack in stacks.items())
        raise AssertionError(f"ranks {sorted(stacks)} did not answer within {timeout} s\n{where}")
    return [answers[rank] for rank in sorted(answers)]


def _rank(rank: int, pipe: Connection, work: bytes) -> None:
    """The body of a process."""
    import torch
    import torch.distributed as dist

    gc.freeze()  # what was imported stays shared with the server: a collection would write to all of it
    torch.set_num_threads(1)
    file, name, args, timeout, folder, ranks, transport = pickle.loads(work)
    with open(os.path.join(folder, f"stack{rank:03}"), "w") as stack:
        faulthandler.dump_traceback_later(max(0.1, timeout - 1.0), file=stack)
        try:
            store = dist.FileStore(os.path.join(folder, "store"), ranks)
            # Longer than the parent waits, so that it is the one that says who is missing.
            waits = timedelta(seconds=2 * timeout)
            if transport == "nccl":
                torch.cuda.set_device(rank)
            dist.init_process_group(transport, store=store, rank=rank, world_size=ranks, timeout=waits)
            answer = _Answer(_function(file, name)(*args))
        except BaseException:
            answer = _Answer(failure=traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(pickle.dumps(answer))
    # No destroy_process_group: the parent ends the ranks, also where one waits for another.
    pipe.close()
    time.sleep(timeout)


def _function(file: str, name: str) -> Callable[..., Any]:
    """A test file is in no package, so its functions are found by where they stand."""
    spec = importlib.util.spec_from_file_location("ranks_body", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_body"] = module
    spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(module, name)
    return found
