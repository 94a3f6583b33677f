"""Who computes: every kind of side turns one problem into an answer, or says why it cannot."""

from __future__ import annotations

import automodel
import numpy as np
import problems
import pytest
import tiny
import torch

from moebius.compare import sides
from moebius.compare.hidden import quiet
from moebius.compare.judge import judge
from moebius.compare.numerics import report
from moebius.compare.sides import answer as answers
from moebius.compare.sides import flax_side, torch_side
from moebius.compare.sides.answer import Desk
from moebius.compare.sides.precise import precise
from moebius.compare.verdict import FAIL, PASS
from moebius.core.errors import BackendUnavailable, CheckpointError, ConfigError, Unsupported

SMALL = {"n_routed_experts": 4, "n_activated_experts": 2, "dim": 32, "moe_inter_dim": 24, "tokens": 16}
SIXTEEN = ("bfloat16", "float16")


def small(name="swiglu", dtype="float32", **changes):
    return problems.problem(name, dtype, **{**SMALL, **changes})


def judged(p, *names):
    """What is found of sides given by name."""
    with Desk() as desk:
        return judge(p, {name: problems.answer(p, name, desk) for name in names})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        for name in ("qwen3_moe", "gpt_oss", "deepseek_v3"):
            tiny.write(name, home / name)
    return home


# ---------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("text", "kind", "backend", "device"),
    [
        ("torch", "torch", None, None),
        ("torch:grouped_mm@cuda", "torch", "grouped_mm", "cuda"),
        ("flax@gpu:1", "flax", None, "gpu:1"),
        ("flax:ragged_dot", "flax", "ragged_dot", None),
        ("automodel:torch_mm", "automodel", "torch_mm", None),
        ("reference", "reference", None, None),
    ],
)
def test_parse_a_name_gives_kind_backend_and_device(text, kind, backend, device):
    (side,) = sides.parse(text)
    assert side == sides.Side(name=text, kind=kind, backend=backend, device=device)


def test_parse_a_mapping_names_the_columns_and_callables_alone_come_after_both_frontends():
    named = sides.parse({"ours": "torch:loop", "theirs": "flax"})
    assert [(side.name, side.kind, side.backend) for side in named] == [
        ("ours", "torch", "loop"),
        ("theirs", "flax", None),
    ]
    assert [side.name for side in sides.parse({"mine": print})] == ["torch", "flax", "mine"]
    assert [side.name for side in sides.parse({"mine": print, "torch": "torch"})] == ["mine", "torch"]


@pytest.mark.parametrize(
    "asked",
    [
        [],
        {},
        5,
        [print],
        ["torch", "torch"],
        "jax",
        "torch:",
        "torch@",
        "torch@cpu:loop@cpu:",
        "transformers@cpu",
        "reference:loop",
        {"mine": 5},
        {"": print},
        {"a~b": print},
        {"torch": print},
        {"reference": "torch"},
        {"flax:loop": "torch:loop"},
        {"automodel": print},
    ],
)
def test_parse_refuses_what_names_no_side_or_misleads(asked):
    with pytest.raises((ConfigError, BackendUnavailable)) as caught:
        sides.check(sides.parse(asked), small().config, "float32")
    assert all((caught.value.asked, caught.value.found, caught.value.do))


# -------------------------------------------------------------------------------------------------------- own frontends
def test_backends_that_are_named_are_used_and_agree():
    p = small("gpt_oss")
    assert torch_side.build(p, "loop").backend.experts == "loop"
    assert flax_side.build(p, flax_side.on("cpu"), "ragged_dot").backend.experts == "ragged_dot"
    layer = judged(p, "torch:loop", "flax:ragged_dot")
    assert layer.columns == ("torch:loop", "flax:ragged_dot", "torch:loop~flax:ragged_dot")
    assert layer.verdict == PASS, layer.faults
    whole = [row.name for row in layer.rows if row.whole.keys() == set(layer.columns)]
    assert len(whole) == len(layer.rows) and {"grad.x", "grad.experts.down_proj_bias"} <= set(whole)


@pytest.mark.parametrize(
    ("side", "error"),
    [
        ("torch:te@cpu", (BackendUnavailable, Unsupported)),
        ("flax:te", (BackendUnavailable, Unsupported)),
        ("torch:ragged_dot", ConfigError),
        ("flax:nonsense", ConfigError),
        ("torch@moon", BackendUnavailable),
        ("torch@meta", BackendUnavailable),
        ("flax@moon", BackendUnavailable),
        ("flax@cpu:99", BackendUnavailable),
        ("flax@cpu:x", BackendUnavailable),
    ],
)
def test_check_refuses_a_backend_or_device_that_cannot_be_used(side, error):
    with pytest.raises(error):
        sides.check(sides.parse(side), small().config, "float32")


