"""Proximal operators, projections, the functions they belong to, and how to make others of them.

``prox_name(x, tau)`` is ``argmin_y tau * norm_name(y) + 1/2 ||y - x||^2``, whether or not ``norm_name`` is a norm;
``project_name(x, ...)`` is the nearest point of a set, whose function is 0 inside and infinity outside.
"""

from slra.prox.box import project_box
from slra.prox.calculus import conjugate, envelope, scale, separable, translate
from slra.prox.groups import norm_groups, norm_sparse_group, prox_groups, prox_sparse_group
from slra.prox.huber import norm_huber, prox_huber
from slra.prox.l0 import norm_l0, prox_l0
from slra.prox.l1 import (
    norm_elastic_net,
    norm_l1,
    norm_nonneg_l1,
    prox_elastic_net,
    prox_l1,
    prox_nonneg_l1,
)
from slra.prox.l2 import norm_l2, norm_l21, project_l2_ball, prox_l2, prox_l21
from slra.prox.linf import norm_linf, project_l1_ball, project_simplex, prox_linf
from slra.prox.nonconvex import norm_mcp, norm_scad, prox_mcp, prox_scad
from slra.prox.nuclear import norm_nuclear, prox_nuclear
from slra.prox.quadratic import (
    norm_logistic,
    norm_quadratic,
    norm_squared_l2,
    prox_logistic,
    prox_quadratic,
    prox_squared_l2,
)
from slra.prox.rank import project_rank
from slra.prox.sets import project_affine, project_l0_ball
from slra.prox.slope import norm_slope, prox_slope
from slra.prox.spectral import project_nuclear_ball, project_psd
from slra.prox.total_variation import norm_tv, prox_tv

soft_threshold = prox_l1

__all__ = [
    "conjugate",
    "envelope",
    "norm_elastic_net",
    "norm_groups",
    "norm_huber",
    "norm_l0",
    "norm_l1",
    "norm_l2",
    "norm_l21",
    "norm_linf",
    "norm_logistic",
    "norm_mcp",
    "norm_nonneg_l1",
    "norm_nuclear",
    "norm_quadratic",
    "norm_scad",
    "norm_slope",
    "norm_sparse_group",
    "norm_squared_l2",
    "norm_tv",
    "project_affine",
    "project_box",
    "project_l0_ball",
    "project_l1_ball",
    "project_l2_ball",
    "project_nuclear_ball",
    "project_psd",
    "project_rank",
    "project_simplex",
    "prox_elastic_net",
    "prox_groups",
    "prox_huber",
    "prox_l0",
    "prox_l1",
    "prox_l2",
    "prox_l21",
    "prox_linf",
    "prox_logistic",
    "prox_mcp",
    "prox_nonneg_l1",
    "prox_nuclear",
    "prox_quadratic",
    "prox_scad",
    "prox_slope",
    "prox_sparse_group",
    "prox_squared_l2",
    "prox_tv",
    "scale",
    "separable",
    "soft_threshold",
    "translate",
]


def __dir__() -> list[str]:
    return __all__
