"""Singular value decompositions."""

from slra.svd._result import SVDResult
from slra.svd.eigh import EighResult, randomized_eigh
from slra.svd.error import ErrorEstimate, estimate_error
from slra.svd.operator import MatrixOperator
from slra.svd.randomized import randomized_svd
from slra.svd.truncated import truncated_svd

__all__ = [
    "EighResult",
    "ErrorEstimate",
    "MatrixOperator",
    "SVDResult",
    "estimate_error",
    "randomized_eigh",
    "randomized_svd",
    "truncated_svd",
]