def test_torch_side_leaves_the_problem_as_it_was():
    p = small()
    before = {name: value.clone() for name, value in p.parameters.items()}
    judged(p, "torch")
    for name, value in p.parameters.items():
        assert torch.equal(value, before[name]) and value.grad is None and not value.requires_grad


MATMUL, ONEDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
SETTINGS = {
    "nothing": lambda: None,
    "precision medium": lambda: torch.set_float32_matmul_precision("medium"),
    "the older switch": lambda: setattr(MATMUL, "allow_tf32", True),
    "the newer switch": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "oneDNN's switch": lambda: setattr(ONEDNN, "fp32_precision", "bf16"),
}


def switches():
    """torch's switches; None where torch refuses to tell, since older and newer ones differ."""
    found = [MATMUL.fp32_precision, ONEDNN.fp32_precision, MATMUL.allow_bf16_reduced_precision_reduction]
    for read in (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


@pytest.fixture
def restored():
    """Afterwards torch's switches are what they were."""
    before = [switch.fp32_precision for switch in (MATMUL, ONEDNN)]
    yield
    for switch in (MATMUL, ONEDNN):
        switch.fp32_precision = "ieee"  # older and newer agree again
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision, ONEDNN.fp32_precision = before


@pytest.mark.parametrize("setting", SETTINGS)
def test_precise_is_exact_whatever_was_set_and_puts_it_back(setting, restored):
    SETTINGS[setting]()
    before = switches()
    with precise():
        assert switches() == ["ieee", "ieee", False, False, "highest"]
    assert switches() == before


def test_run_puts_a_frameworks_own_error_in_words(monkeypatch):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch_side, "trace", full)
    with pytest.raises(Unsupported, match="can't allocate memory") as caught:
        judged(small(), "torch")
    assert "16 tokens" in caught.value.asked and "fewer tokens" in caught.value.do


@pytest.mark.parametrize("name", ["gpt_oss", "latent"])
def test_large_tensors_on_disk_give_the_same_numbers(monkeypatch, name):
    p = small(name)
    held = judged(p, "torch@cpu", "torch:loop@cpu")
    monkeypatch.setattr(answers, "_LARGE", 1000)  # the routing weights have less
    with Desk() as desk:
        spilled = problems.answer(p, "torch@cpu", desk)
        folder = spilled.tensors["up"].file.parent
        assert folder.is_dir()
        assert judge(p, {"torch@cpu": spilled, "torch:loop@cpu": problems.answer(p, "torch:loop@cpu", desk)}) == held
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------------------ reference
@pytest.mark.parametrize("dtype", ["float32", *SIXTEEN])
@pytest.mark.parametrize("name", problems.CONFIGS)
def test_reference_is_off_by_float64_rounding_alone(name, dtype):
    """Against what a float32 or 16-bit run may be off by, that is next to nothing; the noise model repeats it."""
    layer = judged(small(name, dtype), "reference")
    assert layer.verdict == PASS and {"output", "grad.x", "grad.gate.weight"} <= {row.name for row in layer.rows}
    for row in layer.rows:
        score = row.whole["reference"]
        assert score.z_max < 1e-6 and score.relative < 1e-13, row.name
    output = layer.row("output").whole["reference"]
    assert output.equal > 0.1 and output.predicted > 1e-8  # equal in float64, not rounded first


def test_reference_as_the_first_side_pairs_with_the_next():
    layer = judged(small(), "reference", "torch")
    assert layer.columns == ("reference", "torch", "reference~torch") and layer.verdict == PASS


# --------------------------------------------------------------------------------------------------------- transformers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_counts_in_float32_and_informs_in_16_bits(folders, dtype):
    found = report(folders / "qwen3_moe", dtype=dtype, tokens=16, sides=["torch", "transformers"])
    (layer,) = found.layers
    scores = [score for row in layer.rows for column, score in row.whole.items() if column == "transformers"]
    assert scores and {score.counts for score in scores} == {dtype == "float32"}
    assert layer.routing["transformers"].counts == (dtype == "float32")
    assert any("information" in note for note in layer.notes) == (dtype != "float32")
    assert "torch~transformers" not in layer.columns and found.passed


