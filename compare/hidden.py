"""A block's real input: what the model's own layers before it make of a text, computed by transformers; or a file."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moebius.core.errors import CheckpointError, ConfigError, MoEError, ShapeError
from moebius.core.folder import listed

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Enough text for any tokenizer to make one token of, so that a long file is not tokenised to its end.
_CHARACTERS_PER_TOKEN = 64
_LAYER = re.compile(r"layers\.\d+")


class Model:
    """The first layers of a checkpoint in transformers, in float32 on the CPU, and what they make of a text.

    Args:
        folder: with config.json and safetensors. layers: indices of the MoE layers that are wanted; the model is
            loaded up to the last. text: cut to `n_tokens` tokens of the folder's tokenizer, or to its bytes where the
            folder has none.

    Attributes:
        kind: where the token ids come from, in words.
        inputs: layer -> [T, dim] float32 input of its MoE block; fewer than `n_tokens` where the text is shorter.

    Raises:
        CheckpointError: transformers cannot load the model, a tensor of those layers is missing, or the values are not
            finite. ConfigError: no token, or n_tokens < 1.
    """

    def __init__(self, folder: Any, layers: Sequence[int], text: str, n_tokens: int):
        if n_tokens < 1:
            raise ConfigError(f"{n_tokens} tokens", "not a positive number", "ask for 1 or more")
        folder, last = Path(folder).expanduser(), max(layers)
        with quiet():
            config = trying(f"the config of {folder}", lambda: shortened_config(folder, last))
            ids, self.kind = trying(
                f"the tokenizer of {folder}", lambda: _ids(folder, text, n_tokens, config.vocab_size)
            )
            if not ids:
                raise ConfigError("a text of at least one token", f"none, by {self.kind}", "pass a longer text")
            asked = f"layers 0 to {last} of {folder}"
            model = trying(asked, lambda: _model(folder, config))
            self.inputs = trying(f"{asked} on {len(ids)} tokens", lambda: _run(model, layers, ids))
        self._blocks = {layer: model.layers[layer].mlp for layer in layers}
        broken = [layer for layer, x_TD in self.inputs.items() if not np.isfinite(x_TD).all()]
        if broken:
            asked = f"finite activations at layer {broken[0]} of {folder}"
            raise CheckpointError(asked, "inf or nan", "download it again: values are damaged")

    def block(self, layer: int) -> nn.Module:
        """The MoE block of a layer, to be had once: it is the caller's to free."""
        return self._blocks.pop(layer)


def read(hidden: Any, layers: Sequence[int], dim: int, most: int) -> dict[int, np.ndarray]:
    """layer -> its hidden states, of a file or given, at most so many tokens; see `from_file` and `given`."""
    if isinstance(hidden, str | os.PathLike):
        return {layer: from_file(hidden, layer, dim)[:most].copy() for layer in layers}
    return dict.fromkeys(layers, given(hidden, dim)[:most])


def from_file(file: Any, layer: int, dim: int) -> np.ndarray:
    """Hidden states [T, dim] of a safetensors file, float32.

    Args:
        file: holds a tensor named after the layer, "layers.3", or one tensor of another kind of name, for any layer.
            [T, dim], or with more leading axes, all of them tokens.
        layer: whose block will read them. dim: width of the model.
    Raises:
        ConfigError: no such file, no safetensors, no such tensor, no token, inf or nan. ShapeError: another width.
    """
    from safetensors import safe_open

    asked = f"hidden states of {file}"
    try:
        with safe_open(Path(file).expanduser(), framework="pt") as tensors:
            names = list(tensors.keys())
            for_any = names[0] if len(names) == 1 and not _LAYER.fullmatch(names[0]) else None
            name = f"layers.{layer}" if f"layers.{layer}" in names else for_any
            if name is None:
                found = f"the tensors {listed(names)}" if names else "no tensor"
                raise ConfigError(asked, found, f"store one tensor, or one named layers.{layer}")
            return given(tensors.get_tensor(name), dim, f"{name} of {file}")
    except MoEError:
        raise
    except Exception as error:  # safetensors' own class, and the system's
        words = f"{type(error).__name__}: {error}"
        raise ConfigError(asked, words, "pass a safetensors file with the block's input") from error


def given(value: Any, dim: int, what: str = "hidden") -> np.ndarray:
    """Hidden states given as an array or tensor, [T, dim] float32; see `from_file`."""
    try:
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            value = value.copy()  # torch would share its memory, and warn of that
        tensor = torch.as_tensor(value).detach().cpu()
    except Exception as error:  # torch raises TypeError, ValueError, RuntimeError and others
        words = f"a {type(value).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(
            f"{what}: floating hidden states [tokens, {dim}]", words, "pass an array or tensor"
        ) from error
    if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.shape[-1] != dim:
        found = f"shape {list(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
        raise ShapeError(f"{what}: floating hidden states [tokens, {dim}]", found, "pass what the block reads")
    x_TD: np.ndarray = tensor.reshape(-1, dim).float().numpy()
    if not len(x_TD):
        raise ConfigError(f"{what}: at least one token", "none", "pass what the block reads")
    if not np.isfinite(x_TD).all():
        raise ConfigError(f"{what}: finite hidden states", "inf or nan", "look for where they arise")
    return x_TD


def trying(asked: str, step: Any) -> Any:
    """What `step` returns; whatever transformers raises becomes a CheckpointError with its words."""
    try:
        return step()
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:400]
        do = "see what transformers says; a folder that it cannot load cannot be compared"
        raise CheckpointError(asked, f"{type(error).__name__}: {words}", do) from error


def shortened_config(folder: Path, layer: int) -> Any:
    """transformers' config of a checkpoint with the layers up to `layer` alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = layer + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: layer + 1]
    config.use_cache = False
    return config


def _ids(folder: Path, text: str, n_tokens: int, vocabulary: int) -> tuple[list[int], str]:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return [byte % vocabulary for byte in text.encode()[:n_tokens]], "bytes"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(text[: _CHARACTERS_PER_TOKEN * n_tokens])["input_ids"][:n_tokens]
    outside = sorted({token for token in ids if not 0 <= token < vocabulary})
    if outside:
        raise CheckpointError(
            f"token ids below the vocabulary's {vocabulary}",
            listed(map(str, outside)),
            "pass a folder whose tokenizer and model belong together",
        )
    return ids, "the folder's tokenizer"


def _model(folder: Path, config: Any) -> Any:
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would draw them at random and go on
        found = f"missing: {listed(missing)}"
        raise CheckpointError(f"the tensors of the model's first layers in {folder}", found, "download it again")
    return model.eval()


def _run(model: Any, layers: Sequence[int], ids: list[int]) -> dict[int, np.ndarray]:
    seen: dict[int, np.ndarray] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            seen[layer] = args[0].detach()[0].numpy().copy()

        return hook

    hooks = [model.layers[layer].mlp.register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers', restored afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a Jupyter without widgets, at import
        from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
