"""The demo: it exercises what it claims to, and it goes red for the faults that such a comparison is for."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moebius import jax_frontend, torch_frontend
from moebius.compare import demo, sides
from moebius.compare.clamp import _hidden as pre_activations
from moebius.compare.clamp import clamped
from moebius.compare.hidden import hidden, quiet
from moebius.compare.judge import Judge
from moebius.compare.text import own
from moebius.compare.verdict import PAIRS
from moebius.core import BackendConfig
from moebius.jax_frontend import MoE as FlaxMoE
from moebius.torch_frontend.checkpoint import load_moe

FAMILIES = ("qwen3_moe", "gpt_oss")
# Words that stay as they are: in another text a pre-activation may lie at the clamp's limit and widen the bounds.
TEXT = "A strip of paper, given half a twist and closed, has one side: who walks along it comes by every place. " * 2


class Prepared:
    """One checkpoint with everything that a comparison in float32 needs, computed once."""

    def __init__(self, folder):
        self.folder, self.layer = folder, load_moe(folder)
        self.block = hidden(folder, 0, TEXT, 128)
        self.problem = sides.problem(self.layer, self.block.x_TD, "float32", 0)
        self.judge = Judge(self.problem)
        self.torch = sides.run_torch(self.layer, self.problem)
        self.flax = sides.run_flax(sides.flax_layer(self.layer), self.problem)

    def rows(self, torch_answer=None, flax_answer=None):
        return self.judge.rows(torch_answer or self.torch, flax_answer or self.flax)

    def torch_with(self, **changed):
        """The answer of a torch layer with some parameters changed, the reference keeping the checkpoint's."""
        faulty = load_moe(self.folder)
        values = torch_frontend.parameters(faulty)
        for name, change in changed.items():
            values[name.replace("__", ".")].copy_(change(values[name.replace("__", ".")].clone()))
        return sides.run_torch(faulty, self.problem)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    with quiet():
        folders = {"qwen3_moe": demo.write_qwen3_moe(home / "qwen3_moe")}
        folders["gpt_oss"], _ = demo.write_gpt_oss(home / "gpt_oss", TEXT)
    return {name: Prepared(folder) for name, folder in folders.items()}


def red(rows, pair):
    """Names of the rows that fail for a pair of sides."""
    return {row.name for row in rows if not row.errors[pair].passed}


def test_demo_prints_two_tables_and_passes(tmp_path, capsys):
    assert demo.demo(tmp_path)
    out = capsys.readouterr().out
    assert out.count("verdict     inside the bounds") == 2
    assert "clamped     4.0% of the pre-activations" in out
    assert "2 of 2 checkpoints inside the bounds" in out
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith("checkpoint"))


