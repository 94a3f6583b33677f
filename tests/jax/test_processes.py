"""The modules over the devices of two processes: what they compute on as many devices of one process."""

import os
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest

from moebius.core import MoEConfig
from moebius.core.tolerance import relative_error
from moebius.jax_frontend import GroupedExperts, MoE, parameters

SIZES = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 8, "moe_inter_dim": 6, "dtype": "float32"}
CONFIG = MoEConfig(**SIZES, expert_bias=True, n_shared_experts=1, softmax_before_topk=True, aux_loss_coeff=0.1)
TOKENS = 10
# Of the layer the devices' parts of these gradients are added by XLA, in an order that depends on the network.
SUMMED = ("gate", "shared_experts")

CODE = """
import os, pickle, sys
import jax
place, port = int(sys.argv[1]), sys.argv[2]
if port:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=place)
import jax.numpy as jnp, numpy as np
from flax import nnx
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moebius.core import BackendConfig
from moebius.jax_frontend import GroupedExpertsDeepEP, MoE, load_parameters

with open(os.environ["CASES"], "rb") as file:
    config, values, tokens, dy, x = pickle.load(file)
assert (len(jax.local_devices()), len(jax.devices())) == (2 if port else 4, 4)
kind = (AxisType.Auto,) * 2
across = jax.make_mesh((2, 2), ("ep", "data"), axis_types=kind)  # the ranks of experts are processes
within = jax.make_mesh((4, 1), ("ep", "data"), axis_types=kind)
zeros = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}

made = {
    "experts": GroupedExpertsDeepEP(config, BackendConfig(experts="loop"), "alltoall", **zeros),
    "layer": MoE(config, BackendConfig(experts="loop"), mesh=across, **zeros),
}
made["experts"].init_token_dispatcher(within)
found = {}
for name, module in made.items():
    load_parameters(module, values[name == "layer"])
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    rest = jax.tree.map(np.asarray, rest)
    args = (x,) if name == "layer" else tokens

    @partial(jax.jit, out_shardings=NamedSharding(within if name == "experts" else across, P()))
    def run(params, rest, first, *others):
        call = lambda params, first: nnx.merge(graph, params, rest, copy=True)(first, *others)
        y, pull = jax.vjp(call, params, first)
        return y, pull(dy.reshape(y.shape))

    y, (grads, dx) = run(params, rest, *args)
    found[name] = {"y": y, "dx": dx, **{".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(grads)}}
    found[name] = {key: np.asarray(value) for key, value in found[name].items()}
with open(os.environ["FOUND"] + str(place) + port, "wb") as file:
    pickle.dump(found, file)
if port:
    jax.distributed.shutdown()
"""


@pytest.fixture(scope="module")
def found(build, tmp_path_factory):
    """(what one process found, what each of two did)."""
    folder = tmp_path_factory.mktemp("processes")
    rng = np.random.default_rng(0)
    values = [{n: np.asarray(v) for n, v in parameters(build(kind, CONFIG)).items()} for kind in (GroupedExperts, MoE)]
    ids = np.argsort(rng.random((TOKENS, 8)), -1)[:, :2].astype(np.int32)
    x, dy = (rng.normal(size=(TOKENS, 8)).astype(np.float32) for _ in range(2))
    tokens = x, np.arange(TOKENS) != 1, rng.random((TOKENS, 2)).astype(np.float32), ids
    (folder / "cases").write_bytes(pickle.dumps((CONFIG, values, tokens, dy, x.reshape(2, 5, 8))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = {"CASES": str(folder / "cases"), "FOUND": str(folder / "found")}
    logs = [folder / f"log{i}" for i in range(3)]
    how = [(0, "", 4), (0, port, 2), (1, port, 2)]
    started = [_started(*args, places, log) for args, log in zip(how, logs, strict=True)]
    try:
        for process, log in zip(started, logs, strict=True):
            assert process.wait(timeout=200) == 0, log.read_text()[-4000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
    read = lambda name: pickle.loads((folder / name).read_bytes())  # noqa: E731
    return read("found0"), [read(f"found{place}{port}") for place in (0, 1)]


def _started(place, port, devices, places, log):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    environment = os.environ | places | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", CODE, str(place), port]
    with log.open("w") as lines:
        return subprocess.Popen(command, env=environment, stdout=lines, stderr=lines)


@pytest.mark.parametrize("name", ["experts", "layer"])
def test_two_processes_compute_what_one_does(found, name):
    one, two = found
    assert {"y", "dx"} < one[name].keys()
    for key, wanted in one[name].items():
        assert np.abs(wanted).max() > 0, key
        for process in two:
            limit = 4 * np.finfo(np.float32).eps if key.startswith(SUMMED) else 0
            assert relative_error(process[name][key], wanted) <= limit, key
