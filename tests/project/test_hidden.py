"""A block's input: what the model's own layers before it make of a text, or hidden states of a file."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
import torch
from commands import edit_config, edit_tensors, passed, refused
from safetensors.torch import save_file

from moebius.compare import hidden as inputs
from moebius.compare.hidden import Model, from_file, given, quiet, read
from moebius.compare.numerics import report
from moebius.core.errors import CheckpointError, ConfigError, ShapeError

WORDS = "Layers after the block cannot change what it sees."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("checkpoints")
    with quiet():
        for name in ("qwen3_moe", "gpt_oss", "mixtral"):
            tiny.write(name, home / name)
    return home


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folders / "qwen3_moe", tmp_path / "checkpoint")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def stored(tmp_path):
    """Writes tensors by name into a file."""

    def write(**tensors):
        file = tmp_path / "states.safetensors"
        save_file({name.replace("__", "."): value for name, value in tensors.items()}, file)
        return file

    return write


# ------------------------------------------------------------------------------------------------------------ of a text
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_model_gives_every_block_what_the_whole_model_gives_it(folders, name):
    """Loaded up to the last layer that is asked for; the model's own run of all layers is the oracle."""
    from transformers import AutoModelForCausalLM

    seen = {}
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32, attn_implementation="eager")
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_pre_hook(lambda module, args, i=i: seen.update({i: args[0][0].clone()}))
        model(input_ids=torch.tensor([[byte % 32 for byte in WORDS.encode()]]))
    found = Model(folders / name, (0, 1), WORDS, 100)
    assert found.kind == "bytes" and found.inputs.keys() == {0, 1}
    for layer, x_TD in found.inputs.items():
        assert x_TD.dtype == np.float32 and torch.equal(torch.from_numpy(x_TD), seen[layer])
    assert len(Model(folders / name, (0,), WORDS, 7).inputs[0]) == 7


def test_model_hands_each_block_over_once(folders):
    model = Model(folders / "qwen3_moe", (0, 2), WORDS, 4)
    assert model.block(0) is not model.block(2)
    with pytest.raises(KeyError):
        model.block(0)


def test_model_reads_with_the_tokenizer_of_the_folder(damaged):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "fish": 7, "two": 9}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(damaged)
    found = Model(damaged, (0,), "two fish and two more", 16)
    assert len(found.inputs[0]) == 5 and found.kind == "the folder's tokenizer"
    edit_config(damaged, vocab_size=8)
    with pytest.raises(CheckpointError, match="below the vocabulary's 8"):
        Model(damaged, (0,), "two fish", 16)
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        Model(damaged, (0,), "two fish", 16)


def test_model_names_the_layer_whose_input_is_not_finite(damaged):
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    edit_tensors(damaged, lambda t: [t[name.format(e)].fill_(float("inf")) for e in range(8)])
    assert np.isfinite(Model(damaged, (0,), WORDS, 8).inputs[0]).all()
    with pytest.raises(CheckpointError, match="layer 1"):
        Model(damaged, (1,), WORDS, 8)


def test_quiet_puts_transformers_voice_back():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.CRITICAL, False)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# ------------------------------------------------------------------------------------------------------------ of a file
def test_from_file_takes_its_one_tensor_for_any_layer(stored):
    x_TD = drawn(5, 32)
    file = stored(anything=x_TD)
    assert all(np.array_equal(from_file(file, layer, 32), x_TD.numpy()) for layer in (0, 7))


def test_from_file_takes_the_tensor_named_after_the_layer(stored):
    first, third = drawn(5, 32), drawn(2, 3, 32).bfloat16()
    file = stored(layers__0=first, layers__2=third, other=drawn(1, 3))
    assert np.array_equal(from_file(file, 0, 32), first.numpy())
    assert np.array_equal(from_file(file, 2, 32), third.float().reshape(6, 32).numpy())
    with pytest.raises(ConfigError, match=r"layers\.0, layers\.2, other") as caught:
        from_file(file, 1, 32)
    assert "layers.1" in caught.value.do


def test_from_file_does_not_take_another_layers_tensor(stored):
    with pytest.raises(ConfigError, match=r"layers\.2"):
        from_file(stored(layers__2=drawn(5, 32)), 1, 32)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (drawn(5, 31), ShapeError, r"\[5, 31\], float32"),
        (drawn(32), ShapeError, r"\[32\]"),
        (drawn(5, 32).int(), ShapeError, "int32"),
        (drawn(0, 32), ConfigError, "none"),
        (drawn(5, 32) / 0, ConfigError, "inf or nan"),
    ],
    ids=["width", "one axis", "integers", "no token", "inf"],
)
def test_hidden_states_that_no_block_reads_are_refused(folders, stored, value, error, words):
    with pytest.raises(error, match=words):
        given(value, 32)
    said = refused(folders / "qwen3_moe", "--side", "torch", "--hidden", stored(hidden=value))
    assert "states.safetensors" in said


