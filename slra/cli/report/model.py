"""Queries, keys and values as they enter the attention of a Hugging Face model, on a text of the user's.

The model is a folder on this machine with weights in safetensors, or a GGUF file (which transformers needs gguf and
accelerate to read): nothing is downloaded, unpickled or executed from it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slra.cli.report.arrays import Layer, Stored, checked_layer

__all__ = ["ModelInputs", "read_model"]

# The name under which the recording attention is registered with transformers.
_NAME = "slra-report"


class ModelInputs(NamedTuple):
    """Attention inputs of every layer, and how many of the text's tokens they are of."""

    layers: list[Layer]
    n_tokens: int
    n_tokens_of_text: int


def read_model(
    folder: Path, text: str, max_tokens: int, advance: Callable[[int | None], object]
) -> ModelInputs:
    """Run a model on a text.

    Parameters
    ----------
    folder : Path
        With ``config.json``, a tokenizer, and ``model.safetensors`` or its parts with their index; or a GGUF file.
    text : str
        Cut to ``max_tokens``, or to as many as the model takes if these are fewer.
    max_tokens : int
    advance : callable
        Called with the number of layers once it is known (None where it is not said) as each of them runs.

    Raises
    ------
    ValueError
        If packages are missing, the folder is no such model, it does not load whole, or its attention is of a kind
        that cannot be recorded.
    """
    _check_model(folder)
    _import(folder)
    with _quiet():
        tokenizer, model = _load(folder)
        ids, n_tokens_of_text = _tokenize(tokenizer, text, _limit(tokenizer, model, max_tokens))
        if ids.shape[1] == 0:
            raise ValueError(f"the text must hold a token, the tokenizer of {folder} finds none")
        layers = _record(folder, model, ids, advance)
    return ModelInputs(layers, ids.shape[1], n_tokens_of_text)


def _check_model(path: Path) -> None:
    if path.is_file():
        return
    if not (path / "config.json").is_file():
        raise ValueError(f"a model directory must hold config.json, {path} does not")
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any((path / name).is_file() for name in weights):
        raise ValueError(
            f"a model directory must hold {' or '.join(weights)}, {path} does not; pickled weights are not read"
        )


def _import(folder: Path) -> None:
    """Import what running a model needs, told to stay offline."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import slra.integrations.transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the model in {folder} needs torch and transformers ({error}): "
            'pip install ".[transformers]" in a clone of slra'
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and warnings of transformers off the terminal: what matters of them is an error here."""
    from transformers.utils import logging

    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


@contextmanager
def _clearly(what: str) -> Iterator[None]:
    """Turn whatever a model of any kind raises into one line."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ValueError(f"{what}: {lines[0] if lines else ''} ({type(error).__name__})") from error


def _load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from slra.integrations.transformers import register

    folder = path
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if path.is_file():
        folder, local["gguf_file"] = path.parent, path.name
    with _clearly(f"the configuration of {path} cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, **local)
    if config.is_encoder_decoder:
        raise ValueError(
            f"a model must be an encoder or a decoder, {path} ({config.model_type}) is both: a text says what "
            "goes into one of them only"
        )
    with _clearly(f"the tokenizer of {path} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    register(_NAME)
    with _clearly(f"{path} ({config.model_type}) cannot be loaded so that attention is recorded"):
        model, info = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype="auto",
            attn_implementation=_NAME,
            output_loading_info=True,
            **({} if path.is_file() else {"use_safetensors": True}),
            **local,
        )
    # What follows the last layer may be new: no attention depends on it.
    if missing := sorted(x for x in info["missing_keys"] if not x.startswith("pooler")):
        raise ValueError(
            f"the weights in {path} must be whole, they lack {len(missing)} tensors, {missing[0]} among them"
        )
    return tokenizer, model.eval()


def _limit(tokenizer: Any, model: Any, max_tokens: int) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(max_tokens, int(tokenizer.model_max_length), int(positions or max_tokens))


def _tokenize(tokenizer: Any, text: str, limit: int) -> tuple[Any, int]:
    """Token ids (1, n) of the start of a text, and how many the whole has."""
    whole = tokenizer(text, verbose=False)["input_ids"]
    ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
    # A tokenizer leaves a text as it is where the limit has no room for more than its own tokens.
    return ids[:, :limit], len(whole)


def _record(
    folder: Path, model: Any, ids: Any, advance: Callable[[int | None], object]
) -> list[Layer]:
    from slra.integrations._transformers_record import record

    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    kind = f"{folder} ({model.config.model_type})"
    with _clearly(f"{kind} cannot be run with its attention recorded, on {ids.shape[1]} tokens"):
        recorded = record(model, [ids], lambda settings: advance(n_layers))
    if not recorded:
        raise ValueError(
            f"the attention of {kind} cannot be recorded: no layer of it calls transformers' attention interface"
        )
    return [_layer(name, one, str(folder)) for name, one in recorded.items()]


def _layer(name: str, recorded: Any, source: str) -> Layer:
    (sequence,) = recorded.sequences
    stored = {key: _stored(getattr(sequence, key)) for key in "qkv"}
    given = {key: recorded.options[key] for key in ("scale", "softcap")}
    sinks = recorded.options["sinks"]
    if sinks is not None:
        given["sinks"] = sinks.detach().float().numpy()
    return checked_layer(name, stored, source)._replace(options={**given, **_mask(sequence)})


def _stored(x: Any) -> Stored:
    dtype = str(x.dtype).removeprefix("torch.")
    return Stored((x.float() if dtype == "bfloat16" else x).numpy(), dtype, x.element_size())


def _mask(sequence: Any) -> dict[str, Any]:
    """Which keys a query sees, as options of `slra.attention`: a mask only where no option says it."""
    mask = sequence.mask.numpy()
    if mask.all():
        return {"is_causal": False, "mask": None}
    if np.array_equal(mask, np.broadcast_to(np.tri(mask.shape[-1], dtype=bool), mask.shape)):
        return {"is_causal": True, "mask": None}
    return {"is_causal": False, "mask": mask}
