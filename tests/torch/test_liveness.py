"""Ranks that die, stop or stay away: what the others raise, and that every process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import groupby
from typing import Any

import faults
import pytest
import ranks
import torch
import torch.distributed as dist

from moebius.core import RankLost
from moebius.core.config import BackendConfig, MoEConfig
from moebius.core.liveness import MARGIN
from moebius.core.liveness import SETTING as HEARTBEAT
from moebius.torch_frontend import liveness
from moebius.torch_frontend.grouped_experts import GroupedExpertsDeepEP
from moebius.torch_frontend.preflight import name_layers

E, K, D, T = 4, 2, 4, 3
BEAT = 0.5


# ----------------------------------------------------------------------------------------------------- what a rank does
def _layers(mesh: Any, dispatcher: str, n: int = 2) -> torch.nn.Module:
    config = MoEConfig(
        dim=D,
        inter_dim=8,
        moe_inter_dim=8,
        n_routed_experts=E,
        n_shared_experts=0,
        n_activated_experts=K,
        dtype="float32",
    )
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(
        GroupedExpertsDeepEP(config, BackendConfig(experts="loop"), dispatcher) for _ in range(n)
    )
    for layer in model.blocks:
        layer.init_token_dispatcher(mesh)
    return model


def _step(model: Any, before: Callable[[int], None] = lambda layer: None, backward: Any = None) -> None:
    """A forward and a backward pass; `before` each layer, and `backward` at the gradient before the first layer's."""
    x = torch.ones(T, D, requires_grad=True)
    ids = torch.arange(T * K).view(T, K) % E
    y = x
    for number, layer in enumerate(model.blocks):
        before(number)
        y = layer(y, torch.ones(T, dtype=torch.bool), torch.ones(T, K), ids)
        if backward is not None and number == 0:
            y.register_hook(backward)
    y.sum().backward()


def _mesh(group: Any = None) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(dist.group.WORLD if group is None else group, "cpu")


def _end_of(how: str) -> None:
    """This process ends, or does nothing for a while."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(7)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(8.0)
        os._exit(8)


def _fault(dispatcher: str, where: str, dead: int, how: str) -> str:
    """Three steps of two layers, in the second of which one rank ends."""
    rank, model = dist.get_rank(), _layers(_mesh(), dispatcher)
    name_layers(model)
    if rank == dead and where == "start":
        _end_of(how)
    _step(model)

    def dies(*_: Any) -> None:
        if rank == dead:
            _end_of(how)

    if where == "forward":
        _step(model, before=lambda layer: dies() if layer == 1 else None)
    elif where == "backward":
        _step(model, backward=dies)
    _step(model)
    return "done"


def _of_groups(dead: int) -> str:
    """Experts over ranks 0 and 1, and over 2 and 3."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    model = _layers(_mesh(groups[rank // 2]), "alltoall", n=1)
    _step(model)
    if rank == dead:
        _end_of("exit")
    _step(model)
    time.sleep(1.0)  # the store is to stay for ranks 2 and 3
    return "done" if rank else _until_told()


def _leaves(how: str) -> str:
    """Rank 1 leaves by itself; rank 0 goes on, and as on a GPU does not know whether its collectives are done."""
    from moebius.torch_frontend.dispatch_alltoall import AllToAll

    dispatcher, x, ids = AllToAll(), torch.ones(2, 3), torch.tensor([[0], [1]])
    sent, state = dispatcher.dispatch(x, torch.ones(2, 1), ids, torch.ones(2, dtype=torch.bool), 2)
    dispatcher.combine(sent.x_SD, state)
    dist.barrier()
    if dist.get_rank() == 0:
        liveness.peers(None).watch.asynchronous = True
        time.sleep((MARGIN + 6) * BEAT)
        return "done"
    held = dist.group.WORLD if how == "destroyed and held" else None
    time.sleep(2 * BEAT)
    (liveness.close if how == "closed" else dist.destroy_process_group)()
    time.sleep((MARGIN + 4) * BEAT)
    return f"done {held}".split()[0]


def _until_told() -> str:
    time.sleep((MARGIN + 3) * BEAT)
    return "done"


