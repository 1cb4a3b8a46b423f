"""A compressed key/value cache for ``model.generate(cache=...)`` of Hugging Face transformers.

Needs: transformers, torch. Between steps each layer holds a `slra.KVCache`; for a step its keys and values are decoded
to all dimensions, because that is what a model's attention takes: it saves memory, not time. Only where queries choose
their keys (``n_top``) do they attend to the cache itself, by the attention registered in `slra.integrations`.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

import slra
from slra.attn.basis import AttentionBasis
from slra.cache import KVCache
from slra.integrations._transformers_layer import ATTEND
from slra.integrations._transformers_rotary import turned

__all__ = ["LowRankCache"]

OPTIONS = {"window", "n_sink", "n_sparse", "dtype", "bits", "rtol", "n_top", "top_p"}
OPTIONS |= {"rank_index", "index"}
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
    look-up need; ``n_sink`` counts padding on the left as tokens. Where keys are stored before the rotary embedding,
    those kept exact are rounded to their dtype once more, and a step rotates all keys.

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
        bases: Sequence[AttentionBasis] | Mapping[str, AttentionBasis],
        *,
        config: Any = None,
        **options: Any,
    ) -> None:
        if unknown := set(options) - OPTIONS:
            raise TypeError(f"options must be those of a cache with a fixed basis, got {unknown}")
        self._may_miss_layers = isinstance(bases, Mapping)
        ordered = _by_layer(bases) if isinstance(bases, Mapping) else bases
        layers = [] if config is None else DynamicCache(config=config).layers
        layers += [DynamicLayer() for _ in range(len(ordered) - len(layers))]
        for i, basis in enumerate(ordered):
            # Of a sliding window, and of what is not attention, all is needed and there is little.
            if basis is not None and type(layers[i]) is DynamicLayer:
                layers[i] = _Layer(basis, options)
        super().__init__(layers=layers)
        self._has_warned = False

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

    def __init__(self, basis: AttentionBasis, options: dict[str, Any]) -> None:
        super().__init__()
        self.basis, self.options = basis, options
        self.cache: KVCache | None = None

    @property
    def chooses(self) -> bool:
        """Whether queries choose the keys that they read in full."""
        return any(self.options.get(name) is not None for name in ("n_top", "top_p"))

    @property
    def rotary(self) -> tuple[float, ...]:
        """Frequencies of the rotation that keys are stored before; none where they are stored after it."""
        return (self.cache and self.cache._contents.layout.rotary) or ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        options, coding = self.options, self.basis.coding
        is_coded = any(options.get(name) is not None for name in ("bits", "rtol"))
        if is_coded and coding is not None and coding.rotary.shape[-1]:
            options = options | {"rotary": coding.rotary[(0,) * (coding.rotary.ndim - 1)]}
        self.cache = KVCache(self.basis, batch=tuple(key_states.shape[:1]), **options)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens; return the keys and values of all."""
        is_prompt = self.cache is None
        n_new = key_states.shape[-2]
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None
        stored = key_states
        if self.rotary:
            stored = turned(key_states, self.rotary, self.get_seq_length(), back=True)
        self.cache = self.cache.append(stored, value_states)
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
        # Those of this call see each other as they are: what is stored of them is for later calls.
        k[..., -n_new:, :], v[..., -n_new:, :] = key_states, value_states
        return k, v

    def _attend(self, q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Attend to the cache, with the options that a model gives."""
        if options["softcap"] is not None:
            raise ValueError("n_top and top_p must be left out for a model with a softcap")
        assert self.cache is not None
        if options["scale"] is not None:
            # That of the cache is the usual one.
            q = q * (options["scale"] * q.shape[-1] ** 0.5)
        answer: torch.Tensor = self.cache.attend(q, mask=options["mask"], sinks=options["sinks"])
        return answer

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else int(self.cache.lengths.max())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers gives their number as a negative one."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        if self.cache is not None and tokens_to_remove:
            self.cache = self.cache.crop(max(0, self.get_seq_length() + tokens_to_remove))

    def reset(self) -> None:
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

    def offload(self) -> None:
        raise NotImplementedError("a LowRankCache stays on its device")

    prefetch = offload
