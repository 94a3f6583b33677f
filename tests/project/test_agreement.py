"""Whether two sides chose the same experts: what rounding explains is a tie, all else is unexplained and fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import Layer, answer, problem

from moebius.compare.agreement import Choices
from moebius.compare.judge import judge
from moebius.compare.problem import Problem
from moebius.compare.sides.answer import Desk
from moebius.compare.verdict import FAIL, PASS
from moebius.core import MoEConfig, layout, reference
from moebius.core.errors import ConfigError

DEEPSEEK = {
    "score_func": "sigmoid_with_bias",
    "n_expert_groups": 4,
    "n_limited_groups": 2,
    "force_e_score_correction_bias": True,
    "norm_topk_prob": True,
}
EPS = 2.0**-24


def of_logits(logits_TE, k=2, dtype="float32", bias_E=None, **changes):
    """A problem whose router gives exactly these logits: x is the logits, its weight the identity."""
    logits_TE = np.asarray(logits_TE, float)
    n = logits_TE.shape[1]
    config = MoEConfig(
        n_routed_experts=n, n_activated_experts=k, dim=n, moe_inter_dim=4, dtype=dtype, aux_loss_coeff=0.0, **changes
    )
    rng = np.random.default_rng(0)
    drawn = {row.name: torch.from_numpy(rng.normal(size=row.shape)).float() for row in layout.moe(config)}
    drawn = {name: value.to(getattr(torch, dtype)) for name, value in drawn.items()}
    drawn["gate.weight"] = torch.eye(n, dtype=getattr(torch, dtype))
    bias = None if bias_E is None else torch.tensor(bias_E, dtype=torch.float32)
    return Problem(
        config=config,
        dtype=dtype,
        x_TD=logits_TE,
        dy_TD=np.ones(logits_TE.shape),
        parameters=drawn,
        correction_bias_E=bias,
    )


def compared(p, *others):
    """The reference's choice against other experts of the first token."""
    choices = Choices.of(p)
    other_TK = choices.ids_TK.copy()
    other_TK[0] = others
    return choices.agreement(other_TK, choices.ids_TK)


def counts(agreement):
    return agreement.equal, agreement.ties, agreement.unexplained, agreement.verdict


# ---------------------------------------------------------------------------------------------------- ties by one score
SEPARATE = [4.0, 1.0, 3.0, 2.0]


def test_agreement_of_equal_sets_in_any_order():
    choices = Choices.of(of_logits([SEPARATE, SEPARATE[::-1]]))
    assert choices.ids_TK.tolist() == [[0, 2], [3, 1]]
    found = choices.agreement(choices.ids_TK[:, ::-1], choices.ids_TK)
    assert counts(found) == (2, 0, 0, PASS) and found.tokens == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("units", "ties"), [(0.0, 1), (0.5, 1), (20.0, 0)])
def test_agreement_is_a_tie_where_the_scores_noise_explains_it(dtype, units, ties):
    """The third best is that many of the dtype's roundings below the second: it may be chosen, or it may not."""
    eps = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    p = of_logits([[4.0, 1.0, 3.0, 3.0 * (1 - 2 * units * eps)], SEPARATE], dtype=dtype)
    assert Choices.of(p).ids_TK[0].tolist() == [0, 2]
    assert counts(compared(p, 0, 3)) == (1, ties, 1 - ties, PASS if ties else FAIL)
    assert counts(compared(p, 0, 1)) == (1, 0, 1, FAIL)  # the worst is never explained
    assert counts(compared(p, 2, 3)) == (1, 0, 1, FAIL)  # nor is leaving out the best


def test_agreement_on_a_token_with_a_tie_and_a_wrong_expert_is_unexplained():
    p = of_logits([[4.0, 1.0, 3.0, 3.0 * (1 - EPS), 3.5]], k=3)
    assert counts(compared(p, 0, 4, 3)) == (0, 1, 0, PASS)
    assert counts(compared(p, 0, 1, 3)) == (0, 0, 1, FAIL)


@pytest.mark.parametrize("twice", [(0, 0), (2, 2), (3, 3)])
def test_agreement_with_an_expert_named_twice_is_unexplained(twice):
    """However near the expert that is left out is to the one in its place."""
    p = of_logits([[3.0, 1.0, 3.0, 3.0]])
    assert counts(compared(p, *twice)) == (0, 0, 1, FAIL)


def test_agreement_names_a_few_of_the_unexplained_tokens():
    p = of_logits([SEPARATE] * 9)
    ids_TK = Choices.of(p).ids_TK
    found = Choices.of(p).agreement(np.full_like(ids_TK, [1, 3]), ids_TK)
    assert (found.unexplained, found.examples) == (9, (0, 1, 2, 3, 4))
    assert str(found) == "0 + 9 unexplained !"