CASES: dict[str, tuple[Any, ...]] = {
    # function, ranks, arguments, seconds of the group's timeout
    "forward": (_fault, 4, ("allgather", "forward", 3, "killed"), 20.0),
    "backward": (_fault, 4, ("alltoall", "backward", 1, "killed"), 20.0),
    "exit": (_fault, 2, ("alltoall", "forward", 1, "exit"), 20.0),
    "host": (_fault, 4, ("allgather", "forward", 0, "killed"), 20.0),
    "host_in_backward": (_fault, 2, ("alltoall", "backward", 0, "killed"), 20.0),
    "stopped": (_fault, 2, ("alltoall", "forward", 1, "stopped"), 5.0),
    "host_stopped": (_fault, 2, ("alltoall", "forward", 0, "stopped"), 3.0),
    "asleep": (_fault, 2, ("alltoall", "forward", 1, "asleep"), 3.0),
    "start": (_fault, 2, ("allgather", "start", 1, "killed"), 20.0),
    "groups": (_of_groups, 4, (3,), 20.0),
    "closed": (_leaves, 2, ("closed",), 20.0),
    "destroyed": (_leaves, 2, ("destroyed",), 20.0),
    "destroyed and held": (_leaves, 2, ("destroyed and held",), 20.0),
}
ENVIRONMENT = {
    "start": {"MOEBIUS_PREFLIGHT": "off"},
}


@cache
def _all() -> dict[str, Future[list[faults.End]]]:
    """Every case, four at a time: the ranks mostly wait."""
    pool = ThreadPoolExecutor(4)

    def start(name: str) -> Future[list[faults.End]]:
        function, n, args, timeout = CASES[name]
        env = {"MOEBIUS_HEARTBEAT": str(BEAT), "MOEBIUS_PREFLIGHT": "30", **ENVIRONMENT.get(name, {})}
        return pool.submit(faults.run, function, n, *args, timeout=timeout, env=env)

    return {name: start(name) for name in CASES}


def _ends(name: str) -> list[faults.End]:
    return _all()[name].result(3 * faults.WAIT)


def _errors(name: str, dead: int) -> dict[int, RankLost]:
    """What each survivor raised; that it ended by it, in time, and the dead one as it was meant to."""
    ends, found = _ends(name), {}
    for rank, end in enumerate(ends):
        if rank == dead:
            assert end.code == CODES.get(name, -signal.SIGKILL) and end.value is None, (rank, end)
        elif end.error is not None:
            assert end.code == 1 and isinstance(end.error, RankLost), (rank, end.text)
            assert end.seconds < faults.WAIT / 2, (rank, end.seconds)
            found[rank] = end.error
    return found


# How a rank that is no survivor ends, where not by SIGKILL; None where it is stopped until the test ends it.
CODES: dict[str, int | None] = {"exit": 7, "groups": 7, "stopped": None, "host_stopped": None, "asleep": 8}


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize(
    "name, dead, layer, step, phase",
    [
        ("forward", 3, "blocks.1", 2, "forward"),
        ("backward", 1, "blocks.0", 2, "backward"),
        ("exit", 1, "blocks.1", 2, "forward"),
        ("host", 0, "blocks.1", 2, "forward"),
        ("host_in_backward", 0, "blocks.0", 2, "backward"),
        ("stopped", 1, "blocks.1", 2, "forward"),
        ("host_stopped", 0, "blocks.1", 2, "forward"),
        ("start", 1, "blocks.0", 1, "forward"),
    ],
)
def test_a_rank_that_ends_is_named_by_every_other_with_layer_and_step(
    name: str, dead: int, layer: str, step: int, phase: str
) -> None:
    errors = _errors(name, dead)
    assert errors.keys() == set(range(CASES[name][1])) - {dead}
    for rank, error in errors.items():
        assert (error.missing, error.layer, error.step, error.phase) == ((dead,), layer, step, phase), rank
        assert str(error).startswith(f"asked: layer {layer}, step {step}, {phase}, over {CASES[name][1]} ranks\n")
        assert f"missing: rank {dead}" in error.found


@pytest.mark.parametrize("name", ["host", "host_in_backward", "host_stopped"])
def test_a_rank_that_takes_the_store_along_is_named_as_its_host(name: str) -> None:
    for error in _errors(name, 0).values():
        assert error.found.startswith("missing: rank 0, which hosts the group's store: the group's store ")


def test_a_rank_that_lives_and_does_not_come_is_said_to_live_and_where_it_is() -> None:
    (error,) = _errors("asleep", 1).values()
    assert error.missing == () and (error.layer, error.step) == ("blocks.1", 2)
    assert "all ranks live, but do not meet: rank 1 past layer blocks.0, step 2, forward" in error.found


def test_a_rank_that_ends_before_its_first_dispatch_is_said_not_to_have_come() -> None:
    (error,) = _errors("start", 1).values()
    assert "rank 1 (no sign of life yet: it has not come to its first dispatch)" in error.found


def test_a_rank_of_another_group_is_no_loss_and_one_of_this_is_named_by_both_its_numbers() -> None:
    (error,) = _errors("groups", 3).values()
    assert [end.value for end in _ends("groups")] == ["done", "done", None, None]
    assert error.missing == (3,) and "missing: rank 3 (1 in its group)" in error.found
    assert (error.layer, error.step) == ("0", 2)  # nobody gave it a name


