"""What a comparison found: the worst elements, JSON, faults, and reports of a layer in memory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import problems
import pytest
import torch
from problems import Layer, answer, problem
from reports import layer as drawn_layer
from reports import report as described

from moebius.compare.judge import judge
from moebius.compare.numerics import report
from moebius.compare.sides.answer import Desk
from moebius.compare.verdict import FAIL, PASS
from moebius.core import BackendConfig, MoEConfig
from moebius.core.errors import ConfigError
from moebius.torch_frontend import MoE, parameters

SMALL = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 24, "tokens": 16}


@pytest.fixture(scope="module")
def p():
    return problem("swiglu", **SMALL)


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(12, 32, generator=torch.Generator().manual_seed(0))


def moe(**changes):
    """A layer with drawn parameters, biases and correction bias included."""
    torch.manual_seed(0)
    config = MoEConfig(n_routed_experts=4, n_activated_experts=2, dim=32, moe_inter_dim=24, dtype="float32", **changes)
    layer = MoE(config)
    with torch.no_grad():
        for value in (*layer.parameters(), *layer.buffers()):
            value.normal_(0.0, 0.2)
    return layer


def judged(p, **calls):
    with Desk() as desk:
        return judge(p, {name: answer(p, call, desk) for name, call in calls.items()})


def reported(*layers):
    """A report of layers that were really judged."""
    return described(*layers)


class Nudged(Layer):
    """The layer with one element of one stage, or of one gradient, off where it is shown, and nowhere else."""

    def __init__(self, p, name, index, by=1.0):
        super().__init__(p.config)
        self.p, self.name, self.index, self.by = p, name, index, by

    def __call__(self, x, w):
        found = super().__call__(x, w)
        if self.name.startswith("grad."):
            of = {"grad.x": x, **{f"grad.{name}": value for name, value in w.items()}, "grad.up": found["up"]}
            dy = self.p.tensor(self.p.dy_TD)
            found[self.name] = torch.autograd.grad(found["output"], of[self.name], dy, retain_graph=True)[0]
        nudge = torch.zeros_like(found[self.name])
        nudge[self.index] = self.by
        nudged = found[self.name] + nudge
        return {**found, self.name: nudged if self.name == "output" else nudged.detach()}


# ------------------------------------------------------------------------------------------------------------- elements
def row_of(p, token, slot):
    """(row, expert) of a token's route, its experts ascending: rows are sorted by expert, then token."""
    _, ids_TK = Layer(p.config).route(p.tensor(p.x_TD) @ p.parameters["gate.weight"].T)
    ids_TK = ids_TK.sort(dim=-1).values.numpy()
    keys = sorted((expert, t) for t, experts in enumerate(ids_TK.tolist()) for expert in experts)
    expert = int(ids_TK[token, slot])
    return keys.index((expert, token)), expert


@pytest.mark.parametrize("name", ["up", "activation", "down", "rows", "grad.up"])
def test_worst_element_of_a_row_carries_its_token_and_expert(p, name):
    row, expert = row_of(p, 11, 1)
    found = reported(judged(p, mine=Nudged(p, name, (row, 3))))
    (element,) = found.worst(1, row=name, column="mine", step=False)
    assert (element.index, element.token, element.expert) == ((row, 3), 11, expert)
    assert element.z > 100 and element.found == pytest.approx(element.due + 1.0, abs=1e-4)
    assert element.z == pytest.approx((element.found - element.due) / element.noise if element.noise else math.inf)


@pytest.mark.parametrize(
    ("name", "index", "token", "expert"),
    [
        ("logits", (9, 2), 9, 2),
        ("output", (4, 30), 4, None),
        ("grad.x", (15, 0), 15, None),
        ("grad.gate.weight", (3, 31), None, 3),
        ("grad.experts.down_projs", (2, 23, 5), None, 2),
        ("grad.experts.gate_and_up_projs", (1, 30, 47), None, 1),
    ],
)
def test_worst_element_carries_what_it_belongs_to(p, name, index, token, expert):
    found = reported(judged(p, mine=Nudged(p, name, index, -1.0)))
    (element,) = found.worst(1, row=name, step=False)
    assert (element.row, element.column, element.index) == (name, "mine", index)
    assert (element.token, element.expert) == (token, expert)
    assert element.z < -100


def test_worst_element_of_the_weights_counts_the_experts_of_a_token_in_ascending_order(p):
    _, expert = row_of(p, 6, 1)
    _, ids_TK = Layer(p.config).route(p.tensor(p.x_TD) @ p.parameters["gate.weight"].T)
    slot = ids_TK[6].tolist().index(expert)  # in the side's own order
    found = reported(judged(p, mine=Nudged(p, "weights", (6, slot))))
    (element,) = found.worst(1, row="weights", step=False)
    assert (element.index, element.token, element.expert) == ((6, 1), 6, expert)


