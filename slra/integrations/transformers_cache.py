"""A compressed key/value cache for ``model.generate(cache=...)`` of Hugging Face transformers.

Needs: transformers, torch. Between steps each layer holds a `slra.KVCache`; for a step its keys and values are decoded
to all dimensions, because that is what a model's attention takes. It saves memory, not time.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from slra.attn.basis import AttentionBasis
from slra.cache import KVCache

__all__ = ["LowRankCache"]


class LowRankCache(Cache):
    """Past keys and values in the dimensions of calibrated bases.

    Parameters
    ----------
    bases : sequence of AttentionBasis, or mapping from layers to them
        One for each attention layer, in the order of the layers, or by their names, as `calibrate` returns them: the
        last number in a name says which layer it is. Layers without a basis (left out of a mapping, None in a sequence)
        keep exact keys and values. Of torch tensors on the layer's device, fitted with ``pool_batch=True`` to queries,
        keys and values as attention gets them, after any rotary embedding.
    **options
        As for `slra.KVCache`: ``window``, ``n_sink``, ``n_sparse``, ``dtype``.

    Attributes
    ----------
    nbytes : int
        Bytes of all layers, bases and exact tokens among them.

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
    calls attend to what is left of them. Beam search works; cropping (assisted generation) does not, and layers with a
    sliding window are not known.

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
        self, bases: Sequence[AttentionBasis] | Mapping[str, AttentionBasis], **options: Any
    ) -> None:
        if unknown := set(options) - {"window", "n_sink", "n_sparse", "dtype"}:
            raise TypeError(f"options must be those of a cache with a fixed basis, got {unknown}")
        self._may_miss_layers = isinstance(bases, Mapping)
        ordered = _by_layer(bases) if isinstance(bases, Mapping) else bases
        super().__init__(
            layers=[
                DynamicLayer() if basis is None else _Layer(basis, options) for basis in ordered
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        held = (layer for layer in self.layers if layer.is_initialized)
        return sum(
            layer.cache.nbytes
            if isinstance(layer, _Layer) and layer.cache is not None
            else layer.keys.nbytes + layer.values.nbytes
            for layer in held
        )

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
        return answer


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
    supports_early_init = False

    def __init__(self, basis: AttentionBasis, options: dict[str, Any]) -> None:
        super().__init__()
        self.basis, self.options = basis, options
        self.cache: KVCache | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.cache = KVCache(self.basis, batch=tuple(key_states.shape[:1]), **self.options)
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
        self.cache = self.cache.append(key_states, value_states)
        if is_prompt:
            return key_states, value_states
        k, v = self.cache.decode()
        k, v = k.to(key_states.dtype), v.to(value_states.dtype)
        # Those of this call see each other as they are: what is stored of them is for later calls.
        k[..., -n_new:, :], v[..., -n_new:, :] = key_states, value_states
        return k, v

    def get_seq_length(self) -> int:
        return 0 if self.cache is None else int(self.cache.lengths.max())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

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