def test_a_rank_that_waits_leaves_the_record_in_its_log_before_the_groups_timeout() -> None:
    """All that there will be where a watchdog ends the process."""
    stderr = _ends("stopped")[0].stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("rank 0 waits since")]
    assert "in layer blocks.1, step 2, forward; missing: rank 1 (no sign of life for" in line
    assert float(line.split("since ")[1].split()[0]) < CASES["stopped"][3]


def test_the_error_of_the_collective_itself_is_kept_as_the_cause() -> None:
    assert "gloo" in _ends("exit")[0].text and "the direct cause of the following exception" in _ends("exit")[0].text


@pytest.mark.parametrize("how", ["closed", "destroyed", "destroyed and held"])
def test_a_rank_that_closes_or_destroys_its_group_is_not_missed_by_one_that_goes_on(how: str) -> None:
    ends = _ends(how)
    assert [end.value for end in ends] == ["done", "done"], [end.text for end in ends]
    assert not any("missing" in end.stderr or "waits since" in end.stderr for end in ends), ends[0].stderr


# ------------------------------------------------------------------------------------------------- where nobody is lost
def _threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("moebius"))


def _wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def _facts() -> dict[str, Any]:
    os.environ.update(MOEBIUS_HEARTBEAT="0.2", MOEBIUS_PREFLIGHT="30")
    found: dict[str, Any] = {}
    rank = dist.get_rank()

    from moebius.torch_frontend.dispatch_ranks import all_gather

    # A failure that is of this rank alone, in the collective and before it.
    group = dist.new_group([0, 1])
    for name, rows, splits in [("splits", torch.ones(2, 3), [1, 2]), ("int16", torch.ones(2, 3).short(), [1, 1])]:
        try:
            liveness.collective(dist.all_to_all_single, torch.empty_like(rows), rows, splits, splits, group=group)
        except Exception as error:
            found[name] = type(error).__name__, str(error)
    whole = torch.empty(2)
    liveness.collective(all_gather, whole, torch.full((1,), float(rank)), group=group)
    found["afterwards"] = whole.tolist()
    found["threads"] = [_threads()]
    liveness.close(group)
    found["threads"].append(_threads())

    # What counts as a step, and of which layer.
    mesh = _mesh()
    model = _layers(mesh, "alltoall")
    here = liveness.peers(mesh.get_group())
    seen = []
    for _ in range(2):
        x = torch.ones(T, D, requires_grad=True)
        arguments = torch.ones(T, dtype=torch.bool), torch.ones(T, K), torch.arange(T * K).view(T, K) % E
        y = torch.utils.checkpoint.checkpoint(model.blocks[0], x, *arguments, use_reentrant=False)
        seen.append(str(here.watch.at))
        y = model.blocks[1](y, *arguments)
        seen.append(str(here.watch.at))
        with _logged_positions(here.watch) as log:
            y.sum().backward()
        seen.append([position for position, _ in groupby(log)])
    found["positions"] = seen

    # Closed by its last dispatcher, and by all at once.
    found["threads"].append(_threads())
    with model.blocks[0].token_dispatcher:
        pass
    found["threads"].append(_threads())
    model.blocks[1].token_dispatcher.close()
    found["threads"].append(_threads())
    found["forgotten"] = liveness.peers(mesh.get_group()) is not here
    _step(model)
    found["threads"].append(_threads())
    liveness.close()
    found["threads"].append(_threads())

    # A group that is destroyed takes the thread along, and its dispatchers say so.
    _step(model)
    dist.barrier()
    dist.destroy_process_group()
    _wait_for(lambda: not _threads())
    found["threads"].append(_threads())
    try:
        liveness.peers(None)
    except Exception as error:
        found["destroyed"] = type(error).__name__, str(error)
    return found


class _logged_positions:
    """The positions of the collectives that a watch is told of."""

    def __init__(self, watch: Any):
        self.watch, self.log = watch, []

    def __enter__(self) -> list[str]:
        enter = type(self.watch).enter

        def logged() -> None:
            self.log.append(str(self.watch.at))
            enter(self.watch)

        self.watch.enter = logged
        return self.log

    def __exit__(self, *_: object) -> None:
        del self.watch.enter


@cache
def _found() -> list[dict[str, Any]]:
    return ranks.run(_facts, 2)


@pytest.mark.parametrize(
    "name, kind, words", [("splits", "RuntimeError", "Split"), ("int16", "RuntimeError", "scalar")]
)
def test_an_error_of_a_collective_that_is_no_lost_rank_stays_what_it_is(name: str, kind: str, words: str) -> None:
    for facts in _found():
        found, text = facts[name]
        assert found == kind and words.lower() in text.lower(), (found, text)
        assert facts["afterwards"] == [0.0, 1.0]