def test_agreement_that_does_not_count_keeps_its_own_verdict():
    choices = Choices.of(of_logits([SEPARATE]))
    found = choices.agreement(np.array([[1, 3]]), choices.ids_TK, counts=False)
    assert not found.counts and found.verdict == FAIL


# ------------------------------------------------------------------------------------------------ correction and groups
def test_choices_with_a_correction_bias_are_made_by_score_and_bias_together():
    """By the scores alone the last expert is far behind; its bias brings it level with the second."""
    scores = [0.9, 0.8, 0.2, 0.5]
    logits = np.log(np.array(scores) / (1 - np.array(scores)))
    logits = logits.astype(np.float32)
    exact = 1 / (1 + np.exp(-logits.astype(float)))
    rules = {"score_func": "sigmoid_with_bias", "force_e_score_correction_bias": True}
    near = of_logits([logits], bias_E=[0, 0, 0, float(np.float32(exact[1] - exact[3]))], **rules)
    assert counts(compared(near, 0, 1)) in ((1, 0, 0, PASS), (0, 1, 0, PASS))
    assert counts(compared(near, 0, 3)) in ((1, 0, 0, PASS), (0, 1, 0, PASS))
    far = of_logits([logits], bias_E=[0, 0, 0, 0.29], **rules)
    assert counts(compared(far, 0, 3)) == (0, 0, 1, FAIL)
    assert counts(compared(of_logits([logits], bias_E=[0, 0, 0, 0.31], **rules), 0, 1)) == (0, 0, 1, FAIL)


GROUPED = [2.0, 1.5, 1.0, 0.5, 1.9, 1.45, -3.0, -4.0]  # groups of two: best are the first and the third


def grouped(logits_E, **changes):
    return of_logits([logits_E], bias_E=[0.0] * 8, **{**DEEPSEEK, **changes})


def test_choices_with_groups_take_the_experts_of_the_kept_groups():
    p = grouped(GROUPED)
    assert Choices.of(p).ids_TK.tolist() == [[0, 4]]
    assert counts(compared(p, 0, 2)) == (0, 0, 1, FAIL)  # an expert of a group that is left out


def test_agreement_with_an_expert_of_a_group_left_out_is_unexplained_however_near_its_score():
    """Its score is the second's own, but its group is far behind: only a side that forgets the groups takes it."""
    p = grouped([2.0, 1.5, 1.9, -9.0, 1.9, 1.45, -3.0, -4.0])
    assert Choices.of(p).ids_TK.tolist() == [[0, 4]]
    assert counts(compared(p, 0, 2)) == (0, 0, 1, FAIL)


def test_agreement_with_an_expert_of_a_group_at_the_border_is_a_tie():
    p = grouped([2.0, 1.5, 1.9, 1.45, 1.9, 1.45, -3.0, -4.0])
    assert Choices.of(p).ids_TK.tolist() == [[0, 2]]  # of equal groups the first
    assert counts(compared(p, 0, 4)) == (0, 1, 0, PASS)
    assert counts(compared(p, 0, 6)) == (0, 0, 1, FAIL)


def test_agreement_where_every_group_is_kept_is_by_the_scores():
    p = grouped([2.0, 1.5, 1.9, 1.45, 1.9, 1.45, -3.0, -4.0], n_limited_groups=4)
    assert counts(compared(p, 0, 4)) == (0, 1, 0, PASS)
    assert counts(compared(p, 0, 6)) == (0, 0, 1, FAIL)


@pytest.mark.parametrize("name", ["swiglu", "deepseek", "gpt_oss"])
def test_choices_are_the_references(name):
    p = problem(name, tokens=32)
    found = Choices.of(p).ids_TK
    parameters = {name: p.exact(name) for name in p.parameters}
    args = p.x_TD, np.ones(32, bool), parameters, p.config
    assert np.array_equal(found, reference.moe(*args, correction_bias_E=p.correction_bias).routing.ids_TK)


# -------------------------------------------------------------------------------------------------------------- settled
def test_settled_tokens_are_those_without_a_tie_at_the_border():
    tie = [4.0, 1.0, 3.0, 3.0 * (1 - EPS)]
    inside = [4.0, 4.0, 1.0, 0.0]  # a tie between two that are chosen
    below = [4.0, 3.0, 1.0, 1.0]  # a tie between two that are not
    assert Choices.of(of_logits([SEPARATE, tie, inside, below])).settled_T.tolist() == [True, False, True, True]


def test_settled_is_every_token_where_all_experts_are_chosen():
    assert Choices.of(of_logits([[1.0, 1.0], [0.0, 0.0]])).settled_T.all()