def test_demo_main_gives_the_exit_code(monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo"])
    for passed, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(demo, "demo", lambda folder, passed=passed: passed)
        assert demo.main() == code


def test_demo_gpt_oss_has_biases_everywhere(prepared):
    stored = load_file(prepared["gpt_oss"].folder / "model.safetensors")
    biases = [tensor for name, tensor in stored.items() if ".mlp." in name and "bias" in name]
    assert len(biases) == 2 * 3
    assert all((tensor != 0).all() for tensor in biases)


def test_demo_gpt_oss_clamps_one_to_ten_percent_in_every_layer(tmp_path):
    with quiet():
        folder, shares = demo.write_gpt_oss(tmp_path, own()[0])
    assert len(shares) == 2
    for layer, share in enumerate(shares):
        moe = load_moe(folder, layer)
        problem = sides.problem(moe, hidden(folder, layer, own()[0], 256).x_TD, "float32", 0)
        found = clamped(problem, sides.run_reference(problem).ids_TK).share
        assert 0.01 <= found <= 0.10
        assert found == pytest.approx(share, abs=1e-4)  # what the demo prints is what the block sees


def test_demo_qwen_has_no_clamp_to_report(prepared):
    p = prepared["qwen3_moe"]
    assert clamped(p.problem, p.torch.ids_TK) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_judged_gives_a_finite_verdict_for_the_output_and_every_gradient(prepared, family):
    """No vacuous pass: every pair has a row, a bound that is small against the tensor, and a tensor that is not 0."""
    p = prepared[family]
    rows = {row.name: row for row in p.rows()}
    assert rows.keys() == {"output", "x", *p.problem.parameters}
    for row in rows.values():
        assert row.passed and tuple(row.errors) == PAIRS
        for error in row.errors.values():
            assert 0 < error.bound < 1e-4 and 0 < error.largest_bound < np.inf
    assert all(np.linalg.norm(value) > 0 for value in sides.run_reference(p.problem).tensors.values())


def swap_halves(layer):
    """A first projection with gate and up exchanged, as a loader with the wrong order would give."""

    def swapped(weight):
        if layer.config.activation.interleaved:
            return weight.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.cat(weight.chunk(2, dim=-1)[::-1], dim=-1)

    return swapped


@pytest.mark.parametrize("family", FAMILIES)
def test_judged_gate_and_up_swapped_in_torch_is_red(prepared, family):
    p = prepared[family]
    rows = p.rows(torch_answer=p.torch_with(experts__gate_and_up_projs=swap_halves(p.layer)))
    assert "output" in red(rows, "torch~reference") & red(rows, "torch~flax")
    assert not red(rows, "flax~reference")


def test_judged_gate_and_up_swapped_in_flax_is_red(prepared):
    p = prepared["qwen3_moe"]
    values = {name: value.clone() for name, value in torch_frontend.parameters(p.layer).items()}
    name = "experts.gate_and_up_projs"
    values[name] = swap_halves(p.layer)(values[name])
    flax = sides.flax_layer(p.layer)
    jax_frontend.load_parameters(flax, {name: sides.to_jax(value) for name, value in values.items()})
    rows = p.rows(flax_answer=sides.run_flax(flax, p.problem))
    assert "output" in red(rows, "flax~reference") & red(rows, "torch~flax")
    assert not red(rows, "torch~reference")


FAULTS = {
    "a down bias that is forgotten": ("gpt_oss", "experts__down_proj_bias", torch.zeros_like),
    "an up bias that is forgotten": ("gpt_oss", "experts__gate_up_proj_bias", torch.zeros_like),
    "one expert's weight 5 % up": ("qwen3_moe", "experts__down_projs", lambda w: w.index_fill_(0, _LAST, 0) + w),
    "one single weight 5 % up": ("qwen3_moe", "experts__down_projs", lambda w: _one_weight_up(w)),
    "two experts exchanged": ("qwen3_moe", "experts__gate_and_up_projs", lambda w: w[_EXCHANGED]),
    "parameters rounded to bfloat16": ("qwen3_moe", "experts__down_projs", lambda w: w.bfloat16().float()),
    "a router bias that is forgotten": ("gpt_oss", "gate__bias", torch.zeros_like),
}
_LAST = torch.tensor([15])
_EXCHANGED = [1, 0, *range(2, 16)]


def _one_weight_up(weight):
    weight[3, 5, 7] *= 1.05
    return weight


@pytest.mark.parametrize("fault", FAULTS)
def test_judged_faulty_parameters_are_red(prepared, fault):
    family, name, change = FAULTS[fault]
    p = prepared[family]
    answer = p.torch_with(**{name: change})
    rows = p.rows(torch_answer=answer)
    assert "output" in red(rows, "torch~reference") & red(rows, "torch~flax")


def test_judged_bias_without_its_routing_weight_is_red(prepared, monkeypatch):
    """The down bias has to be weighted like the output that it belongs to."""
    module = sys.modules["moebius.torch_frontend.experts"]  # the package's `experts` is the function
    p, original = prepared["gpt_oss"], module.add_bias
    monkeypatch.setattr(module, "add_bias", lambda out, bias, experts, weights=None: original(out, bias, experts))
    rows = p.rows(torch_answer=sides.run_torch(p.layer, p.problem))
    assert "output" in red(rows, "torch~reference")


def test_judged_router_in_bfloat16_is_red(prepared):
    """One step in a narrower dtype than the rest: the weights, and all that hangs on them, are off."""
    p = prepared["qwen3_moe"]
    backend = BackendConfig(gate_precision="bfloat16")
    narrow = torch_frontend.MoE(p.layer.config, backend)
    torch_frontend.load_parameters(narrow, torch_frontend.parameters(p.layer))
    rows = p.rows(torch_answer=sides.run_torch(narrow, p.problem))
    assert {"output", "gate.weight"} <= red(rows, "torch~reference")


def test_judged_experts_in_bfloat16_are_red(prepared):
    from flax import nnx

    p = prepared["gpt_oss"]
    narrow = FlaxMoE(p.layer.config, dtype="bfloat16", rngs=nnx.Rngs(0))
    jax_frontend.load_parameters(narrow, jax_frontend.parameters(sides.flax_layer(p.layer)))
    problem = replace(p.problem, dtype="bfloat16")
    rows = p.rows(flax_answer=sides.run_flax(narrow, problem))
    assert red(rows, "flax~reference") == {row.name for row in rows}


def test_judged_a_gradient_that_never_came_is_red(prepared):
    p = prepared["qwen3_moe"]
    layer = load_moe(p.folder)
    layer.experts.down_projs.requires_grad_(False)
    rows = p.rows(torch_answer=sides.run_torch(layer, p.problem))
    assert red([row for row in rows if row.name != "experts.down_projs"], "torch~reference") == set()
    (row,) = [row for row in rows if row.name == "experts.down_projs"]
    assert not row.passed and not row.errors["torch~reference"].passed


def test_judged_nan_is_red(prepared):
    p = prepared["qwen3_moe"]
    broken = {**p.torch.tensors, "x": np.where(np.arange(128)[:, None] == 3, np.nan, p.torch.tensors["x"])}
    rows = p.rows(torch_answer=replace(p.torch, tensors=broken))
    assert red(rows, "torch~reference") == red(rows, "torch~flax") == {"x"}


def test_loading_of_a_block_that_transformers_reads_otherwise_is_red(prepared):
    p = prepared["qwen3_moe"]
    assert p.judge.loading(p.block.y_TD, p.torch.ids_TK).passed
    weight = p.problem.parameters["experts.gate_and_up_projs"]
    swapped = np.concatenate(np.split(weight, 2, axis=-1)[::-1], axis=-1)
    misread = replace(p.problem, parameters={**p.problem.parameters, "experts.gate_and_up_projs": swapped})
    assert not Judge(misread).loading(p.block.y_TD, p.torch.ids_TK).passed


def test_agreement_counts_a_tie_as_explained_and_a_wrong_expert_as_not(prepared):
    p = prepared["qwen3_moe"]
    ids = p.torch.ids_TK
    logits = p.problem.x_TD @ p.problem.parameters["gate.weight"].T
    last, worst = ids[0, -1], int(np.argmin(logits[0]))
    flipped = ids.copy()
    flipped[0, -1] = worst
    found = p.judge.agreement(ids, flipped)
    assert (found.equal, found.ties, found.unexplained, found.passed) == (127, 0, 1, False)
    # the same flip between two experts whose router weights are all but equal
    gate = p.problem.parameters["gate.weight"].copy()
    gate[worst] = gate[last] * (1 + 2.0**-26)
    near = replace(p.problem, parameters={**p.problem.parameters, "gate.weight": gate})
    found = Judge(near).agreement(ids, flipped)
    assert (found.equal, found.ties, found.unexplained, found.passed) == (127, 1, 0, True)


def test_agreement_ignores_the_order_of_the_slots(prepared):
    p = prepared["qwen3_moe"]
    assert p.judge.agreement(p.torch.ids_TK, p.torch.ids_TK[:, ::-1]).equal == 128


def test_judged_routing_flip_does_not_swamp_the_arithmetic(prepared):
    """One side sends a token elsewhere and computes that rightly: routing is red, arithmetic is not."""
    p = prepared["qwen3_moe"]
    ids = p.torch.ids_TK.copy()
    ids[0, -1] = next(expert for expert in range(16) if expert not in ids[0])
    exact = sides.run_reference(p.problem, ids)
    rows = p.rows(flax_answer=exact)
    assert all(row.passed for row in rows)
    assert not p.judge.agreement(p.torch.ids_TK, ids).passed


def test_judged_a_pre_activation_at_the_limit_may_fall_on_either_side(prepared):
    """Clamped or not, its gradient differs by all of it; within the noise both are right."""
    p = prepared["gpt_oss"]
    ids = p.torch.ids_TK
    limit = p.problem.config.activation_limit
    hidden_RU = pre_activations(p.problem, ids)
    nearest = float(hidden_RU.flat[np.argmin(np.abs(hidden_RU - limit))])
    at = replace(p.problem, config=replace(p.problem.config, activation_limit=nearest))
    above = replace(at, config=replace(at.config, activation_limit=nearest * (1 + 2.0**-24)))
    below = replace(at, config=replace(at.config, activation_limit=nearest * (1 - 2.0**-24)))
    rows = Judge(at).rows(sides.run_reference(above, ids), sides.run_reference(below, ids))
    assert all(row.passed for row in rows)


def test_judged_bounds_allow_for_a_flip_that_no_draw_of_the_noise_met(prepared, monkeypatch):
    """Four deviations off the limit eight draws rarely cross it, yet a right run may."""
    p = prepared["gpt_oss"]
    ids, limit = p.torch.ids_TK, p.problem.config.activation_limit
    hidden_RU = pre_activations(p.problem, ids)
    nearest = float(hidden_RU.flat[np.argmin(np.abs(hidden_RU - limit))])
    near = nearest + 4 / 6 * clamped(p.problem, ids).noise
    problem = replace(p.problem, config=replace(p.problem.config, activation_limit=near))
    assert clamped(problem, ids).undecided >= 1
    answer = sides.run_reference(problem, ids)
    allowing = {row.name: row.errors["torch~reference"].bound for row in Judge(problem).rows(answer, answer)}
    monkeypatch.setattr("moebius.compare.judge.moved", lambda problem, found: [])
    drawn = {row.name: row.errors["torch~reference"].bound for row in Judge(problem).rows(answer, answer)}
    assert allowing["x"] > 10 * drawn["x"]
    assert allowing["output"] < 2 * drawn["output"]  # the output is continuous at the limit
