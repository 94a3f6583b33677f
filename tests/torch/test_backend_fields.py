"""Settings of BackendConfig that only Flax has: every module of experts refuses them in words."""

from typing import Any

import pytest

from moebius.core import BackendConfig, MoEConfig, Unsupported
from moebius.torch_frontend import GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, MoE, automodel

CONFIG = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=8, moe_inter_dim=6, dtype="float32")
KINDS = (
    *(GroupedExperts, GroupedExpertsDeepEP, GroupedExpertsTE, MoE),
    *(automodel.GroupedExperts, automodel.GroupedExpertsDeepEP, automodel.GroupedExpertsTE),
)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__.split('.')[-1]}.{kind.__name__}")
REFUSED = [("remat", "none", "double_backward=True"), ("remat", "full", "torch.utils.checkpoint")]
REFUSED += [("permute", "te", "leave it out"), ("route", "te", "leave it out")]
REFUSED += [("dispatcher_bound", 8, "leave it out"), ("dispatcher_on_overflow", "count", "leave it out")]


@kinds
@pytest.mark.parametrize("name, value, do", REFUSED)
def test_experts_of_a_setting_that_only_flax_has_refuse_it(kind: Any, name: str, value: str, do: str) -> None:
    with pytest.raises(Unsupported) as caught:
        kind(CONFIG, BackendConfig(experts="loop", **{name: value}))
    assert caught.value.asked == f"{name}={value!r}"
    assert "in PyTorch" in caught.value.found and do in caught.value.do


@kinds
def test_experts_of_the_defaults_spelled_out_are_built(kind: Any) -> None:
    assert kind(CONFIG, BackendConfig(experts="loop", remat="act", permute=None, route=None)) is not None
