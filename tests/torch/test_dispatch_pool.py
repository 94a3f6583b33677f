"""Communication buffers of the libraries' dispatchers: how many are made, who holds them, when they are destroyed.

Against stand-ins over gloo; one spawn of two ranks.
"""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from trips import D, E, K, said, there_and_back, tokens

from moebius.core import BackendConfig, MoEConfig
from moebius.torch_frontend import GroupedExperts, GroupedExpertsDeepEP, dispatch_pool, liveness
from moebius.torch_frontend.dispatch_pool import Lease

CONFIG = MoEConfig(n_routed_experts=E, n_activated_experts=K, dim=D, moe_inter_dim=6, dtype="bfloat16")


# ----------------------------------------------------------------------------------------------------- what a rank does
def _buffers() -> dict[str, Any]:
    """How many buffers are made and left, of what sizes, and what is handed to them."""
    from fakes.deep_ep import BUFFERS, made

    found: dict[str, Any] = {}
    BUFFERS.clear()
    small = made("deepep", D, E, K)
    again = made("deepep", D, 2 * E, 1, num_sms=20)
    found["shared"] = len(BUFFERS)
    alone = made("deepep", D, E, K, share=False)
    found["not shared"] = len(BUFFERS)
    own = tokens()
    under_way = small.begin(*own, E)
    wide = made("deepep", 4 * D, E, K)
    found["larger"] = len(BUFFERS), BUFFERS[-1].num_nvl_bytes > BUFFERS[0].num_nvl_bytes
    # What set off in the small buffer comes home in it.
    sent, state = small.end(under_way)
    y = small.combine(sent.x_SD.float() * sent.weights_SK.sum(1, keepdim=True), state)
    y.sum().backward()
    before, own = (y.detach(), own[0].grad), tokens()
    y = there_and_back(small, own)
    y.sum().backward()
    found["came home"] = torch.equal(y.detach(), before[0]) and torch.equal(own[0].grad, before[1])
    found["eager"] = len(BUFFERS)  # none was made by a call
    y = there_and_back(wide, tokens(dim=4 * D))
    for dispatcher in (small, again, wide, wide, alone):
        dispatcher.close()
        found.setdefault("destroyed", []).append(sum(buffer.destroyed for buffer in BUFFERS))
    found["used after close"] = said(lambda: there_and_back(small, tokens()))
    found["backward after close"] = said(lambda: y.sum().backward())

    # Longer than any before: a larger one, alike on both ranks; the number of tokens is padded to the longest's.
    from fakes.deep_ep import CALLS

    hybrid = made("hybridep", 16, E, K)
    CALLS.clear()
    there_and_back(hybrid, tokens(4100 if dist.get_rank() else 2, dim=16)).sum().backward()
    there_and_back(hybrid, tokens(2, dim=16))
    made_for = [buffer.most for buffer in BUFFERS if hasattr(buffer, "held")]
    called = [(told["tokens"], told["routes"]) for name, told in CALLS if "routes" in told]
    found["hybrid"] = made_for, called
    hybrid.close()
    return found


def _mesh(group: Any = None) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(dist.group.WORLD if group is None else group, "cpu")