def test_transformers_that_differs_fails_the_report_in_float32_alone(folders, monkeypatch):
    """Its block here is one whose experts were exchanged on the way in."""
    from moebius.compare.subject import Checkpoint

    original = Checkpoint.block

    def exchanged(self, index, p):
        (block, *rest), notes = original(self, index, p)
        with torch.no_grad():
            block.experts.down_proj.copy_(block.experts.down_proj.roll(1, 0))
        return (block, *rest), notes

    monkeypatch.setattr(Checkpoint, "block", exchanged)
    for dtype, passed in (("float32", False), ("bfloat16", True)):
        found = report(folders / "qwen3_moe", dtype=dtype, tokens=16, sides=["torch", "transformers"])
        assert found.passed == passed
        assert found.layers[0].row("output").whole["transformers"].verdict == FAIL


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("qwen3_moe", None), ("gpt_oss", None), ("gpt_oss", "gate and up de-interleaved"), ("deepseek_v3", None)],
)
def test_transformers_on_hidden_states_holds_our_weights_and_says_so(folders, name, recipe):
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    found = report(folders / name, hidden=x, recipe=recipe, sides=["torch", "transformers"])
    (layer,) = found.layers
    assert found.verdict == PASS, found.faults
    assert any("how the checkpoint is read is not checked" in note for note in layer.notes)
    assert all("transformers" in row.whole for row in layer.rows if row.name.startswith("grad.experts."))
    assert layer.row("output").whole["transformers"].n == 12 * 32


def test_transformers_without_a_checkpoint_is_refused():
    with pytest.raises(ConfigError, match="no checkpoint"):
        judged(small(), "transformers")


def test_transformers_block_with_a_tensor_that_no_recipe_names_is_refused(folders, monkeypatch):
    from moebius.compare.sides import transformers_side

    pieces_of = transformers_side.pieces_of
    monkeypatch.setattr(transformers_side, "pieces_of", lambda *a: dict(list(pieces_of(*a).items())[1:]))
    with pytest.raises(CheckpointError, match=r"gate\.weight"):
        report(folders / "qwen3_moe", hidden=torch.ones(3, 32), sides=["torch", "transformers"])


# ------------------------------------------------------------------------------------------------------------ automodel
def test_automodel_without_the_package_is_unavailable(monkeypatch):
    automodel.remove(monkeypatch)
    with pytest.raises(BackendUnavailable, match="nemo_automodel"):
        sides.check(sides.parse("automodel"), small().config, "float32")
    with pytest.raises(BackendUnavailable, match="nemo_automodel"):
        judged(small(), "automodel")


@pytest.mark.parametrize("name", ["swiglu", "gpt_oss", "weight_after", "deepseek"])
def test_automodel_of_the_same_mathematics_passes(monkeypatch, name):
    automodel.install(monkeypatch)
    layer = judged(small(name), "torch", "automodel")
    assert layer.verdict == PASS, layer.faults
    compared = {row.name for row in layer.rows if "automodel" in row.whole}
    assert {f"grad.{p}" for p in small(name).parameters} | {"logits", "weights", "output", "grad.x"} <= compared
    assert "up" not in compared and layer.columns == ("torch", "automodel")


@pytest.mark.parametrize("dtype", ["float32", *SIXTEEN])
def test_automodel_of_other_mathematics_fails_in_float32_and_informs_in_16_bits(monkeypatch, dtype):
    automodel.install(monkeypatch, type("Swapped", (automodel.GroupedExperts,), {"swap_halves": True}))
    layer = judged(small(dtype=dtype), "torch", "automodel")
    assert layer.row("output").whole["automodel"].verdict == FAIL
    assert layer.verdict == (FAIL if dtype == "float32" else PASS)


def test_automodel_gets_the_backend_that_was_named_or_none(monkeypatch):
    automodel.install(monkeypatch)
    asked, init = [], automodel.GroupedExperts.__init__
    record = lambda self, config, backend=None: asked.append(backend) or init(self, config, backend)  # noqa: E731
    monkeypatch.setattr(automodel.GroupedExperts, "__init__", record)
    judged(small(), "automodel", "automodel:torch_mm")
    assert asked[0] is None and (asked[1].experts, asked[1].compile_router_weight) == ("torch_mm", False)
    with pytest.raises(ConfigError, match="nonsense"):
        sides.check(sides.parse("automodel:nonsense"), small().config, "float32")


def test_automodel_of_another_version_is_unavailable(monkeypatch):
    automodel.install(monkeypatch, experts=lambda config: None)
    with pytest.raises(BackendUnavailable, match="another version"):
        judged(small(), "automodel")


def test_equal_counts_what_a_side_rounds_as_the_exact_value_would():
    layer = judged(small(dtype="bfloat16"), "torch")
    found = np.array([row.whole["torch"].equal for row in layer.rows if row.name == "rows"])
    assert found.tolist() == [1.0]
