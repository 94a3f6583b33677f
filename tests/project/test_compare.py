"""The `moebius compare` command: exit codes, JSON, text, files, and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import tiny
import torch
from commands import edit_config, edit_tensors, passed, refused, run
from safetensors.torch import save_file

from moebius.compare import cli, entry, memory, numerics, verdict
from moebius.compare.hidden import quiet
from moebius.compare.numerics import report
from moebius.compare.result import Report
from moebius.core.errors import ConfigError
from moebius.core.families import FAMILIES
from moebius.core.recipes import per_expert

TORCH = ("--side", "torch", "--tokens", 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints of three layers; of the qwen2_moe the first is dense."""
    home = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        for name in ("qwen3_moe", "gpt_oss", "qwen2_moe"):
            tiny.write(name, home / name)
    return home


@pytest.fixture(scope="module")
def qwen(folders):
    return folders / "qwen3_moe"


@pytest.fixture
def damaged(qwen, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(qwen, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A safetensors file of seven hidden states."""
    file = tmp_path_factory.mktemp("states") / "states.safetensors"
    save_file({"anything": torch.randn(7, 32, generator=torch.Generator().manual_seed(0))}, file)
    return file


@pytest.fixture
def swapped(monkeypatch):
    """moebius takes the up projection for the gate's, as a loader with the wrong order would."""
    family = FAMILIES["qwen3_moe"]
    wrong = {next(iter(family.recipes)): per_expert("up_proj", "gate_proj", "down_proj")}
    monkeypatch.setitem(FAMILIES, "qwen3_moe", replace(family, recipes={**family.recipes, **wrong}))


# --------------------------------------------------------------------------------------------------- verdict and output
def test_compare_by_default_runs_both_frontends_and_transformers_and_fits_100_columns(folders, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("One fish, two fish. " * 20)
    done = run(folders / "gpt_oss", "--text", words, "--tokens", 24, "--worst", 3)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    joined = " ".join(done.stdout.split())
    assert "24 tokens of" in joined and "words.txt, by bytes; float32, seed 0" in joined
    assert "torch on cpu, flax on cpu:0, transformers on cpu" in joined
    heads = [line.split()[0] for line in lines if line.split()]
    routing = heads[heads.index("routing") :]
    assert {"torch", "flax", "transformers", "torch~flax"} <= set(routing)
    assert [line for line in lines if line.startswith("gradient of gate.bias")]
    start = next(i for i, line in enumerate(lines) if line.startswith("element of"))
    assert len(lines[start:]) == 2 + 3  # head, rule, the three worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compare_json_is_complete(folders, dtype):
    arguments = ("--dtype", dtype, "--layer", 1, "--tokens", 12, "--seed", 3)
    found = passed(folders / "gpt_oss", "--side", "torch", "--side", "transformers", *arguments)
    assert {field.name for field in fields(Report)} | {"verdict", "passed", "faults"} == found.keys()
    assert (found["dtype"], found["tokens"], found["seed"], found["moe_layers"]) == (dtype, 12, 3, [0, 1, 2])
    assert found["config"]["expert_activation"] == "quick_geglu"
    (layer,) = found["layers"]
    assert {field.name for field in fields(verdict.Layer)} | {"verdict", "faults"} == layer.keys()
    assert layer["index"] == 1 and layer["columns"] == ["torch", "transformers"]
    names = [row["name"] for row in layer["rows"]]
    assert names[:2] == ["logits", "weights"] and {"output", "grad.x", "grad.gate.bias"} <= set(names)
    assert {"grad.experts.gate_up_proj_bias", "grad.experts.down_projs"} <= set(names)
    for row in layer["rows"]:
        scores = [*row["whole"].values(), *row["step"].values()]
        assert row["verdict"] in ("pass", "warn") and scores
        assert all({field.name for field in fields(verdict.Score)} | {"verdict"} == s.keys() for s in scores)
    output = next(row for row in layer["rows"] if row["name"] == "output")
    assert output["whole"]["transformers"]["counts"] == (dtype == "float32")
    assert 0 < output["whole"]["torch"]["relative"] < output["whole"]["torch"]["predicted"] * verdict.FAIL_RMS
    assert layer["routing"].keys() == {"torch", "transformers"}
    assert layer["worst"] and layer["clamped"]["limit"] == 1.0


def test_compare_exits_1_where_the_checkpoint_is_misread_and_says_where(qwen, swapped):
    arguments = (qwen, "--side", "torch", "--side", "transformers", "--tokens", 16)
    done = run(*arguments)
    assert done.exit_code == 1
    assert "output, transformers: fail" in " ".join(done.stdout.split()) and done.stdout.count("FAIL") > 1
    done = run(*arguments, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and (found["verdict"], found["passed"]) == ("fail", False)
    assert all(", transformers" in fault for fault in found["faults"])  # torch is right about the weights it was given
    assert found["layers"][0]["routing"]["transformers"]["verdict"] == "pass"  # the router was not touched


def test_compare_exits_0_with_a_warning(qwen, monkeypatch):
    monkeypatch.setattr(verdict, "WARN_RMS", 0.0)
    done = run(qwen, *TORCH)
    assert done.exit_code == 0
    assert "warn" in done.stdout and "FAIL" not in done.stdout


def test_compare_layer_all_gives_the_error_of_every_moe_layer_against_depth(folders):
    done = run(folders / "qwen2_moe", *TORCH, "--layer", "all")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "layer 1-2 (MoE layers: 1-2)" in " ".join(done.stdout.split())
    rows = [line.split() for line in done.stdout.splitlines()]
    shown = {row[0]: row[-1] for row in rows if row and row[0] in ("1", "2")}
    found = passed(folders / "qwen2_moe", *TORCH, "--layer", "all")
    assert [layer["index"] for layer in found["layers"]] == [1, 2]
    for layer in found["layers"]:
        (output,) = (row["whole"]["torch"] for row in layer["rows"] if row["name"] == "output")
        assert shown[str(layer["index"])] == f"{output['relative']:.1e}"


def test_report_of_all_layers_tells_its_progress(qwen):
    done, said = [], []
    report(qwen, layer="all", tokens=4, sides="torch", progress=lambda *n: done.append(n), say=said.append)
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [line for line in said if "torch" in line and line.startswith("layer ")] == [
        f"layer {index}: torch, forward and backward" for index in range(3)
    ]


def test_report_of_one_layer_is_the_same_alone_and_among_all(qwen):
    alone, among = (report(qwen, layer=layer, tokens=8, sides="torch") for layer in (2, "all"))
    assert alone.layers[0] == among.layers[2]
    other = report(qwen, layer=2, tokens=8, sides="torch", seed=1)
    assert other.layers[0].row("output") == alone.layers[0].row("output")  # the seed is of the upstream gradient
    assert other.layers[0].row("grad.x") != alone.layers[0].row("grad.x")


def test_compare_sides_become_columns_in_their_order(qwen):
    found = passed(qwen, "--side", "torch:loop", "--side", "torch@cpu", "--tokens", 8)
    assert found["layers"][0]["columns"] == ["torch:loop", "torch@cpu", "torch:loop~torch@cpu"]
    assert found["devices"] == {"torch:loop": "cpu", "torch@cpu": "cpu"}


def test_compare_reads_a_recipe_that_was_asked_for(folders):
    name = "gate and up de-interleaved"
    found = passed(folders / "gpt_oss", "--side", "torch", "--side", "transformers", "--tokens", 8, "--recipe", name)
    assert found["recipe"] == name and found["config"]["expert_activation"] == "swigluoai"
    said = refused(folders / "gpt_oss", *TORCH, "--recipe", "nonsense")
    assert "nonsense" in said and name in said


def test_compare_hidden_runs_the_block_on_the_given_states(qwen, states):
    found = passed(qwen, "--side", "torch", "--layer", 1, "--hidden", states)
    assert (found["tokens"], found["text"]) == (7, f"hidden states of {states}")
    assert passed(qwen, "--side", "torch", "--layer", 1, "--hidden", states, "--tokens", 3)["tokens"] == 3


def test_compare_hidden_reads_that_layer_alone(damaged, states):
    """Neither the layers before nor those after, nor the embedding: here they are gone."""
    keep = "model.layers.1.mlp."
    edit_tensors(damaged, lambda t: [t.pop(name) for name in list(t) if not name.startswith(keep)])
    assert passed(damaged, "--side", "torch", "--layer", 1, "--hidden", states)["layers"][0]["index"] == 1


def test_compare_text_needs_no_layer_past_the_block(damaged):
    edit_tensors(damaged, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name or ".layers.2." in name])
    assert passed(damaged, *TORCH)["layers"][0]["index"] == 0


# ---------------------------------------------------------------------------------------------------------------- files
def test_compare_writes_figure_and_page_beside_the_report(qwen, tmp_path):
    plot, html = tmp_path / "figure.svg", tmp_path / "page.html"
    done = run(qwen, *TORCH, "--plot", plot, "--html", html)
    assert done.exit_code == 0, done.output
    assert "verdict" in done.stdout
    assert plot.read_text().rstrip().endswith("</svg>") and html.read_text().rstrip().endswith("</html>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figure.svg", "page.html"]


def test_compare_that_fails_early_leaves_no_file(damaged, tmp_path):
    edit_config(damaged, num_attention_heads="four")
    assert "transformers" in refused(damaged, "--plot", tmp_path / "figure.png", "--html", tmp_path / "page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("option", ["--plot", "--html"])
@pytest.mark.parametrize("name", ["missing/figure.png", "folder.png"])
def test_compare_refuses_a_target_that_cannot_be_written_before_it_runs(qwen, tmp_path, monkeypatch, option, name):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(numerics, "report", lambda *a, **k: pytest.fail("it ran"))
    assert name.split("/")[0] in refused(qwen, option, tmp_path / name)


def test_compare_refuses_a_figure_before_it_runs_where_it_cannot_be_drawn(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "report", lambda *args, **kwargs: pytest.fail("it ran"))
    assert "'.txt'" in refused(qwen, "--plot", tmp_path / "figure.txt")
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert "matplotlib" in refused(qwen, "--plot", tmp_path / "figure.png")
    assert "matplotlib" in refused(qwen, "--html", tmp_path / "page.html")


def test_compare_prints_the_report_although_its_figure_cannot_be_written(qwen, tmp_path, monkeypatch):
    """A disk that fills up meanwhile."""

    def full(found, path):
        raise ConfigError("to write", "no space", "make room")

    monkeypatch.setattr("moebius.compare.plot.save", full)
    done = run(qwen, *TORCH, "--plot", tmp_path / "figure.png")
    assert done.exit_code == 2 and "verdict" in done.stdout and "no space" in done.stderr


# ------------------------------------------------------------------------------------------------------------ bad input
def test_compare_folder_that_is_missing(tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing")


def test_compare_dense_layer_lists_the_moe_layers(folders):
    assert "a dense layer; MoE layers: 1-2" in refused(folders / "qwen2_moe", *TORCH, "--layer", 0)


@pytest.mark.parametrize("layer", ["3", "-1", "first", "--1", "1.0", "²", ""])
def test_compare_layer_that_is_none(qwen, layer):
    assert f"layer {layer}" in refused(qwen, *TORCH, f"--layer={layer}").replace("'", "")


def test_compare_tensors_that_are_missing_are_listed(damaged):
    edit_tensors(damaged, lambda t: [t.pop(f"model.layers.0.mlp.experts.{e}.up_proj.weight") for e in (3, 5)])
    said = refused(damaged, *TORCH)
    assert "experts.3.up_proj.weight" in said and "experts.5.up_proj.weight" in said


def test_compare_tensor_missing_before_the_block(damaged):
    """transformers would draw it at random and go on."""
    edit_tensors(damaged, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "embed_tokens.weight" in refused(damaged, *TORCH)


def test_compare_values_before_the_block_that_are_not_finite(damaged):
    edit_tensors(damaged, lambda tensors: tensors["model.embed_tokens.weight"].fill_(float("nan")))
    assert "inf or nan" in refused(damaged, *TORCH)


def test_compare_parameters_that_are_not_finite(damaged):
    edit_tensors(damaged, lambda tensors: tensors["model.layers.0.mlp.gate.weight"].fill_(float("inf")))
    said = refused(damaged, *TORCH)
    assert "gate.weight" in said and "layer 0" in said


def test_compare_parameters_beyond_float16_name_the_dtype(damaged):
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    edit_tensors(damaged, lambda tensors: tensors[name].fill_(1e6))
    assert "experts.down_projs" in refused(damaged, *TORCH, "--dtype", "float16")
    assert passed(damaged, *TORCH, "--dtype", "bfloat16")


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe\x00"], ids=["missing", "empty", "blank", "bytes"])
def test_compare_text_that_cannot_be_read(qwen, tmp_path, content):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    assert "words.txt" in refused(qwen, *TORCH, "--text", file)


def test_compare_text_that_gives_no_token(damaged, tmp_path):
    """A tokenizer that knows none of its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece({"[PAD]": 0}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("x")
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(damaged)
    (tmp_path / "words.txt").write_text("xxxxx")
    assert "none, by the folder's tokenizer" in refused(damaged, *TORCH, "--text", tmp_path / "words.txt")


def test_compare_more_tokens_than_fit_says_how_many_do(qwen, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: memory._BASE + 2**20)
    said = refused(qwen, "--side", "torch", "--tokens", 4000)
    fit = int(said.split("at most ")[1].split()[0])
    assert passed(qwen, "--side", "torch", "--tokens", fit)["tokens"] == fit
    refused(qwen, "--side", "torch", "--tokens", fit + 1)


@pytest.mark.parametrize(("option", "value"), [("--tokens", 0), ("--tokens", -1), ("--seed", -1)])
def test_compare_numbers_out_of_range(qwen, option, value):
    assert str(value) in refused(qwen, "--side", "torch", option, value)


@pytest.mark.parametrize("arguments", [["--dtype", "float8"], ["--tokens", "many"], ["--layer"], ["--worst", -1]])
def test_compare_options_that_do_not_parse_exit_2(qwen, arguments):
    done = run(qwen, *arguments)
    assert done.exit_code == 2 and done.stdout == ""


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float64"}, {"dtype": "int8"}, {"tokens": 1.5}, {"tokens": True}, {"seed": ""}]
)
def test_report_refuses_arguments_of_another_kind(qwen, wrong):
    with pytest.raises(ConfigError):
        report(qwen, **wrong)


@pytest.mark.parametrize("side", ["jax", "", "torch:", "torch:te", "torch:nonsense", "torch@moon", "flax@moon"])
def test_compare_side_that_cannot_run_is_refused_before_the_model_does(qwen, monkeypatch, side):
    monkeypatch.setattr("moebius.compare.hidden.Model", lambda *args: pytest.fail("it ran"))
    refused(qwen, "--side", "torch", "--side", side)


# ------------------------------------------------------------------------------------------------------ the entry point
def test_entry_without_the_packages_says_which_extra_brings_them(monkeypatch, capsys):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["moebius", "compare", "folder"])
    assert entry.main() == 2
    out = capsys.readouterr()
    assert out.out == "" and "pip install '.[compare]' in a clone" in out.err and "transformers" in out.err


def test_command_line_prints_json_alone_and_exits_0(qwen):
    """The whole road in a process of its own: nothing but JSON on standard output, no noise on standard error."""
    path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", "moebius.compare", "compare", qwen, "--json", *map(str, TORCH)]
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    assert not done.stderr.strip(), done.stderr
