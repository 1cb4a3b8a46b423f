"""What the attention layers of a model of Hugging Face transformers are given, recorded while the model runs.

Needs: torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from slra.integrations._transformers_layer import RECORD, Settings

__all__ = ["RecordedLayer", "RecordedSequence", "record"]


class RecordedSequence(NamedTuple):
    """Real tokens of one sequence in one layer: q (Hq, n, D), k, v (Hkv, m, D), mask (1 or Hq, n, m)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor


@dataclass
class RecordedLayer:
    """What a layer was given, its masks included; the options are those of `slra.attention`."""

    settings: Settings
    options: dict[str, Any]
    sequences: list[RecordedSequence] = field(default_factory=list)


def record(
    model: Any, batches: Iterable[Any], on_layer: Callable[[Settings], object]
) -> dict[str, RecordedLayer]:
    """Run a model, attending exactly, and keep what enters the attention of each layer that uses a registered name.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In eval mode; left as it was.
    batches : iterable of mappings or tensors
        As `slra.integrations.transformers.calibrate` takes them.
    on_layer : callable
        Called with the settings of its name whenever a layer is about to run.

    Returns
    -------
    dict of str to RecordedLayer
        By the name of the layer in ``model.base_model``, in the order in which they run.
    """
    if model.training:
        raise ValueError("model must be in eval mode for calibration: call model.eval()")
    recorder = _Recorder(on_layer)
    with _recording(model, recorder), torch.no_grad():
        for batch in batches:
            inputs = _check_batch(batch)
            recorder.padding = _padding(inputs, model.config)
            model(**inputs)
    return recorder.layers


@dataclass
class _Recorder:
    """The layers seen so far, and the padding of the batch that is running, (B, N), True for tokens."""

    on_layer: Callable[[Settings], object]
    layers: dict[str, RecordedLayer] = field(default_factory=dict)
    padding: torch.Tensor | None = None

    def add(
        self,
        name: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: dict[str, Any],
        settings: Settings,
    ) -> None:
        """Keep the real tokens of a batch in one layer."""
        self.on_layer(settings)
        layer = self.layers.setdefault(name, RecordedLayer(settings, options))
        masks = _block_masks(q, k, options)
        for index, mask in enumerate(masks):
            rows = columns = slice(None)
            if self.padding is not None:
                rows = columns = self.padding[index]
            layer.sequences.append(
                RecordedSequence(
                    q[index][:, rows],
                    k[index][:, columns],
                    v[index][:, columns],
                    mask[:, rows][..., columns],
                )
            )


def _block_masks(q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Boolean masks of a batch, (B, 1 or Hq, Nq, Nk)."""
    mask = options["mask"]
    if mask is None:
        mask = torch.ones((1, 1, q.shape[-2], k.shape[-2]), dtype=torch.bool, device=q.device)
        mask = torch.tril(mask) if options["is_causal"] else mask
        if options["window"] is not None:
            mask = torch.triu(mask, -options["window"][0])
    if mask.dtype != torch.bool:
        raise ValueError(f"attention_mask must be boolean to calibrate, got {mask.dtype}")
    return mask.expand(q.shape[0], -1, q.shape[-2], k.shape[-2])


@contextmanager
def _recording(model: Any, recorder: _Recorder) -> Iterator[None]:
    """Have every attention layer of a model record what it is given."""
    modules = dict(model.base_model.named_modules())
    for name, module in modules.items():
        setattr(module, RECORD, partial(recorder.add, name))
    try:
        yield
    finally:
        for module in modules.values():
            delattr(module, RECORD)


def _check_batch(batch: Any) -> dict[str, Any]:
    if isinstance(batch, torch.Tensor):
        return {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(
            "batches must be an iterable of mappings, as a tokenizer returns, or of tensors of ids, "
            f"got one of {type(batch).__name__}"
        )
    return dict(batch)


def _padding(inputs: dict[str, Any], config: Any) -> torch.Tensor | None:
    """Which tokens of a batch are real, None where all are."""
    masks = [x for name, x in inputs.items() if name.endswith("attention_mask") and x is not None]
    if all(bool(torch.all(x != 0)) for x in masks):
        return None
    if getattr(config, "is_encoder_decoder", False) or inputs["attention_mask"].ndim != 2:
        raise ValueError(
            "attention_mask must be 1 throughout to calibrate an encoder-decoder, or of shape (batch, length): "
            "calibrate on sequences without padding"
        )
    return inputs["attention_mask"] != 0
