"""The `moebius compare` command: exit codes, JSON, text, and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moebius.compare import entry, sides, text
from moebius.compare.cli import app
from moebius.compare.demo import write_gpt_oss, write_qwen3_moe
from moebius.compare.hidden import hidden, quiet
from moebius.compare.numerics import report
from moebius.compare.verdict import PAIRS, Row
from moebius.core.errors import CheckpointError, ConfigError

BLOCK = "model.layers.0.mlp."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        return {
            "qwen3_moe": write_qwen3_moe(home / "qwen3_moe"),
            "gpt_oss": write_gpt_oss(home / "gpt_oss", text.own()[0])[0],
        }


@pytest.fixture
def qwen(folders, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folders["qwen3_moe"], tmp_path / "checkpoint")


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def refused(*arguments):
    """What the command says to bad input: three lines on standard error, nothing on standard output, code 2."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    lines = [line.split(": ")[0] for line in done.stderr.splitlines()]
    assert [word for word in ("asked", "found", "do") if word in lines] == ["asked", "found", "do"], done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------- what it prints
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_compare_json_is_all_there_is_and_holds_every_verdict(folders, family, dtype):
    done = run(folders[family], "--json", "--dtype", dtype, "--layer", 1, "--tokens", 64, "--seed", 3)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["passed"], found["faults"]) == (True, [])
    assert (found["dtype"], found["layer"], found["tokens"], found["seed"]) == (dtype, 1, 64, 3)
    names = [row["name"] for row in found["rows"]]
    assert names[:2] == ["output", "x"] and "gate.weight" in names and "experts.down_projs" in names
    assert ("gate.bias" in names) == ("experts.gate_up_proj_bias" in names) == (family == "gpt_oss")
    assert all(row["passed"] and row["errors"].keys() == set(PAIRS) for row in found["rows"])
    assert all(found["routing"][pair]["passed"] for pair in PAIRS)
    assert (found["loading"] is not None) == (dtype == "float32")


def test_compare_prints_a_table_of_at_most_100_columns(folders, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("One fish, two fish. " * 20)
    done = run(folders["gpt_oss"], "--text", words, "--tokens", 40)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert "40 tokens of" in done.stdout and "words.txt" in done.stdout.replace("\n", "")
    assert lines[-1].split() == ["verdict", "inside", "the", "bounds"]
    assert [line.split()[:3] for line in lines if line.strip().startswith("gradient of x")]


def test_compare_sharded_and_fused_folders_give_the_same_numbers(folders, tmp_path):
    """One checkpoint written in three ways: one file, shards, experts fused."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folders["qwen3_moe"], dtype=torch.float32)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
        model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    reports = [report(folder, tokens=32) for folder in (folders["qwen3_moe"], tmp_path / "sharded", tmp_path / "fused")]
    assert all(found.passed for found in reports)
    assert reports[0].rows == reports[1].rows == reports[2].rows
    assert reports[0].recipe == reports[1].recipe != reports[2].recipe


def test_compare_outside_the_bounds_exits_1_and_says_where(folders, monkeypatch):
    def swapped(layer):
        flax = original(layer)
        weight = flax.experts.gate_and_up_projs
        half = weight.shape[-1] // 2
        weight[...] = sides.jnp.roll(weight[...], half, axis=-1)
        return flax

    original = sides.flax_layer
    monkeypatch.setattr(sides, "flax_layer", swapped)
    done = run(folders["qwen3_moe"], "--tokens", 32)
    assert done.exit_code == 1
    assert "OUTSIDE the bounds" in done.stdout and "output, flax~reference: relative error" in done.stdout
    done = run(folders["qwen3_moe"], "--tokens", 32, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and not found["passed"] and any("flax~reference" in fault for fault in found["faults"])
    assert found["routing"]["torch~flax"]["passed"]  # the router was not touched


def test_compare_uses_the_tokenizer_of_the_folder(qwen):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "fish": 7, "two": 9}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(qwen)
    block = hidden(qwen, 0, "two fish and two more", 16)
    assert len(block.x_TD) == 5 and block.tokens == "the folder's tokenizer"
    (qwen / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        hidden(qwen, 0, "two fish", 16)


def test_hidden_is_the_input_that_the_whole_model_gives_the_block(folders):
    """Built with the first layers alone; the model's own run of all layers is the oracle."""
    from transformers import AutoModelForCausalLM

    words, seen = "Layers after the block cannot change what it sees.", {}
    for name, folder in folders.items():
        with quiet(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][0].clone()))
            model(input_ids=torch.tensor([list(words.encode())]))
        assert torch.equal(torch.from_numpy(hidden(folder, 0, words, 100).x_TD), seen["x"]), name


def test_report_is_reachable_from_the_package_whatever_was_imported_first():
    import moebius.compare

    assert moebius.compare.report is report
    with pytest.raises(AttributeError, match="nothing"):
        moebius.compare.nothing  # noqa: B018


def test_report_without_rows_or_with_a_row_without_errors_has_not_passed(folders):
    from dataclasses import replace

    found = report(folders["qwen3_moe"], tokens=8)
    assert found.passed
    assert not replace(found, rows=()).passed
    assert not replace(found, rows=(Row(name="output", errors={}),)).passed
    part = Row(name="output", errors={"torch~reference": found.rows[0].errors["torch~reference"]})
    assert not replace(found, rows=(part,)).passed


def test_report_of_two_runs_is_equal_and_another_seed_is_not(folders):
    once, again, other = (report(folders["qwen3_moe"], tokens=16, seed=seed) for seed in (0, 0, 1))
    assert once.to_json() == again.to_json() != other.to_json()