def _called(module: Any, token_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x, weights, ids, mask = tokens()
    y: torch.Tensor = module(x.to(token_dtype), mask, weights, ids)
    return y


def _copies() -> dict[str, Any]:
    """Of a module that was copied, and then closed: whether the copy works on, and when the buffer goes."""
    from fakes.deep_ep import BUFFERS

    found: dict[str, Any] = {}
    for name, share in [("shared", True), ("alone", False)]:
        BUFFERS.clear()
        module = GroupedExpertsDeepEP(CONFIG, BackendConfig(experts="loop"), dispatcher_share_token_dispatcher=share)
        module.init_token_dispatcher(_mesh())
        other = copy.deepcopy(module)
        alike = torch.equal(_called(module), _called(other))
        of_group = len(liveness.peers(None).dispatchers)
        module.close()
        after = said(lambda module=module: _called(module)), (module.ep_size, module.token_dispatcher)
        y = _called(other)
        y.sum().backward()
        destroyed = [BUFFERS[0].destroyed]
        other.close()
        destroyed.append(BUFFERS[0].destroyed)
        found[name] = len(BUFFERS), alike, of_group, after, destroyed
    found["shelves"] = len(dispatch_pool._SHELVES)
    return found


def _moves() -> dict[str, Any]:
    """Which groups experts hold dispatchers of: over one mesh, then over another, closed, and called again."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    # Those of torch over the same ranks are equal.
    meshes = [SimpleNamespace(get_group=lambda group=group: group) for group in groups]
    module = GroupedExperts(CONFIG, BackendConfig(experts="loop", dispatcher="alltoall"))

    def known() -> list[bool]:
        return [liveness.known(group) is not None for group in groups]

    found = {}
    for name, mesh in [("first", meshes[0]), ("second", meshes[1])]:
        module._dispatcher(mesh, torch.bfloat16)
        found[name] = known()
    module.close()
    found["closed"] = known()
    module._dispatcher(meshes[1], torch.bfloat16)
    found["again"] = known()
    module.close()
    return found


def _facts() -> dict[str, Any]:
    from fakes import deep_ep

    deep_ep.ready()
    return {fact.__name__: fact() for fact in (_buffers, _copies, _moves)}


@cache
def _all() -> list[dict[str, Any]]:
    return ranks.run(_facts, 2)


def _found(name: str) -> list[Any]:
    """What each rank says of it."""
    return [facts[name] for facts in _all()]


# --------------------------------------------------------------------------------------------------------------- tests
def test_layers_share_a_buffer_that_a_wider_one_replaces_and_none_is_made_by_a_call() -> None:
    for found in _found("_buffers"):
        assert (found["shared"], found["not shared"], found["larger"], found["eager"]) == (1, 2, (3, True), 3)
        assert found["came home"]


def test_close_of_the_last_holder_destroys_the_buffers() -> None:
    for found in _found("_buffers"):
        assert found["destroyed"] == [0, 0, 2, 2, 3]
        assert "found: it was closed\ndo: build the dispatcher again" in found["used after close"]
        assert "do: close dispatchers after the last backward pass" in found["backward after close"]


def test_hybridep_pads_to_the_longest_rank_and_grows_with_it() -> None:
    for rank, found in enumerate(_found("_buffers")):
        n = [2, 4100][rank]
        assert found["hybrid"][0] == [4096, 8192]
        # Once out, once for the gradients; what pads goes nowhere. A token may name an expert twice.
        (first, routes), again, (last, more) = found["hybrid"][1]
        assert (first, again, last) == (4160, (4160, 0), 64) and n <= routes <= K * n and 2 <= more <= K * 2


@pytest.mark.parametrize("name", ["shared", "alone"])
def test_deepcopy_of_a_module_holds_the_buffer_by_itself_until_it_is_closed(name: str) -> None:
    for found in _found("_copies"):
        made, alike, of_group, (after, state), destroyed = found[name]
        assert made == 1 and alike and of_group == 2
        assert "do: call init_token_dispatcher(ep_mesh) first" in after and state == (1, None)
        assert destroyed == [False, True] and found["shelves"] == 0


def test_experts_that_move_to_another_mesh_or_are_closed_hold_nothing_of_the_old_one() -> None:
    for found in _found("_moves"):
        assert found == {
            "first": [True, False],
            "second": [False, True],
            "closed": [False, False],
            "again": [False, True],
        }


# -------------------------------------------------------------------------------------------------------- without ranks
class _Buffer:
    destroyed = False

    def destroy(self) -> None:
        self.destroyed = True


def _fails(sizes: Any) -> Any:
    raise MemoryError(sizes)


@pytest.mark.parametrize("key", ["one", None])
def test_lease_whose_buffer_cannot_be_made_holds_nothing(key: Any) -> None:
    with pytest.raises(MemoryError):
        Lease(key, (1,), _fails)
    assert not dispatch_pool._SHELVES


def test_lease_whose_larger_buffer_cannot_be_made_leaves_the_smaller_to_its_holders() -> None:
    buffer = _Buffer()
    held = Lease("one", (1,), lambda sizes: buffer)
    with pytest.raises(MemoryError):
        Lease("one", (2,), _fails)
    assert held.sizes == (1,) and held.grow((1,)).buffer is buffer
    held.close()
    assert buffer.destroyed and not dispatch_pool._SHELVES


@pytest.mark.parametrize("key", ["one", None])
def test_again_of_a_lease_is_one_more_hold_on_the_same_buffer(key: Any) -> None:
    buffer = _Buffer()
    first = Lease(key, (1,), lambda sizes: buffer)
    second = first.again()
    first.close()
    first.again().close()  # of one that was closed: another that is
    assert not buffer.destroyed and second.grow((1,)).buffer is buffer
    second.close()
    assert buffer.destroyed