def test_settled_with_groups_is_open_where_a_group_may_cross_the_border():
    assert Choices.of(grouped(GROUPED)).settled_T.tolist() == [True]
    assert Choices.of(grouped([2.0, 1.5, 1.9, 1.45, 1.9, 1.45, -3.0, -4.0])).settled_T.tolist() == [False]
    near = [2.0, 1.5, 1.9, -9.0, 1.9, 1.45, -3.0, -4.0]
    assert Choices.of(grouped(near)).settled_T.tolist() == [True]


@pytest.mark.parametrize("name", ["swiglu", "deepseek"])
def test_settled_is_what_agreement_says_of_every_exchange(name):
    p = problem(name, "bfloat16", tokens=120, dim=32, moe_inter_dim=24)
    choices = Choices.of(p)
    for token, ids_K in enumerate(choices.ids_TK):
        rest = [e for e in range(16) if e not in ids_K]
        other_TK = np.array([[two if e == one else e for e in ids_K] for one in ids_K for two in rest])
        alone = {
            name: None if value is None else np.repeat(value[[token]], len(other_TK), axis=0)
            for name, value in vars(choices).items()
            if name != "fill"
        }
        alone = replace(choices, **alone)
        is_open = alone.agreement(other_TK, alone.ids_TK).ties > 0
        # A group at the border opens a token although the experts at stake may be far behind.
        has_open_group = choices.open_TG is not None and choices.open_TG[token].any()
        assert choices.settled_T[token] == (not is_open and not has_open_group)
    assert 0 < choices.settled_T.sum() < 120


# ---------------------------------------------------------------------------------------------------------- in a report
def judged(p, **calls):
    with Desk() as desk:
        return judge(p, {name: answer(p, call, desk) for name, call in calls.items()})


def exchanged(p, token, by):
    """A side that sends one token elsewhere, and computes that rightly."""

    class Exchanged(Layer):
        def route(self, logits):
            weights, ids = super().route(logits)
            ids = ids.clone()
            ids[token] = by(logits[token], ids[token])
            weights = torch.softmax(torch.gather(logits, 1, ids.long()).float(), dim=-1)
            return weights.to(logits.dtype), ids

    return Exchanged(p.config)


def to_the_worst(logits_E, ids_K):
    return torch.cat([ids_K[:-1], logits_E.argmin(keepdim=True).to(ids_K.dtype)])


def test_judge_of_a_side_with_one_wrong_expert_fails_and_names_the_token_and_nothing_else():
    p = problem("swiglu", tokens=16, dim=32, moe_inter_dim=24)
    layer = judged(p, right=Layer(p.config), wrong=exchanged(p, 5, to_the_worst))
    assert counts(layer.routing["right"]) == (16, 0, 0, PASS)
    for column in ("wrong", "right~wrong"):
        assert (counts(layer.routing[column]), layer.routing[column].examples) == ((15, 0, 1, FAIL), (5,))
    assert layer.verdict == FAIL and all(row.verdict == PASS for row in layer.rows)
    assert [fault.partition(":")[0] for fault in layer.faults] == ["ids, wrong", "ids, right~wrong"]
    assert all("tokens 5" in fault for fault in layer.faults)
    assert sum(layer.load["wrong"]) == sum(layer.load["reference"]) and layer.load["wrong"] != layer.load["reference"]


def test_judge_refuses_experts_that_are_out_of_range():
    p = problem("swiglu", tokens=8, dim=32, moe_inter_dim=24)

    def outside(x, w):
        return {**Layer(p.config)(x, w), "ids": torch.full((8, 4), 16)}

    with pytest.raises(ConfigError, match=r"\[16, 16, 16, 16\] at token 0") as caught:
        judged(p, mine=outside)
    assert "experts 0 to 15 of side 'mine'" in caught.value.asked


def test_judge_of_a_side_that_hides_its_experts_counts_where_every_token_is_settled():
    p = of_logits([SEPARATE] * 3)
    layer = judged(p, mine=lambda x, w: Layer(p.config)(x, w)["output"])
    assert layer.row("output").whole["mine"].counts and not layer.notes and layer.verdict == PASS
    assert layer.routing == {} and layer.load.keys() == {"reference"}


def test_judge_of_a_side_that_hides_its_experts_informs_where_a_token_is_open():
    p = of_logits([SEPARATE, [4.0, 1.0, 3.0, 3.0]])
    layer = judged(p, mine=lambda x, w: 0 * Layer(p.config)(x, w)["output"])
    scores = [row.whole["mine"] for row in layer.rows]
    assert any(score.verdict == FAIL for score in scores) and not any(score.counts for score in scores)
    assert layer.verdict == PASS and "for 1 tokens rounding may choose others" in layer.notes[0]
