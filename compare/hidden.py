"""A block's real input: what the model's own layers before it make of a text, computed by transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moebius.core.errors import CheckpointError, ConfigError
from moebius.core.folder import listed

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Enough text for any tokenizer to make one token of, so that a long file is not tokenised to its end.
_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Hidden:
    """What one MoE block sees and gives.

    Attributes:
        x_TD, y_TD: float32, the block's input and transformers' own output for it.
        tokens: where the token ids come from, in words.
    """

    x_TD: np.ndarray
    y_TD: np.ndarray
    tokens: str


def hidden(folder: Any, layer: int, text: str, n_tokens: int) -> Hidden:
    """Run layers 0 to `layer` of a checkpoint on a text, in float32 on the CPU, without a network.

    Args:
        folder: with config.json and safetensors. layer: index of the MoE layer.
        text: is cut to `n_tokens` tokens of the folder's tokenizer, or to its bytes where the folder has none.
    Returns:
        One row per token; fewer than `n_tokens` where the text is shorter.
    Raises:
        CheckpointError: transformers cannot load the model, a tensor of those layers is missing, or the values are
            not finite. ConfigError: no token, or n_tokens < 1.
    """
    if n_tokens < 1:
        raise ConfigError(f"{n_tokens} tokens", "not a positive number", "ask for 1 or more")
    folder = Path(folder).expanduser()
    with quiet():
        config = _trying(f"the config of {folder}", lambda: _config(folder, layer))
        ids, kind = _trying(f"the tokenizer of {folder}", lambda: _ids(folder, text, n_tokens, config.vocab_size))
        if not ids:
            raise ConfigError("a text of at least one token", f"none, by {kind}", "pass a longer text")
        model = _trying(f"layers 0 to {layer} of {folder}", lambda: _model(folder, config))
        x_TD, y_TD = _trying(f"layers 0 to {layer} of {folder} on {len(ids)} tokens", lambda: _run(model, layer, ids))
    if not (np.isfinite(x_TD).all() and np.isfinite(y_TD).all()):
        raise CheckpointError(
            f"finite activations at layer {layer} of {folder}", "inf or nan", "download it again: values are damaged"
        )
    return Hidden(x_TD=x_TD, y_TD=y_TD, tokens=kind)


def _trying(asked: str, step: Any) -> Any:
    """`step()`; whatever transformers raises becomes a CheckpointError with its words."""
    try:
        return step()
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:400]
        do = "see what transformers says; a folder that it cannot load cannot be compared"
        raise CheckpointError(asked, f"{type(error).__name__}: {words}", do) from error


def _config(folder: Path, layer: int) -> Any:
    """The model's config with the layers up to `layer` alone."""
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
    import torch
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


def _run(model: Any, layer: int, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    import torch

    seen: dict[str, np.ndarray] = {}

    def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        seen["x"], seen["y"] = (value.detach()[0].numpy().copy() for value in (args[0], y))

    hook = model.layers[layer].mlp.register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    finally:
        hook.remove()
    return seen["x"], seen["y"]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers', restored afterwards."""
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