# ------------------------------------------------------------------------------------------------------------ bad input
def test_compare_folder_that_is_missing(tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing")


def test_compare_folder_without_config(tmp_path):
    assert "no config.json" in refused(tmp_path)


def test_compare_damaged_config(qwen):
    (qwen / "config.json").write_text("{")
    assert "config.json" in refused(qwen)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"garbage garbage", "no safetensors"),
        (b"", "0 by"),
    ],
)
def test_compare_file_that_is_no_safetensors(qwen, content, found):
    (qwen / "model.safetensors").write_bytes(content)
    assert found in refused(qwen)


def test_compare_truncated_file(qwen):
    file = qwen / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "truncated" in refused(qwen)


def test_compare_pickles_alone(qwen):
    (qwen / "model.safetensors").rename(qwen / "pytorch_model.bin")
    assert "pickles" in refused(qwen)


def test_compare_missing_shard(qwen):
    (qwen / "model.safetensors").unlink()
    names = [f"{BLOCK}gate.weight"]
    (qwen / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")})
    )
    assert "a.safetensors" in refused(qwen)


def test_compare_missing_and_misshapen_tensors_are_listed_together(qwen):
    def change(tensors):
        del tensors[f"{BLOCK}experts.3.up_proj.weight"]
        tensors[f"{BLOCK}gate.weight"] = torch.zeros(3, 3)

    edit_tensors(qwen, change)
    said = refused(qwen)
    assert "experts.3.up_proj.weight" in said and "gate.weight [3, 3]" in said


def test_compare_tensor_missing_before_the_block(qwen):
    """transformers would draw it at random and go on."""
    edit_tensors(qwen, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "embed_tokens.weight" in refused(qwen)


def test_compare_values_that_are_not_finite(qwen):
    edit_tensors(qwen, lambda tensors: tensors["model.embed_tokens.weight"].fill_(float("nan")))
    assert "inf or nan" in refused(qwen)


def test_compare_quantised_by_config(qwen):
    edit_config(qwen, quantization_config={"quant_method": "fp8"})
    assert "fp8" in refused(qwen)


def test_compare_quantised_by_tensors(qwen):
    name = f"{BLOCK}experts.0.up_proj.weight_scale_inv"
    edit_tensors(qwen, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert "weight_scale_inv" in refused(qwen)


def test_compare_unknown_family(qwen):
    edit_config(qwen, model_type="mixtral")
    said = refused(qwen)
    assert "mixtral" in said and "qwen3_moe, gpt_oss" in said


def test_compare_dense_layer_lists_the_moe_layers(qwen):
    edit_config(qwen, mlp_only_layers=[0])
    assert "a dense layer; MoE layers: 1" in refused(qwen, "--layer", 0)


def test_compare_layer_out_of_range(folders):
    assert "layers 0 to 1; MoE layers: 0-1" in refused(folders["qwen3_moe"], "--layer", 2)


def test_compare_config_that_contradicts_itself(qwen):
    edit_config(qwen, num_experts_per_tok=17)
    assert "n_activated_experts=17" in refused(qwen)


def test_compare_config_that_transformers_cannot_load(qwen):
    edit_config(qwen, num_attention_heads="four")
    assert "transformers" in refused(qwen)


@pytest.mark.parametrize(
    "content", [None, b"", b" \n", b"\xff\xfe\x00"], ids=["missing", "empty", "blank", "not utf-8"]
)
def test_compare_text_that_cannot_be_read(folders, tmp_path, content):
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    assert "words.txt" in refused(folders["qwen3_moe"], "--text", file)


def test_compare_text_that_is_a_folder(folders, tmp_path):
    assert str(tmp_path) in refused(folders["qwen3_moe"], "--text", tmp_path)


@pytest.mark.parametrize(("option", "value"), [("--tokens", 0), ("--tokens", -1), ("--seed", -1)])
def test_compare_numbers_out_of_range(folders, option, value):
    assert str(value) in refused(folders["qwen3_moe"], option, value)


@pytest.mark.parametrize("arguments", [["--dtype", "float8"], ["--tokens", "many"], ["--layer"], ["--nothing"]])
def test_compare_options_that_do_not_parse_exit_2(folders, arguments):
    done = run(folders["qwen3_moe"], *arguments)
    assert done.exit_code == 2 and done.stdout == ""


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float64"}, {"dtype": "int8"}, {"tokens": 1.5}, {"tokens": True}, {"seed": None}]
)
def test_report_refuses_arguments_of_another_kind(folders, wrong):
    with pytest.raises(ConfigError):
        report(folders["qwen3_moe"], **wrong)


# ------------------------------------------------------------------------------------------------------ the entry point
def test_entry_without_the_packages_says_which_extra_brings_them(monkeypatch, capsys):
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["moebius", "compare", "folder"])
    assert entry.main() == 2
    out = capsys.readouterr()
    assert out.out == "" and "pip install '.[compare]' in a clone" in out.err and "transformers" in out.err
    for arguments in (["--help"], []):
        monkeypatch.setattr(sys, "argv", ["moebius", *arguments])
        assert entry.main() == 0
        assert "moebius compare CHECKPOINT" in capsys.readouterr().out


def test_entry_version_needs_no_package(monkeypatch, capsys):
    from moebius import __version__

    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["moebius", "--version"])
    assert entry.main() == 0
    assert capsys.readouterr().out == f"moebius {__version__}\n"


def test_command_line_prints_json_alone_and_exits_0(folders):
    """The whole road in a process of its own: nothing but JSON on standard output, no noise on standard error."""
    path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", "moebius.compare", "compare", folders["qwen3_moe"], "--json", "--tokens", "16"]
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    assert len(done.stderr.splitlines()) <= 1, done.stderr