@pytest.mark.parametrize("content", [None, b"", b"garbage garbage garbage", b"\x08" + 7 * b"\0" + b"{}      "])
def test_file_that_holds_no_hidden_states_is_refused(folders, tmp_path, content):
    file = tmp_path / "states.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert "states.safetensors" in refused(folders / "qwen3_moe", "--side", "torch", "--hidden", file)


def test_hidden_states_in_a_folders_place_are_refused(folders, tmp_path):
    assert str(tmp_path) in refused(folders / "qwen3_moe", "--side", "torch", "--hidden", tmp_path)


@pytest.mark.parametrize("value", [object(), "words", None, [["a"]], {}])
def test_given_something_else_is_refused(value):
    with pytest.raises(ConfigError, match="pass an array or tensor"):
        given(value, 32)


def test_given_arrays_of_both_frameworks_are_the_same():
    import jax.numpy as jnp

    x_TD = drawn(3, 32)
    for value in (x_TD.numpy(), jnp.asarray(x_TD.numpy()), x_TD.double(), x_TD.tolist(), x_TD.requires_grad_()):
        assert np.array_equal(given(value, 32), x_TD.detach().numpy())
    bfloat16 = jnp.asarray(x_TD.detach().numpy(), jnp.bfloat16)
    assert np.array_equal(given(bfloat16, 32), np.asarray(bfloat16, np.float32))


def test_read_keeps_no_more_than_so_many_tokens(stored):
    file = stored(layers__0=drawn(5, 32), layers__1=drawn(2, 32))
    assert {layer: len(x_TD) for layer, x_TD in read(file, (0, 1), 32, 3).items()} == {0: 3, 1: 2}


def test_hidden_states_that_lack_one_of_all_layers_are_refused_before_anything_runs(folders, stored, monkeypatch):
    file = stored(layers__0=drawn(5, 32), layers__1=drawn(5, 32))
    monkeypatch.setattr("moebius.compare.subject.load_moe", lambda *a, **k: pytest.fail("it ran"))
    assert "layers.2" in refused(folders / "qwen3_moe", "--side", "torch", "--layer", "all", "--hidden", file)


def test_hidden_states_of_every_layer_reach_theirs(folders, stored):
    tensors = {f"layers__{i}": drawn(4 + i, 32, seed=i) for i in range(3)}
    found = passed(folders / "qwen3_moe", "--side", "torch", "--layer", "all", "--hidden", stored(**tensors))
    sizes = [
        next(row for row in layer["rows"] if row["name"] == "output")["whole"]["torch"]["n"]
        for layer in found["layers"]
    ]
    assert sizes == [(4 + i) * 32 for i in range(3)]


def test_hidden_states_that_the_model_gave_are_the_texts_own(folders):
    """The two ways to a block's input meet: a text, and what it turned into."""
    from moebius.compare import text

    model = Model(folders / "qwen3_moe", (1,), text.own()[0], 9)
    by_text = report(folders / "qwen3_moe", layer=1, tokens=9, sides="torch")
    by_states = report(folders / "qwen3_moe", layer=1, hidden=model.inputs[1], sides="torch")
    assert by_text.layers == by_states.layers


def test_hidden_states_for_a_block_that_transformers_cannot_make(damaged, stored):
    edit_config(damaged, num_attention_heads="four")
    file = stored(hidden=drawn(3, 32))
    assert passed(damaged, "--side", "torch", "--hidden", file)  # nothing else reads that key
    assert "transformers" in refused(damaged, "--side", "transformers", "--hidden", file)


def test_folder_and_file_below_the_home_folder(damaged, stored, monkeypatch):
    monkeypatch.setenv("HOME", str(damaged.parent))
    stored(hidden=drawn(3, 32))
    arguments = ("--side", "torch", "--side", "transformers", "--hidden", "~/states.safetensors")
    assert passed("~/checkpoint", *arguments)["checkpoint"] == "~/checkpoint"


def test_hidden_states_and_a_text_together_are_refused(folders, stored, tmp_path):
    (tmp_path / "words.txt").write_text(WORDS)
    arguments = ("--hidden", stored(hidden=drawn(5, 32)), "--text", tmp_path / "words.txt")
    assert "found: both" in refused(folders / "qwen3_moe", "--side", "torch", *arguments)


def test_text_is_not_read_by_the_model_for_hidden_states(folders, monkeypatch):
    monkeypatch.setattr(inputs, "Model", lambda *args: pytest.fail("it ran"))
    assert report(folders / "qwen3_moe", hidden=drawn(3, 32), sides="torch").tokens == 3
