"""PyTorch and Flax in one process on one NVIDIA GPU: the same memory, and experts that agree with each other."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import on_gpu
import pytest
import torch
from sides import Side, cached_problem, expected

from moebius.core import BackendConfig, BackendUnavailable, Unsupported
from moebius.core.tolerance import within

pytestmark = on_gpu.MARKS
WIDE = {"tokens": 200, "dim": 128, "inter": 64, "n_experts": 8, "k": 2, "dtype": "bfloat16", "expert_bias": True}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32], ids=str)
def test_to_jax_of_an_alias_on_a_gpu_is_the_same_memory(dtype: torch.dtype) -> None:
    from moebius.compare.bridge import to_jax

    tensor = torch.arange(1024, device="cuda").to(dtype)
    before = torch.cuda.memory_allocated()
    array = to_jax(tensor, alias=True)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert next(iter(array.devices())).platform == "gpu" and torch.cuda.memory_allocated() == before
    np.testing.assert_array_equal(np.asarray(array + 0, np.float64), tensor.double().cpu().numpy())
    tensor.fill_(3)
    torch.cuda.synchronize()
    np.testing.assert_array_equal(np.asarray(array + 0, np.float64), 3.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_to_torch_of_an_alias_on_a_gpu_is_the_same_memory(dtype: str) -> None:
    import jax.numpy as jnp

    from moebius.compare.bridge import to_torch

    array = jnp.arange(1024).astype(dtype)
    before = torch.cuda.memory_allocated()
    tensor = to_torch(array, alias=True)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert tensor.is_cuda and torch.cuda.memory_allocated() == before
    np.testing.assert_array_equal(tensor.double().cpu().numpy(), np.arange(1024.0).astype(np.asarray(array).dtype))


@cache
def program(config: Any, backend: str) -> Any:
    """(parameters, x, weights, mask, ids, dy) -> y and its gradients, jitted."""
    import jax

    from moebius.jax_frontend import experts

    def run(parameters: Any, x: Any, weights: Any, mask: Any, ids: Any, dy: Any) -> Any:
        forward = lambda p, x, w: experts(p, x, mask, w, ids, config=config, backend=backend)  # noqa: E731
        y, pull = jax.vjp(forward, parameters, x, weights)
        return y, pull(dy)

    return jax.jit(run)


@pytest.mark.parametrize("backend", on_gpu.BACKENDS)
@pytest.mark.parametrize("torch_backend", ["grouped_mm", "te", "triton"])
def test_experts_of_both_frontends_on_shared_parameters_agree(torch_backend: str, backend: str) -> None:
    """Both on the memory of one PyTorch module; each near the reference, and as near to each other as both allow."""
    from moebius.compare.bridge import to_jax, to_torch
    from moebius.torch_frontend import GroupedExperts, load_parameters

    on_gpu.require(backend)
    p = cached_problem(**WIDE)
    try:
        module: Any = GroupedExperts(p.config, BackendConfig(experts=torch_backend), device="cuda")
    except (BackendUnavailable, Unsupported) as error:
        pytest.skip(f"PyTorch's {torch_backend}: {error.found}")
    load_parameters(module, {name: torch.from_numpy(value) for name, value in p.parameters.items()})
    side = Side("torch", torch_backend, "cuda")
    x, dy = (side.array(value, p.dtype) for value in (p.x, p.dy))
    weights, mask, ids = side.array(p.weights, p.weights_dtype), side.array(p.token_mask), side.array(p.ids)
    y = module(x.requires_grad_(), mask, weights.requires_grad_(), ids)
    y.backward(dy)
    own = {"y": y, "dx": x.grad, "dweights": weights.grad}
    own |= {name: value.grad for name, value in module.named_parameters()}

    torch.cuda.synchronize()
    shared = {name: to_jax(value, alias=True) for name, value in module.named_parameters()}
    for name, value in module.named_parameters():
        assert shared[name].unsafe_buffer_pointer() == value.data_ptr(), name
    given = [to_jax(value, alias=value.is_floating_point()) for value in (x, weights, mask, ids.int(), dy)]
    run = program(p.config, backend)
    y_jax, (dparameters, dx, dweights) = run(shared, *given)
    theirs = {name: to_torch(value, alias=True) for name, value in {"y": y_jax, "dx": dx, "dweights": dweights}.items()}
    theirs |= {name: to_torch(value, alias=True) for name, value in dparameters.items()}
    exact, limits = expected(p)
    assert own.keys() == theirs.keys() == exact.keys()
    for name, limit in limits.items():
        one, other = side.numpy(own[name]), side.numpy(theirs[name])
        assert within(one, exact[name], limit) and within(other, exact[name], limit), name
        apart = np.abs(one - other)
        assert np.linalg.norm(apart) <= 2 * limit.norm and apart.max() <= 2 * limit.largest, name
        assert own[name].dtype == theirs[name].dtype and own[name].shape == theirs[name].shape, name
        if torch_backend == backend == "triton":
            assert torch.equal(own[name], theirs[name]), name


def test_both_frontends_take_turns_on_a_gpu_without_disturbing_each_other() -> None:
    """Each repeats its own bits while the other's work is in flight."""
    import jax

    sides = [
        Side("torch", "grouped_mm", "cuda"),
        Side("jax", "tokamax" if on_gpu.served("tokamax") else "loop", "cuda"),
    ]
    p = cached_problem(**WIDE)
    wanted = [side.experts(p) for side in sides]
    for _ in range(3):
        for side, due in zip(sides, wanted, strict=True):
            for name, value in side.experts(p).items():
                np.testing.assert_array_equal(value, due[name], err_msg=f"{side} {name}")
    assert jax.default_backend() == "gpu"