def test_worst_elements_that_are_no_numbers_come_first(p):
    row, expert = row_of(p, 3, 0)
    layer = judged(p, mine=Nudged(p, "up", (row, 7), math.nan), other=Nudged(p, "output", (1, 1), 1e6))
    element = reported(layer).worst(1, column="mine")[0]
    assert (element.row, element.index, element.token, element.expert) == ("up", (row, 7), 3, expert)
    assert math.isnan(element.found) and math.isfinite(element.due) and math.isinf(element.z)
    score = layer.row("up").whole["mine"]
    assert (score.bad, score.verdict) == (1, FAIL) and math.isfinite(score.z_rms + score.relative + score.predicted)


def test_worst_filters_by_row_column_and_step_and_sorts(p):
    found = reported(judged(p, one=Layer(p.config), other=Nudged(p, "down", (0, 0))))
    every = found.worst(10**6)
    assert [abs(e.z) for e in every] == sorted((abs(e.z) for e in every), reverse=True)
    assert {e.column for e in every} == {"one", "other", "one~other"} and {e.step for e in every} == {True, False}
    assert found.worst() == every[:10] and found.worst(0) == []
    for row, column, step in (("down", None, None), (None, "one", True), ("down", "one~other", False)):
        expected = [e for e in every if row in (None, e.row) and column in (None, e.column) and step in (None, e.step)]
        assert expected and found.worst(10**6, row=row, column=column, step=step) == expected
    assert all(len(found.worst(100, row="down", column="other", step=step)) == 20 for step in (True, False))


@pytest.mark.parametrize(
    "wrong", [{"row": "nonsense"}, {"column": "nonsense"}, {"row": "down_projs"}, {"n": -1}], ids=str
)
def test_worst_of_what_is_not_there_is_refused(p, wrong):
    found = reported(judged(p, mine=Layer(p.config)))
    with pytest.raises(ConfigError) as caught:
        found.worst(**wrong)
    if "row" in wrong:
        assert "grad.experts.down_projs" in caught.value.found


# ----------------------------------------------------------------------------------------------------------------- JSON
def finite(value):
    """What JSON makes of a record: tuples are lists, what is not finite is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def without_verdicts(value):
    if isinstance(value, dict):
        return {
            key: without_verdicts(item) for key, item in value.items() if key not in ("verdict", "faults", "passed")
        }
    return [without_verdicts(item) for item in value] if isinstance(value, list) else value


def test_to_json_is_the_whole_report_with_null_for_what_is_not_finite(p):
    found = reported(judged(p, mine=Nudged(p, "rows", (0, 0)), other=Nudged(p, "up", (0, 0), math.nan)))
    score = found.layers[0].row("rows").whole["mine"]
    assert math.isinf(score.z_max)  # a copy that is off has no noise to be held against
    read = json.loads(found.to_json())
    assert without_verdicts(read) == finite(asdict(found))
    (row,) = (row for row in read["layers"][0]["rows"] if row["name"] == "rows")
    assert row["whole"]["mine"]["z_max"] is None and row["whole"]["mine"]["verdict"] == FAIL
    assert read["passed"] is False and read["faults"] == found.faults and read["verdict"] == FAIL


# ------------------------------------------------------------------------------------------------------------- verdicts
def test_require_passed_says_nothing_of_a_report_that_passed(p):
    assert reported(judged(p, mine=Layer(p.config))).require_passed() is None


def test_require_passed_says_the_first_faults_and_the_worst_element(p):
    found = reported(judged(p, mine=Nudged(p, "down", (0, 5), 1e3)))
    with pytest.raises(AssertionError) as caught:
        found.require_passed()
    *faults, worst = str(caught.value).splitlines()
    assert faults == found.faults[:3] and faults[0].startswith("down, mine: fail")
    assert worst.startswith("farthest off: ") and "row='down'" in worst and "index=(0, 5)" in worst


def test_report_without_layers_or_rows_has_not_passed():
    for found in (described(), described(replace(drawn_layer(), rows=()))):
        assert (found.verdict, found.passed) == (FAIL, False)
        with pytest.raises(AssertionError):
            found.require_passed()
    with pytest.raises(AssertionError, match="nothing was compared"):
        described().require_passed()


def test_faults_come_in_the_order_of_the_pass_routing_first(p):
    class Wrong(Nudged):
        def route(self, logits):
            weights, ids = super().route(logits)
            return weights, ids.flip(0)

    layer = judged(p, mine=Wrong(p, "down", (0, 0)))
    faults = reported(layer).faults
    assert faults[0].startswith("ids, mine: ") and "unexplained" in faults[0]
    names = [row.name for row in layer.rows]
    order = [names.index(fault.partition(",")[0]) for fault in faults[1:]]
    assert order == sorted(order) and len(order) > 1


def test_faults_of_many_layers_name_theirs(p):
    right, wrong = judged(p, mine=Layer(p.config)), judged(p, mine=Nudged(p, "down", (0, 0)))
    found = reported(right, replace(wrong, index=7))
    assert found.faults and found.faults == [f"layer 7, {fault}" for fault in reported(wrong).faults]
    assert found.verdict == FAIL


def test_pair_of_sides_that_part_at_a_tie_is_compared_on_the_rows_that_both_have(p):
    """Two experts' router rows are the same: either may be chosen, and all rows after it shift."""
    gate = p.parameters["gate.weight"].clone()
    gate[3] = gate[0]
    tied = replace(p, parameters={**p.parameters, "gate.weight": gate})

    class Other(Layer):
        """Takes expert 3 wherever the first takes expert 0 alone."""

        def route(self, logits):
            _, ids = super().route(logits)
            alone = (ids == 0).any(-1, keepdim=True) & ~(ids == 3).any(-1, keepdim=True)
            ids = torch.where(alone & (ids == 0), 3, ids)
            return torch.softmax(torch.gather(logits, 1, ids.long()), dim=-1), ids

    layer = judged(tied, one=Layer(p.config), other=Other(p.config))
    parted = layer.routing["one~other"].ties
    assert 0 < parted < 16 and layer.routing["one~other"].unexplained == 0
    assert layer.verdict == PASS, layer.faults
    rows = 32 - parted
    for name, width in (("rows", 32), ("up", 48), ("activation", 24), ("down", 32), ("grad.up", 48)):
        score = layer.row(name).whole["one~other"]
        assert (score.n, score.bad) == (rows * width, 0) and score.z_max < 8, name
    assert layer.row("rows").whole["one~other"].equal == 1.0
    assert not [e for e in layer.worst if e.column == "one~other" and e.row == "up"]  # their rows have two numbers


