"""Low-rank attention inside Hugging Face transformers, under a name registered there.

Needs: transformers, torch. An encoder may fit a basis in every call; whatever predicts tokens takes bases that were
calibrated before and are attached to its layers, because a fit sees all tokens of the call, later ones included.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import slra
from slra._files import File
from slra._validate import check_choice, check_positive, check_rank
from slra.attn.basis import AttentionBasis, load_bases, save_bases
from slra.attn.rotary import check_rotary
from slra.integrations._transformers_layer import (
    BASIS,
    LayerBasis,
    Settings,
    implementation,
    is_implementation,
)
from slra.integrations._transformers_mask import make_mask
from slra.integrations._transformers_record import RecordedLayer, record
from slra.integrations._transformers_rotary import turned

__all__ = ["attach", "calibrate", "detach", "load", "register", "save"]

# No head is wider: a rank that is, is refused at once.
_WIDEST_HEAD = 2**16


def register(
    name: str = "slra",
    rank: int | tuple[int, int] | None = None,
    *,
    rtol: float | None = None,
    method: str = "output",
) -> None:
    """Make low-rank attention known to transformers, with its masks, under a name for ``attn_implementation``.

    Parameters
    ----------
    name : str
        For ``from_pretrained(..., attn_implementation=name)`` and ``model.set_attn_implementation(name)``. Registering
        it again changes the settings of every model that uses it.
    rank : int or (int, int), optional
        Dimensions to keep, as in `slra.low_rank_attention`: of each head, or of queries and keys and of values. A
        sequence of no more tokens than that is attended to exactly. Neither ``rank`` nor ``rtol``: only layers with a
        basis, see `attach`, can be run.
    rtol : float, optional
        Relative error of each head's output to stay within.
    method : {"output", "scores", "svd"}
        How bases are fitted, see `slra.fit_attention`.

    Raises
    ------
    TypeError, ValueError
        If a setting is wrong, or the name belongs to another implementation.

    Examples
    --------
    >>> from slra.integrations.transformers import register
    >>> register("slra-half", rank=16)
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    known = AttentionInterface()
    if not name or name == "eager" or (name in known and not is_implementation(known[name])):
        raise ValueError(f"name must be a new one, got {name!r}, which is another implementation's")
    check_choice(method, ("output", "scores", "svd"), "method")
    for one in rank if isinstance(rank, Sequence) else (rank,):
        if one is not None:
            check_rank(one, _WIDEST_HEAD, limit_is="no head is wider")
    if rtol is not None:
        check_positive(rtol, "rtol")
    AttentionInterface.register(name, implementation(Settings(name, rank, rtol, method)))
    # Boolean masks, None where causality or a window says all: just what slra.attention takes.
    AttentionMaskInterface.register(name, make_mask)


def calibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    across_heads: bool = False,
    rotary: Sequence[float] | torch.Tensor | None = None,
) -> dict[str, AttentionBasis]:
    """Run a model on text and fit one basis for each attention layer, to all tokens but the padding.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In eval mode, and using a name that was registered with a rank or rtol: these and the method are used.
    batches : iterable of mappings or tensors
        What a tokenizer returns (``input_ids`` and, where there is padding, ``attention_mask``), or the ids alone.
    across_heads : bool
        As in `slra.fit_attention`: for caches in bits.
    rotary : sequence of float, optional
        Frequencies of the model's rotary embedding, mostly ``model.base_model.rotary_emb.inv_freq``: a cache in bits
        then stores keys as they are before it, which takes fewer bits (and time: it turns keys back, and forth again at
        each step). It pairs feature i with i + F; padding is best on the right.

    Returns
    -------
    dict of str to AttentionBasis
        By the name of the layer in ``model.base_model``. The model is left as it was: see `attach`.

    Raises
    ------
    TypeError
        If ``batches`` holds something else.
    ValueError
        If the model is in training mode, no layer uses a registered name, a mask is not boolean, there are fewer
        tokens than the rank, or an encoder-decoder is given padding.

    Notes
    -----
    The model attends exactly meanwhile. All tokens of all layers are kept until the end, and a layer's fit takes a mask
    of (number of tokens) squared bytes: some thousand tokens are plenty for heads of 32 to 128 dimensions.

    Examples
    --------
    >>> import torch, transformers
    >>> from slra.integrations.transformers import attach, calibrate, register
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    ... )
    >>> register("slra-example", rank=4)
    >>> model = transformers.LlamaModel._from_config(config, attn_implementation="slra-example").eval()
    >>> bases = calibrate(model, [torch.arange(40)[None, :]])
    >>> {name: basis.ranks for name, basis in bases.items()}
    {'layers.0.self_attn': ((4, 4), (4, 4), (4, 4), (4, 4))}
    >>> attach(model, bases)
    >>> model(torch.arange(5)[None, :]).last_hidden_state.shape
    torch.Size([1, 5, 32])
    """
    layers = record(model, batches, _require_fit)
    if not layers:
        raise ValueError(
            "model must use a name registered by slra.integrations.transformers.register, but no layer "
            f"did; it uses {model.config._attn_implementation!r}: call model.set_attn_implementation(name)"
        )
    return {
        name: _fit_layer(layer, across_heads=across_heads, rotary=rotary)
        for name, layer in layers.items()
    }


