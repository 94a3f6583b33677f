"""Two processes of jax.distributed that differ, stay away or die: what each is told, and that each of them ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import jax
import pytest

BEAT, PREFLIGHT, WATCHDOG = 0.3, 1.5, 6  # seconds: ours, ours, JAX's heartbeat_timeout_seconds
MARGIN = 15.0  # seconds more until a process has ended by it; JAX looks for dead ones every few seconds
WAIT = 90.0  # for all processes of a case

# ------------------------------------------------------------------------------------------------ what a process does
START = """
import json, os, signal, sys, threading, time
place, port, watchdog, out = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}", num_processes=2, process_id=place, heartbeat_timeout_seconds=watchdog,
    shutdown_timeout_seconds=watchdog,
)
import jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
from moebius.core import BackendConfig, MoEConfig
from moebius.jax_frontend import GroupedExperts, liveness, preflight, shard_experts

mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,))

def layer(dispatcher="alltoall", mesh=mesh, **fields):
    own = {name: fields.pop(name) for name in ("combine_dtype", "dispatcher_bound") if name in fields}
    sizes = {"dim": 4, "moe_inter_dim": 6, "n_routed_experts": 4, "n_activated_experts": 2, "dtype": "float32"}
    config = MoEConfig(inter_dim=8, n_shared_experts=0, **sizes | fields)
    backend = BackendConfig(experts="loop", dispatcher=dispatcher, **own)
    return GroupedExperts(config, backend, mesh=mesh, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))

def call(module):
    ids = jnp.arange(6).reshape(3, 2) % 4
    return module(jnp.ones((3, module.config.dim)), jnp.ones(3, bool), jnp.ones((3, 2)), ids)

def said(function):
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "missing", None)]
    return None
"""

# All that raises no process to its end; each case begins anew.
TALKS = """
found = {"unlike": {}}
def traced(own):
    return lambda: jax.eval_shape(lambda: [call(one) for one in [layer(**fields) for fields in own]])

# Each layer called inside of a shard_map over its mesh, as a copy of what was spread.
def inside(own):
    def one(fields):
        graph, state = nnx.split(layer(**fields))
        each = lambda state: call(nnx.merge(graph, state))
        return jax.shard_map(each, mesh=mesh, in_specs=jax.P("ep"), out_specs=jax.P("ep"))(state)
    return lambda: jax.eval_shape(lambda: [one(fields) for fields in own])

for name, layers in json.loads(sys.argv[5]).items():
    versions = preflight._versions
    if name == "version" and place:
        preflight._versions = lambda: versions() | {"jax": "9.9.9"}
    built = lambda own: lambda: [layer(**fields) for fields in own]
    how = {"built": built, "inside": inside}.get(name, traced)
    turns = 1 if name == "built" else 2  # whoever goes on is told again
    found["unlike"][name] = [said(how(layers[place])) for _ in range(turns)]
    preflight._versions = versions
    liveness.close()

whole = layer("local", mesh=None, dim=4 + 4 * place)
found["refused"] = said(lambda: shard_experts(whole, mesh)), whole.ep_mesh is None, call(whole).shape[1]
liveness.close()

# The first process has given up when the second comes.
os.environ["MOEBIUS_PREFLIGHT"] = os.environ["LATE"]
time.sleep(2 * float(os.environ["LATE"]) * place)
found["late"] = said(traced([{}]))
os.environ["MOEBIUS_PREFLIGHT"] = "60"
liveness.close()

def threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "moebius-heartbeat"]

def now():
    here = liveness.peers(mesh)
    return [here.rounds, here.compared, str(here.watch.at), len(threads())]

layers = [layer(), layer(), layer(n_routed_experts=8)]
alike = found["alike"] = [now()]
step = nnx.jit(lambda layers: [call(own) for own in layers])
for _ in range(2):
    step(layers)
    alike.append(now())
call(layers[2])
alike.append(now())
jax.eval_shape(lambda: call(layer(combine_dtype="float32")))
alike.append(now())
liveness.close(mesh)
alike.append(len(threads()))
os.environ["MOEBIUS_PREFLIGHT"] = "off"
found["off"] = said(traced([{"dim": 4 + 4 * place}]))
os.environ["MOEBIUS_PREFLIGHT"] = "60"
liveness.close()

from moebius.jax_frontend import linen
built = linen.GroupedExperts(layers[0].config, layers[0].backend, mesh=mesh)
tokens = jnp.ones((3, 4)), jnp.ones(3, bool), jnp.ones((3, 2)), jnp.arange(6).reshape(3, 2) % 4
liveness.close()
found["inside"] = said(inside([{}, {"n_routed_experts": 8}])), now()
liveness.close()
found["linen"] = []
for _ in range(2):
    variables = jax.eval_shape(built.init, jax.random.key(0), *tokens)
    found["linen"].append(now())
    jax.eval_shape(built.apply, variables, *tokens)
    found["linen"].append(now())
liveness.close()
step(layers)
call(layers[0])
with open(out, "w") as file:
    json.dump(found, file)