# ------------------------------------------------------------------------------------------------------ layer in memory
def test_report_of_a_layer_in_memory_compares_both_frontends(hidden):
    layer = moe(expert_bias=True, router_bias=True)
    before = {name: value.clone() for name, value in parameters(layer).items()}
    found = report(layer.train(), hidden=hidden)
    assert found.verdict == PASS, found.faults
    assert (found.checkpoint, found.tokens, found.moe_layers) == ("a MoE in memory", 12, ())
    assert found.layers[0].columns == ("torch", "flax", "torch~flax") and found.devices.keys() == {"torch", "flax"}
    assert {"input", "loading", "torch", "flax", "reference"} == found.seconds.keys()
    assert layer.training and all(value.grad is None for value in layer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in parameters(layer).items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_report_of_a_layer_in_memory_casts_it(hidden, dtype):
    rules = {**problems.CONFIGS["deepseek"], "n_expert_groups": 1, "n_limited_groups": 1}
    found = report(moe(**rules), hidden=hidden.numpy(), dtype=dtype, sides=["torch", "reference"])
    assert found.passed, found.faults
    assert (found.dtype, found.config.dtype) == (dtype, dtype)
    assert found.layers[0].row("up").whole["torch"].predicted > 1e-4  # as of 16 bits


def test_report_of_a_layer_in_memory_against_a_callable(hidden):
    layer = moe()
    found = report(layer, hidden=hidden, sides={"torch": "torch", "mine": Layer(layer.config)})
    assert found.passed and found.layers[0].columns == ("torch", "mine", "torch~mine")


def test_report_of_hidden_states_with_more_axes_takes_all_as_tokens_up_to_the_limit(hidden):
    found = report(moe(), hidden=hidden.reshape(2, 6, 32), sides="torch")
    assert found == replace(report(moe(), hidden=hidden, sides="torch"), seconds=found.seconds)
    assert report(moe(), hidden=hidden, tokens=5, sides="torch").tokens == 5


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (moe, {"hidden": None}),
        (moe, {"text": "words.txt"}),
        (moe, {"layer": 0}),
        (moe, {"layer": "all"}),
        (moe, {"recipe": "any"}),
        (moe, {"sides": ["torch", "transformers"]}),
        (moe, {"sides": ["automodel:nonsense"]}),
        (lambda: torch.nn.Linear(32, 32), {}),
        (lambda: None, {}),
        (lambda: MoE(moe().config, device="meta"), {}),
        (lambda: MoE(moe().config, BackendConfig(fake_balanced_gate=True)), {}),
    ],
)
def test_report_of_a_layer_in_memory_refuses_what_only_a_folder_has_and_what_is_no_layer(hidden, source, arguments):
    with pytest.raises(ConfigError) as caught:
        report(source(), **{"hidden": hidden, **arguments})
    assert all((caught.value.asked, caught.value.found, caught.value.do))


def test_report_refuses_values_that_the_dtype_does_not_hold(hidden):
    with pytest.raises(ConfigError, match="its input"):
        report(moe(), hidden=hidden * 1e5, dtype="float16", sides="torch")
    layer = moe()
    with torch.no_grad():
        layer.gate.weight[0, 0] = np.inf
    with pytest.raises(ConfigError, match=r"gate\.weight"):
        report(layer, hidden=hidden, sides="torch")


def test_report_whose_reference_overflows_is_refused_in_words(hidden):
    layer = moe(expert_activation="relu2")
    with torch.no_grad():
        for value in layer.parameters():
            value.mul_(1e30)
    with pytest.raises(ConfigError, match="out of range"):
        report(layer, hidden=hidden * 1e30, sides="torch")
