"""What a report is about: files of arrays, or a model and a text."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from slra.attn.problem import check_scale
from slra.cli.report.arrays import Layer, read_layers
from slra.cli.report.model import read_model

__all__ = ["MAX_TOKENS", "Source", "read_source"]

# Of a text: the mask that is kept of each layer takes the square of it in bytes.
MAX_TOKENS = 2048
# The fewest tokens of a text that anything is advised on.
MIN_TOKENS = 32


class Source(NamedTuple):
    """The layers, a line that says where they come from, and the same for machines."""

    layers: list[Layer]
    title: str
    parts: dict[str, Any]


def read_source(
    paths: list[Path],
    *,
    text: Path | None,
    max_tokens: int | None,
    causal: bool,
    scale: float | None,
    advance: Callable[[int | None], object],
) -> Source:
    """Read files, or run the model that the only path is the folder or the GGUF file of.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If options do not go together, or what is read is wrong; see `read_layers` and `read_model`.
    """
    if len(paths) == 1 and (paths[0].is_dir() or paths[0].suffix == ".gguf"):
        if text is None:
            raise ValueError(f"a model needs a text: give --text FILE with {paths[0]}")
        if causal or scale is not None:
            raise ValueError(
                "--causal and --scale are for files, a model has its own mask and scale"
            )
        return _of_model(paths[0], text, MAX_TOKENS if max_tokens is None else max_tokens, advance)
    if text is not None or max_tokens is not None:
        raise ValueError(
            "--text and --max-tokens need one model directory before them, "
            f"got {' '.join(map(str, paths))}"
        )
    options = {"is_causal": causal, "scale": None if scale is None else check_scale(scale)}
    layers = [layer._replace(options=options) for layer in read_layers(paths)]
    return Source(layers, ", ".join(map(str, paths)), {"files": list(map(str, paths))})


def _of_model(
    folder: Path, text: Path, max_tokens: int, advance: Callable[[int | None], object]
) -> Source:
    found = read_model(folder, _read_text(text), max_tokens, advance)
    needed = max(MIN_TOKENS, 2 * max(layer.k.shape[-1] for layer in found.layers))
    if found.n_tokens < needed:
        raise ValueError(
            f"--text must have at least {needed} tokens that the model takes, twice the width of a head: "
            f"{found.n_tokens} are no basis for advice, as so few keys have low rank whatever the model"
        )
    which = f"{found.n_tokens} tokens"
    if found.n_tokens < found.n_tokens_of_text:
        limit = "--max-tokens" if found.n_tokens == max_tokens else "all that the model takes"
        which = f"the first {found.n_tokens} of {found.n_tokens_of_text} tokens ({limit})"
    return Source(
        found.layers,
        f"{folder} on {_name(text)}, {which}",
        {
            "model": str(folder),
            "text": _name(text),
            "n_tokens": found.n_tokens,
            "n_tokens_of_text": found.n_tokens_of_text,
        },
    )


def _name(text: Path) -> str:
    return "standard input" if str(text) == "-" else str(text)


def _read_text(path: Path) -> str:
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text must be UTF-8, {_name(path)} is not: {error}") from error
    if not text.strip():
        raise ValueError(f"--text must hold some text, {_name(path)} holds none")
    return text
