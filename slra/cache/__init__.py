"""The compressed key/value cache.

`KVCache` checks what comes. Behind it `Contents` holds segments, each of tokens that were stored under one basis, and
the tokens that are kept exact.
"""

from slra.cache.kv_cache import KVCache

__all__ = ["KVCache"]
