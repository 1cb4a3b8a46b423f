"""Singular value decompositions."""

from slra.svd._result import SVDResult
from slra.svd.randomized import randomized_svd
from slra.svd.truncated import truncated_svd

__all__ = ["SVDResult", "randomized_svd", "truncated_svd"]