if place:  # the other leaves by its end, and is not missed; this one says goodbye to JAX first
    time.sleep(4.0)
    jax.distributed.shutdown()
    time.sleep(1.0)
    print("threads left:", threads(), file=sys.stderr)
"""

FAULT = """
how, dead = sys.argv[5], int(sys.argv[6])
layers = [layer(), layer(dim=4, moe_inter_dim=8)]
whole = jax.NamedSharding(mesh, jax.P())
step = nnx.jit(lambda layers: call(layers[1]) + call(layers[0]), out_shardings=whole)
for number in range(100):
    if number == 3 and place == dead:
        with open(out, "w") as file:
            file.write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    np.asarray(step(layers))
"""


class End(NamedTuple):
    """How a process ended: its exit code, None where the test had to end it; what it wrote; when."""

    code: int | None
    stderr: str
    out: Path
    when: float


def _run(code: str, *args: str) -> list[End]:
    folder = Path(mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "MOEBIUS_HEARTBEAT": str(BEAT),
        "MOEBIUS_PREFLIGHT": "60",
        "LATE": str(PREFLIGHT),
    }
    started = []
    for place in (0, 1):
        with (folder / f"stderr{place}").open("w") as lines:
            own = [sys.executable, "-W", "error", "-c", START + code, str(place), port, str(WATCHDOG)]
            command = [*own, str(folder / f"out{place}"), *args]
            started.append(subprocess.Popen(command, env=environment, stdout=lines, stderr=lines))
    ended: dict[int, float] = {}
    deadline = time.time() + WAIT
    try:
        # One that is stopped ends when the other has.
        while len(ended) < (1 if "stopped" in args else 2) and time.time() < deadline:
            ended |= {i: time.time() for i, one in enumerate(started) if i not in ended and one.poll() is not None}
            time.sleep(0.05)
        codes = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = [(folder / f"stderr{place}").read_text() for place in (0, 1)]
    return [End(codes[i], logs[i], folder / f"out{i}", ended.get(i, deadline)) for i in (0, 1)]


# Name -> the layers of process 0, and of process 1.
UNLIKE: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "D": ([{}], [{"dim": 8}]),
    "E": ([{}], [{"n_routed_experts": 8}]),
    "K": ([{}], [{"n_activated_experts": 1}]),
    "I": ([{"moe_inter_dim": 16}], [{}]),
    "dtype": ([{}], [{"dtype": "bfloat16"}]),
    "dispatcher": ([{}], [{"dispatcher": "allgather"}]),
    "combine_dtype": ([{"combine_dtype": "float32"}], [{}]),
    "dispatcher_bound": ([{}], [{"dispatcher_bound": 4}]),
    "order": ([{}, {"dim": 8}], [{"dim": 8}, {}]),
    "kinds": ([{}, {}], [{}, {"dim": 8}]),
    "version": ([{}], [{}]),
    "built": ([{}, {}], [{}, {"dim": 8}]),
    "inside": ([{}], [{"dim": 8}]),
}
WORDS = {
    "D": ["layer 0: D is 4 on process 0, 8 on process 1"],
    "E": ["layer 0: E is 4 on process 0, 8 on process 1"],
    "K": ["layer 0: K is 2 on process 0, 1 on process 1"],
    "I": ["layer 0: I is 16 on process 0, 6 on process 1"],
    "dtype": ["layer 0: dtype is float32 on process 0, bfloat16 on process 1"],
    "dispatcher": ["layer 0: dispatcher is alltoall on process 0, allgather on process 1"],
    "combine_dtype": ["layer 0: combine_dtype is float32 on process 0, null on process 1"],
    "dispatcher_bound": ["layer 0: dispatcher_bound is null on process 0, 4 on process 1"],
    "order": ["layer 0: D is 4 on process 0, 8 on process 1"],
    "kinds": ["layers is 1 on process 0, 2 on process 1"],
    "version": [f"jax is {jax.__version__} on process 0, 9.9.9 on process 1"],
    "built": ["layer 1: D is 4 on process 0, 8 on process 1"],
    "inside": ["layer 0: D is 4 on process 0, 8 on process 1"],
}
CASES: dict[str, tuple[str, ...]] = {
    "talks": (TALKS, json.dumps(UNLIKE)),
    "killed": (FAULT, "killed", "1"),
    "stopped": (FAULT, "stopped", "1"),
    "host": (FAULT, "killed", "0"),
}


@cache
def _all() -> dict[str, Future[list[End]]]:
    """Every case at a time: the processes mostly wait."""
    pool = ThreadPoolExecutor(len(CASES))
    return {name: pool.submit(_run, *case) for name, case in CASES.items()}


@cache
def _ends(name: str) -> list[End]:
    return _all()[name].result(2 * WAIT)


@cache
def _found() -> list[dict[str, Any]]:
    ends = _ends("talks")
    assert [end.code for end in ends] == [0, 0], [end.stderr[-3000:] for end in ends]
    return [json.loads(end.out.read_text()) for end in ends]


# ------------------------------------------------------------------------------------------------------- they can talk
@pytest.mark.parametrize("name", WORDS)
def test_processes_that_differ_get_the_same_error_which_names_process_layer_and_field(name: str) -> None:
    errors = [error for found in _found() for error in found["unlike"][name]]
    assert len(errors) == (2 if name == "built" else 4) and {error[0] for error in errors} == {"ConfigError"}, errors
    (text,) = {error[1] for error in errors}
    assert all(words in text for words in WORDS[name]), text
    assert text.startswith("asked: 2 processes that are set up alike\n") and "MOEBIUS_PREFLIGHT=off" in text


def test_experts_that_could_not_be_spread_are_as_they_were() -> None:
    for place, found in enumerate(_found()):
        error, not_spread, width = found["refused"]
        assert error[0] == "ConfigError" and "layer 0: D is 4 on process 0, 8 on process 1" in error[1]
        assert not_spread and width == 4 + 4 * place


def test_a_process_that_comes_too_late_is_named_by_both() -> None:
    errors = [found["late"] for found in _found()]
    assert [(kind, missing) for kind, _, missing in errors] == [("RankLost", [1])] * 2, errors
    assert errors[0][1] == errors[1][1]
    assert f"missing: process 1, not come within {PREFLIGHT:g} s of the others" in errors[0][1]
    assert "asked: a preflight of 2 processes\n" in errors[0][1]


def test_processes_that_are_alike_are_compared_where_a_layer_is_new_and_never_again() -> None:
    for found in _found():
        built, first, again, eager, added, threads = found["alike"]
        # As nnx.jit copies modules, who of two equal ones was called is not known; the third looks like no other.
        assert built == [3, 3, "None", 0] and first == again == [3, 3, "layer 2, call 1", 1]
        assert eager == [3, 3, "layer 2, call 2", 1] and added == [4, 4, "layer 3, call 1", 1]
        assert threads == 0


def test_a_layer_of_linen_is_compared_once_though_each_call_builds_it() -> None:
    for found in _found():
        assert found["linen"] == [[1, 1, f"layer 0, call {call}", 1] for call in range(1, 5)]


def test_layers_inside_of_a_shard_map_are_compared_as_those_outside_of_one() -> None:
    for found in _found():
        assert found["inside"] == [None, [2, 2, "layer 1, call 1", 1]]


def test_a_preflight_that_is_off_compares_nothing() -> None:
    assert [found["off"] for found in _found()] == [None, None]


def test_a_process_that_has_left_is_not_missed() -> None:
    assert len(_found()) == 2  # both ended by themselves, the second four seconds after the first had left
    assert not any("missing" in end.stderr or "Traceback" in end.stderr for end in _ends("talks"))


def test_the_thread_ends_with_jax_distributed() -> None:
    assert len(_found()) == 2 and "threads left: []\n" in _ends("talks")[1].stderr


# ----------------------------------------------------------------------------------------------------- one of them dies
def _record(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("process") and "last called" in line]
    return line


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_a_process_that_dies_is_named_in_the_log_of_the_other_which_ends_in_time(name: str) -> None:
    survivor, dead = _ends(name)
    assert dead.code == (-signal.SIGKILL if name == "killed" else None)
    assert survivor.code not in (None, 0), survivor.stderr[-3000:]
    assert survivor.when - float(dead.out.read_text()) < WATCHDOG + MARGIN
    line = _record(survivor.stderr)
    assert re.match(r"process 0 last called layer 0, call 1, \d+\.\d s ago; missing: process 1 \(no sign of life", line)
    assert "last heard of past layer 0, call 1)" in line


def test_the_process_that_hosts_the_store_is_named_where_it_dies() -> None:
    dead, survivor = _ends("host")
    assert dead.code == -signal.SIGKILL and survivor.code not in (None, 0)
    assert survivor.when - float(dead.out.read_text()) < WATCHDOG + MARGIN
    assert "process 0" in survivor.stderr or "leader task" in survivor.stderr, survivor.stderr[-3000:]


# --------------------------------------------------------------------------------------------------------- one process
ALONE = """
import sys, threading
import jax, numpy as np
from flax import nnx
from moebius.core import MoEConfig
from moebius.jax_frontend import GroupedExperts, liveness, preflight

def never(*args):
    raise AssertionError("other processes were looked for")

liveness._client = preflight.facts = liveness.Peers.__init__ = never
hook = sys.excepthook
sizes = {"dim": 4, "moe_inter_dim": 6, "n_routed_experts": 4, "n_activated_experts": 2, "dtype": "float32"}
mesh = jax.make_mesh((2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
layer = GroupedExperts(MoEConfig(inter_dim=8, **sizes), mesh=mesh, rngs=nnx.Rngs(0))
weights, ids = np.ones((2, 2), np.float32), np.eye(2, dtype=np.int32)
assert np.abs(layer(np.ones((2, 4), np.float32), np.ones(2, bool), weights, ids)).max() > 0
assert not liveness._PEERS and sys.excepthook is hook
assert not any(thread.name.startswith("moebius") for thread in threading.enumerate())
print("alone")
"""


def test_within_one_process_nobody_is_asked_and_no_thread_is_started(run_alone: Any) -> None:
    assert run_alone(ALONE, XLA_FLAGS="--xla_force_host_platform_device_count=2").endswith("alone\n")
