"""A compressed key/value cache for ``model.generate(cache=...)`` of Hugging Face transformers.

Needs: transformers, torch. Between steps each layer holds a `slra.KVCache`; for a step its keys and values are decoded
to all dimensions, because that is what a model's attention takes: it saves memory, not time. Only where queries choose
their keys (``n_top``) do they attend to the cache itself, by the attention registered in `slra.integrations`.
"""

import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

import slra
from slra._files import File
from slra.attn.basis import AttentionBasis
from slra.cache import KVCache
from slra.integrations._transformers_cache_files import load_layers, save_layers
from slra.integrations._transformers_layer import ATTEND
from slra.integrations._transformers_rotary import turned

__all__ = ["LowRankCache"]

OPTIONS = {"window", "n_sink", "n_sparse", "dtype", "bits", "rtol", "n_top", "top_p"}
OPTIONS |= {"rank_index", "index"}
Bases: TypeAlias = Sequence[AttentionBasis | None] | Mapping[str, AttentionBasis]
# Tokens of each sequence, (B,).
Padding: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
# Below so many tokens maps may well be most of the bytes.
LONG = 512


class LowRankCache(Cache):
    """Past keys and values in the dimensions of calibrated bases.

    Parameters
    ----------
    bases : sequence of AttentionBasis, or mapping from layers to them
        One for each attention layer, in the order of the layers, or by their names, as `calibrate` returns them: the
        last number in a name says which layer it is. Layers without a basis (left out of a mapping, None in a sequence)
        keep exact keys and values. Of torch tensors on the layer's device, fitted with ``pool_batch=True`` to queries,
        keys and values as attention gets them, after any rotary embedding; with ``bits`` or ``rtol`` keys are stored
        before it where `calibrate` was given its frequencies.
    config : transformers.PreTrainedConfig, optional
        That of the model. Layers that attend within a sliding window then keep the window only, exact, and layers of
        another kind than attention what is theirs, whatever basis they have.
    **options
        As for `slra.KVCache`: ``window``, ``n_sink``, ``n_sparse``, ``dtype``, ``bits``, ``rtol``. With ``n_top``,
        ``top_p``, ``rank_index`` and ``index`` the model must use an attention of
        `slra.integrations.transformers.register`.

    Attributes
    ----------
    nbytes : int
        Bytes of all layers, bases and exact tokens among them.
    nbytes_exact : int
        Bytes that the keys and values held would take as they came.
    bits : float
        Average bits of a number in layers with a basis, see `slra.KVCache`.

    Raises
    ------
    TypeError, ValueError
        As for `slra.KVCache`, at the first token. TypeError for options other than those above, ValueError where names
        in a mapping do not say which layer they are, or a sequence has fewer bases than the model has layers.

    Notes
    -----
    Pass it to ``model.generate`` as ``cache``, which was called ``past_key_values`` before, and to a model as
    ``past_key_values``.

    The tokens of one call (a prompt, a chunk of it, a turn of a chat) attend to each other exactly; those of later
    calls attend to what is left of them. Beam search works, and so does cropping, which assisted generation and prompt
    look-up need. Where keys are stored before the rotary embedding, those kept exact are rounded to their dtype once
    more, and a step rotates all keys.

    Sinks are the first real tokens of each sequence, and padding before them is not stored. Which are real is read off
    the ``attention_mask`` (batch, length) that a model makes its own mask of; where it makes none, as for a mask with
    four axes, all tokens count as real.

    Keys and values are stored in the dtype that they come in, unless ``dtype`` says otherwise. Where the cache takes
    more bytes than exact keys and values would, for more than a few hundred tokens, it warns once.

    Examples
    --------
    >>> import torch, transformers
    >>> import slra
    >>> from slra.integrations.transformers_cache import LowRankCache
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    ... )
    >>> model = transformers.LlamaForCausalLM(config).eval()
    >>> q, k, v = torch.randn(3, 4, 64, 8)
    >>> cache = LowRankCache([slra.fit_attention(q, k, v, 4)], window=8)
    >>> prompt = torch.arange(10)[None, :]
    >>> model.generate(prompt, cache=cache, max_new_tokens=5, pad_token_id=0).shape
    torch.Size([1, 15])
    """

    def __init__(
        self,
        bases: Bases,
        *,
        config: Any = None,
        **options: Any,
    ) -> None:
        if unknown := set(options) - OPTIONS:
            raise TypeError(f"options must be those of a cache with a fixed basis, got {unknown}")
        self._may_miss_layers = isinstance(bases, Mapping)
        ordered = _ordered(bases)
        layers = [] if config is None else DynamicCache(config=config).layers
        layers += [DynamicLayer() for _ in range(len(ordered) - len(layers))]
        for i, basis in enumerate(ordered):
            # Of a sliding window, and of what is not attention, all is needed and there is little.
            if basis is not None and type(layers[i]) is DynamicLayer:
                layers[i] = _Layer(basis, options)
        super().__init__(layers=layers)
        self._has_warned = False
        self._padding: Padding | None = None

    def save(
        self,
        path: File,
        *,
        bits: float | tuple[float, float] | None = None,
        bases: Bases | None = None,
    ) -> None:
        """Write all layers to one file, with a checksum (needs the package safetensors).

        Parameters
        ----------
        path : str, path-like or file opened for bytes
            Written as it is, no suffix is added.
        bits : float or (float, float), optional
            Park layers with a basis, as `KVCache.save` does; those without stay exact.
        bases : sequence of AttentionBasis, or mapping from layers to them, optional
            Those that a cache in bits was made with: their maps are then left out, and `load` must be given them too.

        Raises
        ------
        ImportError
            If a package is missing.
        OSError
            If it cannot be written; a file that was there is then as it was.
        TypeError, ValueError
            As `KVCache.save`. ValueError where a layer with a basis has no tokens yet, or a layer is of another kind
            than attention.
        """
        save_layers(path, self.layers, bits, _ordered(bases))

    @classmethod
    def load(
        cls, path: File, *, like: torch.Tensor | None = None, bases: Bases | None = None
    ) -> "LowRankCache":
        """Read a cache written by `save`, to go on from; nothing in the file is executed.

        Parameters
        ----------
        path : str, path-like or file opened for bytes
        like : torch.Tensor, optional
            On whose device the cache is to be; on the CPU by default.
        bases : sequence of AttentionBasis, or mapping from layers to them, optional
            For a file that was saved with them: the same ones.

        Returns
        -------
        LowRankCache
            With the options it was made with. Without bases it goes on but cannot be reset, to begin anew.

        Raises
        ------
        OSError
            If there is no such file, or it is a folder or a pipe.
        ValueError
            If the file is cut short, changed, or not what `save` writes.
        ImportError
            If a package is missing: safetensors, or constriction for a parked one.
        """
        cache = cls([])
        like = torch.empty(0) if like is None else like
        cache.layers = load_layers(path, like, _ordered(bases), _Layer.of)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(_bytes(layer, "nbytes") for layer in self.layers)

    @property
    def nbytes_exact(self) -> int:
        """Bytes that the keys and values held would take as they came."""
        return sum(_bytes(layer, "nbytes_exact") for layer in self.layers)

    @property
    def bits(self) -> float:
        """Average bits of a number in layers with a basis."""
        held = [x.cache.bits for x in self.layers if isinstance(x, _Layer) and x.cache is not None]
        return sum(held) / len(held) if held else math.nan

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Say for how many tokens a mask is made, and see which of them are padding."""
        # A cache is told no mask. What asks this is the function of transformers that has it.
        self._padding = _padding(sys._getframe(1).f_locals.get("attention_mask"))
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens of a layer; return the keys and values of all of its tokens."""
        if layer_idx >= len(self.layers):
            if not self._may_miss_layers:
                raise ValueError(
                    f"bases must have one for each layer, or None, got {len(self.layers)} for a model with more"
                )
            self.layers += [DynamicLayer() for _ in range(layer_idx + 1 - len(self.layers))]
        if isinstance(self.layers[layer_idx], _Layer):
            kwargs["padding"] = self._padding
        answer: tuple[torch.Tensor, torch.Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        if layer_idx == len(self.layers) - 1 and not self._has_warned:
            self._warn()
        return answer

    def _warn(self) -> None:
        """Say so where the cache saves nothing, though there are tokens enough to."""
        layers = [x for x in self.layers if isinstance(x, _Layer)]
        # Where queries choose, what is saved is time.
        held = [x.cache for x in layers if x.cache is not None and not x.chooses]
        is_long = any(int(cache.lengths.max()) >= LONG for cache in held)
        if is_long and self.nbytes > self.nbytes_exact:
            self._has_warned = True
            warnings.warn(
                f"this cache takes {self.nbytes} bytes where exact keys and values take {self.nbytes_exact}: "
                "use fewer bits, a smaller rank or window, or a narrower dtype",
                stacklevel=3,
            )


def _padding(mask: Any) -> Padding | None:
    """How many tokens each sequence has before its first real one, by a mask (B, n)."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or torch.compiler.is_compiling():
        return None
    before: Padding = ((mask != 0).cumsum(-1) == 0).sum(-1).cpu().numpy()
    return before


def _rolled(x: torch.Tensor, shifts: Padding, dim: int = -2) -> torch.Tensor:
    """Roll each sequence along an axis by its own number of places."""
    return torch.stack([one.roll(int(n), dim) for one, n in zip(x, shifts, strict=True)])


def _attended_to(
    k: torch.Tensor, v: torch.Tensor, attend: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys that say how to attend to them."""
    k = k.view_as(k)
    setattr(k, ATTEND, attend)
    return k, v


def _bytes(layer: CacheLayerMixin, kind: str) -> int:
    """Bytes of a layer, one of `_Layer` as its cache counts them."""
    if isinstance(layer, _Layer):
        return 0 if layer.cache is None else int(getattr(layer.cache, kind))
    held = (x for x in vars(layer).values() if isinstance(x, torch.Tensor))
    return sum(x.nbytes for x in held)


def _ordered(bases: Bases | None) -> Sequence[AttentionBasis | None]:
    """One for each layer, or None."""
    return _by_layer(bases) if isinstance(bases, Mapping) else bases or []


def _by_layer(bases: Mapping[str, AttentionBasis]) -> list[AttentionBasis | None]:
    """Put bases in the order of the layers that their names say, None between them."""
    places = {}
    for name, basis in bases.items():
        numbers = re.findall(r"\d+", str(name))
        if not numbers or int(numbers[-1]) in places:
            raise ValueError(
                f"bases must be named by layers with a number of their own, got {list(bases)}"
            )
        places[int(numbers[-1])] = basis
    return [places.get(i) for i in range(max(places, default=-1) + 1)]


class _Layer(CacheLayerMixin):
    """One layer: the methods that transformers calls."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, basis: AttentionBasis | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.basis, self.options = basis, options
        self.cache: KVCache | None = None
        # Tokens before the first real one, which the cache does not hold.
        self.padding: Padding = np.zeros(0, dtype=np.int64)

    @classmethod
    def of(cls, cache: KVCache, padding: Padding, basis: AttentionBasis | None) -> "_Layer":
        """Make one of what a file holds."""
        layer = cls(basis, {name: getattr(cache._contents.layout, name) for name in OPTIONS})
        layer.cache, layer.padding, layer.is_initialized = cache, padding, True
        return layer

    @property
    def chooses(self) -> bool:
        """Whether queries choose the keys that they read in full."""
        return any(self.options.get(name) is not None for name in ("n_top", "top_p"))

    @property
    def rotary(self) -> tuple[float, ...]:
        """Frequencies of the rotation that keys are stored before; none where they are stored after it."""
        return (self.cache and self.cache._contents.layout.rotary) or ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        assert self.basis is not None
        options, coding = self.options, self.basis.coding
        is_coded = any(options.get(name) is not None for name in ("bits", "rtol"))
        if is_coded and coding is not None and coding.rotary.shape[-1]:
            options = options | {"rotary": coding.rotary[(0,) * (coding.rotary.ndim - 1)]}
        self.cache = KVCache(self.basis, batch=tuple(key_states.shape[:1]), **options)
        self.padding = np.zeros(len(key_states), dtype=np.int64)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        padding: Padding | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens, of which some of the first may be padding; return the keys and values of all."""
        is_prompt = self.cache is None
        n_new = key_states.shape[-2]
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None
        self._append(key_states, value_states, padding)
        if is_prompt and self.chooses:
            return _attended_to(
                key_states,
                value_states,
                lambda q, options: slra.attention(q, key_states, value_states, **options),
            )
        if is_prompt:
            return key_states, value_states
        if self.chooses:
            # Without features, so that no other attention takes them for keys.
            shape = (*key_states.shape[:2], self.get_seq_length(), 0)
            return _attended_to(
                key_states.new_empty(shape), value_states.new_empty(shape), self._attend
            )
        k, v = self.cache.decode()
        k = turned(k, self.rotary) if self.rotary else k
        k, v = k.to(key_states.dtype), v.to(value_states.dtype)
        if self.padding.any():
            # Beyond the length of a sequence there are zeros, which come to lie before it.
            missing = self.get_seq_length() - k.shape[-2]
            k, v = (
                _rolled(torch.nn.functional.pad(x, (0, 0, 0, missing)), self.padding)
                for x in (k, v)
            )
        # Those of this call see each other as they are: what is stored of them is for later calls.
        k[..., -n_new:, :], v[..., -n_new:, :] = key_states, value_states
        return k, v

    def _append(self, k: torch.Tensor, v: torch.Tensor, padding: Padding | None) -> None:
        assert self.cache is not None
        n_new, lengths = k.shape[-2], np.asarray(self.cache.lengths)
        skipped = np.zeros_like(lengths)
        # Without sinks it makes no difference which token is the first.
        has_sinks = bool(self.options.get("n_sink"))
        if has_sinks and padding is not None and padding.shape == lengths.shape:
            here = np.clip(padding - self.padding, 0, n_new)
            skipped = np.where(lengths == 0, here, skipped)
        if skipped.any():
            k, v = (_rolled(x, -skipped) for x in (k, v))
        if self.rotary:
            starts = zip(k, lengths, strict=True)
            k = torch.stack([turned(x, self.rotary, int(n), back=True) for x, n in starts])
        if not skipped.any():
            self.cache = self.cache.append(k, v)
            return
        counts = n_new - skipped
        # What all have comes first: steps of a cache in bits are chosen by it.
        n = int(counts.min())
        self.cache = self.cache.append(k[..., :n, :], v[..., :n, :])
        self.cache = self.cache.append(k[..., n:, :], v[..., n:, :], lengths=counts - n)
        self.padding = self.padding + skipped

    def _attend(self, q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Attend to the cache, with the options that a model gives."""
        if options["softcap"] is not None:
            raise ValueError("n_top and top_p must be left out for a model with a softcap")
        assert self.cache is not None
        if options["scale"] is not None:
            # That of the cache is the usual one.
            q = q * (options["scale"] * q.shape[-1] ** 0.5)
        mask = options["mask"]
        if mask is not None and self.padding.any():
            mask = _rolled(mask.expand(len(q), *mask.shape[1:]), -self.padding, dim=-1)
            mask = mask[..., : int(self.cache.lengths.max())]
        answer: torch.Tensor = self.cache.attend(q, mask=mask, sinks=options["sinks"])
        return answer

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else int((self.cache.lengths + self.padding).max())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers gives their number as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if self.cache is not None and tokens_to_remove:
            n = max(0, self.get_seq_length() + tokens_to_remove)
            self.cache = self.cache.crop(np.maximum(0, n - self.padding))
            self.padding = np.minimum(self.padding, n)

    def reset(self) -> None:
        if self.basis is None:
            raise ValueError(
                "a cache that was loaded without its bases cannot begin anew: give them to load"
            )
        self.cache, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            n = self.cache.lengths.shape[0]
            self.batch_select_indices(torch.arange(n).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.cache is not None:
            self.cache = self.cache.select(indices)
            self.padding = self.padding[indices.cpu().numpy()]

    def offload(self) -> None:
        raise NotImplementedError("a LowRankCache stays on its device")

    prefetch = offload