# The gradient of what came home; the forward pass again, as far as it is needed; the gradient of what went out.
_AGAIN = ("backward", "recomputation", "backward")


def test_steps_are_counted_by_layer_and_recomputation_is_none() -> None:
    for facts in _found():
        assert facts["positions"] == [
            "layer 0, step 1, forward",
            "layer 1, step 1, forward",
            ["layer 1, step 1, backward", *(f"layer 0, step 1, {phase}" for phase in _AGAIN)],
            "layer 0, step 2, forward",
            "layer 1, step 2, forward",
            ["layer 1, step 2, backward", *(f"layer 0, step 2, {phase}" for phase in _AGAIN)],
        ]


def test_close_of_the_last_dispatcher_of_all_or_of_the_group_ends_the_thread() -> None:
    on, off = ["moebius-heartbeat"], []
    for facts in _found():
        names = [[name for name in names if name != "moebius-store"] for names in facts["threads"]]
        # a collective, close(group), layers, first dispatcher, last dispatcher, again, close(), destroy_process_group
        assert names == [on, off, on, on, off, on, off, off]
        assert facts["forgotten"]


def test_peers_of_a_group_that_was_destroyed_are_refused() -> None:
    for facts in _found():
        assert facts["destroyed"][0] == "ConfigError" and "it was destroyed" in facts["destroyed"][1]


EXIT = """
import os, sys, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], RANK=sys.argv[1], WORLD_SIZE="2")
torch.set_num_threads(1)
import torch.distributed as dist
dist.init_process_group("gloo")
from moebius.torch_frontend.dispatch_alltoall import AllToAll
dispatcher = AllToAll()
x = torch.ones(2, 3)
sent, state = dispatcher.dispatch(x, torch.ones(2, 1), torch.tensor([[0], [1]]), torch.ones(2, dtype=torch.bool), 2)
dispatcher.combine(sent.x_SD, state)
if sys.argv[1] == "1":
    raise SystemExit(3)
"""


def test_the_interpreter_exits_at_once_with_a_dispatcher_that_nobody_closed() -> None:
    port = str(faults._port())
    command = [sys.executable, "-W", "ignore", "-c", EXIT]
    started = [
        subprocess.Popen([*command, str(rank), port], stderr=subprocess.PIPE, text=True, env={**os.environ})
        for rank in range(2)
    ]
    try:
        stderr = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 3], stderr
    assert not any("Fatal" in text or "terminate" in text for text in stderr), stderr


def test_prefix_of_a_group_is_that_of_its_other_ranks_whatever_else_a_rank_was_in(monkeypatch: Any) -> None:
    """A name is used again once its group was destroyed, in the same store; here by ranks of whom one is new."""

    def of_a_process(*groups: tuple[int, ...]) -> list[str]:
        monkeypatch.setattr(liveness, "_COUNTS", Counter())
        return [liveness._prefix("1", ranks) for ranks in groups]

    *_, here, again = of_a_process((0, 1), (0, 1, 2), (0, 1, 2))
    assert of_a_process((0, 1, 2), (0, 1, 2)) == [here, again]
    assert len({here, again, *of_a_process((0, 1), (0, 1))}) == 4


ENDS = """
import os, sys, time, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], RANK=sys.argv[1], WORLD_SIZE="2")
torch.set_num_threads(1)
import torch.distributed as dist
dist.init_process_group("gloo")
from moebius.torch_frontend import liveness
from moebius.torch_frontend.dispatch_alltoall import AllToAll
dispatcher = AllToAll()
x = torch.ones(2, 3)
sent, state = dispatcher.dispatch(x, torch.ones(2, 1), torch.tensor([[0], [1]]), torch.ones(2, dtype=torch.bool), 2)
dispatcher.combine(sent.x_SD, state)
dist.barrier()
time.sleep(0.5)
if sys.argv[1] == "1":
    assert sys.argv[3] == "by itself"
else:
    liveness.peers(None).watch.asynchronous = True
    time.sleep(3.0)
"""


@pytest.mark.parametrize("how, missed", [("by itself", False), ("by an error", True)])
def test_a_process_that_ends_is_missed_by_one_that_goes_on_where_it_ends_by_an_error(how: str, missed: bool) -> None:
    port = str(faults._port())
    command = [sys.executable, "-W", "ignore", "-c", ENDS]
    started = [
        subprocess.Popen(
            [*command, str(rank), port, how], stderr=subprocess.PIPE, text=True, env=os.environ | {HEARTBEAT: "0.2"}
        )
        for rank in range(2)
    ]
    try:
        stderr = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, int(missed)], stderr
    assert ("missing: rank 1 (no sign of life for" in stderr[0]) == ("missing" in stderr[0]) == missed, stderr[0]
