"""The demo: it exercises what it claims to, and it goes red for the faults that such a comparison is for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

# isort: split
import problems

from moebius import torch_frontend
from moebius.compare import demo
from moebius.compare.hidden import Model, quiet
from moebius.compare.judge import judge
from moebius.compare.problem import Problem, rounded, upstream
from moebius.compare.sides.answer import Desk
from moebius.compare.text import own
from moebius.compare.verdict import FAIL, PASS
from moebius.core import BackendConfig
from moebius.torch_frontend.checkpoint import load_moe

# Words that stay as they are: in another text more pre-activations may lie at the clamp's limit.
TEXT = "A strip of paper, given half a twist and closed, has one side: who walks along it comes by every place. " * 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("demo")
    with quiet():
        found = {"qwen3_moe": demo.write_qwen3_moe(home / "qwen3_moe")}
        found["deepseek_v3"] = demo.write_deepseek_v3(home / "deepseek_v3")
        found["gpt_oss"], _ = demo.write_gpt_oss(home / "gpt_oss", TEXT)
    return found


@pytest.fixture(scope="module")
def prepared(folders):
    """family -> the first MoE block's problem in float32, on its real input."""
    return {family: problem_of(folders[family]) for family in ("qwen3_moe", "gpt_oss")}


def problem_of(folder, layer=0, text=TEXT, tokens=128):
    x_TD = Model(folder, [layer], text, tokens).inputs[layer]
    module = load_moe(folder, layer, dtype="float32")
    return Problem(
        config=module.config,
        dtype="float32",
        x_TD=rounded(x_TD, "float32"),
        dy_TD=upstream(x_TD.shape, "float32", 0),
        parameters=torch_frontend.parameters(module),
    )


def judged(p, side):
    with Desk() as desk:
        return judge(p, {"mine": problems.answer(p, side, desk)})


def layer_with(p, backend=None, **changed):
    """moebius' layer with some parameters changed, the problem keeping its own."""
    layer = torch_frontend.MoE(p.config, backend)
    torch_frontend.load_parameters(layer, p.parameters)
    values = torch_frontend.parameters(layer)
    for name, change in changed.items():
        value = values[name.replace("__", ".")]
        value.copy_(change(value.clone()))
    return layer


def red(layer, kind):
    """Rows that fail from the layer's input on ("whole") or by themselves ("step")."""
    return {row.name for row in layer.rows if any(s.verdict == FAIL for s in getattr(row, kind).values())}


@pytest.mark.slow
def test_demo_compares_three_checkpoints_finds_the_seeded_fault_and_writes_figure_and_page(tmp_path, capsys):
    assert demo.demo(tmp_path)
    out = capsys.readouterr().out
    assert out.count("verdict     pass") == 3
    assert "clamped     4.0% of the pre-activations" in out
    assert "3 of 3 checkpoints pass; the seeded fault is found" in out
    assert "activation, faulty" in out
    assert (tmp_path / "gpt_oss.png").stat().st_size > 20_000
    assert "<html" in (tmp_path / "gpt_oss.html").read_text()
    allowed = ("checkpoint", "figure and page")
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith(allowed))


