"""The compressed key/value cache, a file per concern."""

from slra.attn.cache.cache import KVCache

__all__ = ["KVCache"]