def _require_fit(settings: Settings) -> None:
    if not settings.fits:
        raise ValueError(f"{settings.name!r} must be registered with rank or rtol to calibrate")


def _fit_layer(
    layer: RecordedLayer, *, across_heads: bool, rotary: Sequence[float] | torch.Tensor | None
) -> AttentionBasis:
    """Fit to all sequences at once: side by side, each attending to itself only."""
    q, k, v = (torch.cat([getattr(one, x) for one in layer.sequences], dim=-2) for x in "qkv")
    n_heads = max(one.mask.shape[0] for one in layer.sequences)
    mask = torch.zeros((n_heads, q.shape[-2], k.shape[-2]), dtype=torch.bool, device=q.device)
    row = column = 0
    for one in layer.sequences:
        bottom, right = row + one.mask.shape[-2], column + one.mask.shape[-1]
        mask[:, row:bottom, column:right] = one.mask
        row, column = bottom, right
    options = {**layer.options, "mask": mask, "is_causal": False, "window": None}
    options["across_heads"] = across_heads
    settings = layer.settings
    basis = slra.fit_attention(
        q, k, v, settings.rank, rtol=settings.rtol, method=settings.method, **options
    )
    if rotary is None:
        return basis
    # Of each sequence from its own beginning on, where a cache will begin.
    frequencies = check_rotary(rotary, k.shape[-1])
    q, k = (
        torch.cat([turned(getattr(one, x), frequencies, back=True) for one in layer.sequences], -2)
        for x in "qk"
    )
    before = slra.fit_attention(q, k, v, 1, rotary=frequencies, **options)
    return dataclasses.replace(basis, coding=before.coding)


def attach(model: Any, bases: Mapping[str, AttentionBasis]) -> None:
    """Give layers of a model the bases to run on, in place of those that they have.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Using, now or later, a registered name. The bases become buffers of its layers, which move with it
        (``model.to``) and are not saved with it.
    bases : mapping of str to AttentionBasis
        From `calibrate` or `load`, by the name of the layer in ``model.base_model``.

    Raises
    ------
    ValueError
        If a layer does not exist in the model, or a basis has batch axes.

    Examples
    --------
    See `calibrate`.
    """
    modules = dict(model.base_model.named_modules())
    if unknown := sorted(set(bases) - set(modules)):
        raise ValueError(
            f"bases must be of layers of {type(model).__name__}, which has none called {', '.join(unknown)}"
        )
    for name, basis in bases.items():
        if basis.wq.ndim != 3:
            raise ValueError(
                f"the basis of {name} must have no batch axis, got wq of shape {tuple(basis.wq.shape)}"
            )
    device = next(model.parameters()).device
    for name, basis in bases.items():
        placed = next(modules[name].parameters(), None)
        setattr(
            modules[name],
            BASIS,
            LayerBasis(basis, device if placed is None else placed.device),
        )


def detach(model: Any) -> None:
    """Take all bases off the layers of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Examples
    --------
    >>> import torch, transformers
    >>> from slra.integrations.transformers import attach, calibrate, detach, register
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    ... )
    >>> register("slra-example", rank=4)
    >>> model = transformers.LlamaModel._from_config(config, attn_implementation="slra-example").eval()
    >>> bases = calibrate(model, [torch.arange(40)[None, :]])
    >>> attach(model, bases)
    >>> detach(model)
    >>> model.set_attn_implementation("sdpa")
    >>> model(torch.arange(5)[None, :]).last_hidden_state.shape
    torch.Size([1, 5, 32])
    """
    for module in model.modules():
        if hasattr(module, BASIS):
            delattr(module, BASIS)


def save(path: File, bases: Mapping[str, AttentionBasis]) -> None:
    """Write the bases of all layers to one file: an .npz archive of plain arrays.

    Parameters
    ----------
    path : str, path-like or file opened for bytes
        Written as it is, no suffix is added.
    bases : mapping of str to AttentionBasis
        From `calibrate`.

    Raises
    ------
    OSError
        If it cannot be written; a file that was there is then as it was.

    Examples
    --------
    See `load`.
    """
    save_bases(path, bases)


def load(path: File) -> dict[str, AttentionBasis]:
    """Read bases written by `save`, as tensors on the CPU; nothing is unpickled.

    Parameters
    ----------
    path : str, path-like or file opened for bytes

    Returns
    -------
    dict of str to AttentionBasis

    Raises
    ------
    OSError
        If there is no such file, or it is a folder or a pipe.
    ValueError
        If the file is damaged, or not what `save` writes.

    Examples
    --------
    >>> import tempfile, torch, transformers
    >>> from slra.integrations.transformers import attach, calibrate, load, register, save
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    ... )
    >>> register("slra-example", rank=4)
    >>> model = transformers.LlamaModel._from_config(config, attn_implementation="slra-example").eval()
    >>> bases = calibrate(model, [torch.arange(40)[None, :]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/bases.npz", bases)
    ...     attach(model, load(f"{folder}/bases.npz"))
    """
    return load_bases(path, "slra.integrations.transformers.save", torch.from_numpy)