def test_demo_main_gives_the_exit_code(monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo"])
    for passed, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(demo, "demo", lambda folder, passed=passed: passed)
        assert demo.main() == code


def test_demo_gpt_oss_has_biases_everywhere(folders):
    stored = load_file(folders["gpt_oss"] / "model.safetensors")
    biases = [tensor for name, tensor in stored.items() if ".mlp." in name and "bias" in name]
    assert len(biases) == 2 * 3
    assert all((tensor != 0).all() for tensor in biases)


def test_demo_deepseek_has_groups_shared_experts_and_a_correction_bias(folders):
    layer = load_moe(folders["deepseek_v3"])
    c = layer.config
    assert (c.score_func, c.n_expert_groups, c.n_limited_groups, c.n_shared_experts) == ("sigmoid_with_bias", 4, 2, 1)
    assert (layer.gate.e_score_correction_bias != 0).all()


def test_demo_gpt_oss_clamps_one_to_ten_percent_in_every_layer(tmp_path):
    with quiet():
        folder, shares = demo.write_gpt_oss(tmp_path, own()[0])
    assert len(shares) == 2
    for index, share in enumerate(shares):
        found = judged(problem_of(folder, index, own()[0], 256), "torch").clamped.share
        assert 0.01 <= found <= 0.10
        assert found == pytest.approx(share, abs=1e-4)  # what the demo prints is what the block sees


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_judge_gives_a_finite_score_for_every_stage_and_gradient(prepared, family):
    """No vacuous pass: every row has elements, a deviation that is small against the tensor, and a tensor not 0."""
    p = prepared[family]
    layer = judged(p, "torch")
    assert layer.verdict == PASS
    assert {"output", "grad.x", *(f"grad.{name}" for name in p.parameters)} <= {row.name for row in layer.rows}
    assert (layer.clamped is not None) == (family == "gpt_oss")
    for row in layer.rows:
        (score,) = row.whole.values()
        assert score.n > 0 and score.bad == 0
        assert 0 < score.predicted < 1e-4 or row.name in ("rows", "grad.down")


def swapped(weight):
    return torch.cat(weight.chunk(2, dim=-1)[::-1], dim=-1)


FAULTS = {
    "gate and up swapped": ("qwen3_moe", "experts__gate_and_up_projs", swapped, "up"),
    "a down bias that is forgotten": ("gpt_oss", "experts__down_proj_bias", torch.zeros_like, "down"),
    "an up bias that is forgotten": ("gpt_oss", "experts__gate_up_proj_bias", torch.zeros_like, "up"),
    "one expert's weight up": ("qwen3_moe", "experts__down_projs", lambda w: w * _EXPERT_UP, "down"),
    "one single weight 5 % up": ("qwen3_moe", "experts__down_projs", lambda w: _one_weight_up(w), "down"),
    "two experts exchanged": ("qwen3_moe", "experts__gate_and_up_projs", lambda w: w[_EXCHANGED], "up"),
    "parameters rounded": ("qwen3_moe", "experts__down_projs", lambda w: w.bfloat16().float(), "down"),
    "a router bias that is forgotten": ("gpt_oss", "gate__bias", torch.zeros_like, "logits"),
}
_EXPERT_UP = torch.ones(16, 1, 1).index_fill_(0, torch.tensor([15]), 1.001)
_EXCHANGED = [1, 0, *range(2, 16)]


def _one_weight_up(weight):
    weight[3, 5, 7] *= 1.05
    return weight


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_parameters_are_red_first_where_they_are_used(prepared, fault):
    family, name, change, stage = FAULTS[fault]
    layer = judged(prepared[family], layer_with(prepared[family], **{name: change}))
    assert "output" in red(layer, "whole")
    assert next(row.name for row in layer.rows if row.name in red(layer, "step")) == stage


def test_a_router_in_bfloat16_is_red_at_the_logits(prepared):
    """One step in a narrower dtype than the rest: the weights, and all that hangs on them, are off."""
    p = prepared["qwen3_moe"]
    layer = judged(p, layer_with(p, BackendConfig(gate_precision="bfloat16")))
    assert "logits" in red(layer, "step") and {"output", "grad.gate.weight"} <= red(layer, "whole")


def test_a_gradient_that_never_came_is_noted_and_not_passed_over(prepared):
    p = prepared["qwen3_moe"]
    module = layer_with(p)
    module.experts.down_projs.requires_grad_(False)
    layer = judged(p, module)
    assert layer.notes == ("mine gives no gradient of experts.down_projs: not compared",)
    assert "grad.experts.down_projs" not in {row.name for row in layer.rows}


def test_nan_is_red_and_counted(prepared):
    p = prepared["qwen3_moe"]
    with Desk() as desk:
        answer = problems.answer(p, "torch", desk)
        broken = np.where(np.arange(p.tokens)[:, None] == 3, np.nan, answer.tensors["grad.x"])
        layer = judge(p, {"mine": replace(answer, tensors={**answer.tensors, "grad.x": broken})})
    assert red(layer, "whole") == {"grad.x"} and layer.verdict == FAIL
    assert layer.row("grad.x").whole["mine"].bad == p.config.dim


def test_a_pre_activation_at_the_limit_may_fall_on_either_side(prepared):
    """Clamped or not, its gradient differs by all of it; within the noise both are right."""
    p = prepared["gpt_oss"]
    with Desk() as desk:
        up_RU = problems.answer(p, "torch", desk).tensors["up"].astype(np.float64)
        limit = p.config.activation_limit
        nearest = float(up_RU.flat[np.argmin(np.abs(up_RU - limit))])
        at = replace(p, config=replace(p.config, activation_limit=nearest))
        for factor in (1 + 2.0**-24, 1 - 2.0**-24):
            moved = replace(p, config=replace(p.config, activation_limit=nearest * factor))
            layer = judge(at, {"mine": problems.answer(moved, "reference", desk)})
            assert not red(layer, "whole")
            assert layer.clamped.undecided >= 1
