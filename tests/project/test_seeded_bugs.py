"""Each kind of bug that porting an MoE layer brings is found, at the stage where it sits and nowhere before."""

from __future__ import annotations

import problems
import pytest
import torch

from moebius.compare.judge import judge
from moebius.compare.sides.answer import Desk
from moebius.compare.verdict import FAIL, PASS, WARN

# bug -> (stage where it sits, what the report says there, how the layer is configured)
BUGS = {
    "swapped halves": ("activation", FAIL, {"name": "swiglu"}),
    "missing bias weight": ("down", FAIL, {"name": "gpt_oss"}),
    "bfloat16 where float32 is due": ("weights", FAIL, {"name": "swiglu", "router_weights_fp32": True}),
    "sum in bfloat16": ("output", FAIL, {"name": "swiglu", "n_activated_experts": 8}),
    "dropped token": ("rows", FAIL, {"name": "swiglu"}),
    "off-by-one expert": ("up", FAIL, {"name": "swiglu"}),
    "per-op rounding": ("activation", WARN, {"name": "swiglu"}),
    "wrong clamp side": ("activation", FAIL, {"name": "gpt_oss"}),
    "router gradient lost": ("grad.logits", FAIL, {"name": "swiglu"}),
}


def judged(bug, dtype, *, name, **changes):
    p = problems.problem(name, dtype, **changes)
    with Desk() as desk:
        return judge(p, {"mine": problems.answer(p, problems.Layer(p.config, bug), desk)})


def first_fault(layer):
    """(name, verdict) of the first row that does not pass when each step is fed with the side's own inputs."""
    for row in layer.rows:
        verdict = row.step["mine"].verdict if "mine" in row.step else PASS
        if verdict != PASS:
            return row.name, verdict
    return None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_in_16_bits_is_found_where_it_sits(bug, dtype):
    if bug in ("bfloat16 where float32 is due", "sum in bfloat16") and dtype == "float16":
        dtype = "bfloat16"
    stage, verdict, config = BUGS[bug]
    layer = judged(bug, dtype, **config)
    assert first_fault(layer) == (stage, verdict)
    assert layer.verdict in (verdict, FAIL)
    assert any(fault.startswith(f"{stage}, ") for fault in layer.faults)


@pytest.mark.parametrize("bug", sorted(BUGS.keys() - {"per-op rounding"}))
def test_a_seeded_bug_in_float32_is_found_where_it_sits(bug):
    stage, _, config = BUGS[bug]
    layer = judged(bug, "float32", **config)
    assert first_fault(layer) == (stage, FAIL)
    assert layer.verdict == FAIL


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["swiglu", "gpt_oss", "geglu"])
def test_the_same_layer_without_a_bug_passes(name, dtype):
    layer = judged(None, dtype, name=name)
    assert layer.verdict == PASS, layer.faults
    assert {"logits", "weights", "rows", "up", "activation", "down", "output"} <= {r.name for r in layer.rows if r.step}


def test_a_bug_in_one_expert_is_traced_to_that_expert_by_the_worst_elements():
    layer = judged("off-by-one expert", "bfloat16", name="swiglu")
    worst = [element for element in layer.worst if element.row == "up" and element.step]
    assert worst and {element.expert for element in worst} == {15}


def test_a_dropped_token_is_named():
    layer = judged("dropped token", "bfloat16", name="swiglu")
    tokens = {element.token for element in layer.worst if element.row == "rows"}
    assert len(tokens) == 1


def test_a_wrong_expert_is_an_unexplained_disagreement_and_no_arithmetic_fault():
    layer = judged("wrong expert chosen", "bfloat16", name="swiglu")
    agreement = layer.routing["mine"]
    assert (agreement.unexplained, agreement.examples, agreement.verdict) == (1, (5,), FAIL)
    assert first_fault(layer) is None and layer.verdict == FAIL


def test_one_weight_off_by_a_twentieth_is_found_at_its_stage():
    p = problems.problem("swiglu", "bfloat16", tokens=256)
    p.parameters["experts.gate_and_up_projs"][3, 7, 11] = 0.5

    def side(x, w):
        factor = torch.ones(p.parameters["experts.gate_and_up_projs"].shape, dtype=x.dtype)
        factor[3, 7, 11] = 1.05
        matrices = w["experts.gate_and_up_projs"] * factor
        return problems.Layer(p.config)(x, {**w, "experts.gate_and_up_projs": matrices})

    with Desk() as desk:
        layer = judge(p, {"mine": problems.answer(p, side, desk)})
    assert layer.row("up").step["mine"].verdict == FAIL
    (worst, *_) = [element for element in layer.worst if element.row == "up" and element.step]
    assert (worst.expert, worst.index[1]) == (3, 11)
