"""Proximal operators, projections, and the functions they belong to.

``prox_name(x, tau)`` is ``argmin_y tau * norm_name(y) + 1/2 ||y - x||^2``, whether or not ``norm_name`` is a norm;
``project_name(x, ...)`` is the nearest point of a set, whose function is 0 inside and infinity outside.
"""

from slra.prox.box import project_box
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
from slra.prox.nuclear import norm_nuclear, prox_nuclear
from slra.prox.rank import project_rank

__all__ = [
    "norm_elastic_net",
    "norm_huber",
    "norm_l0",
    "norm_l1",
    "norm_l2",
    "norm_l21",
    "norm_linf",
    "norm_nonneg_l1",
    "norm_nuclear",
    "project_box",
    "project_l1_ball",
    "project_l2_ball",
    "project_rank",
    "project_simplex",
    "prox_elastic_net",
    "prox_huber",
    "prox_l0",
    "prox_l1",
    "prox_l2",
    "prox_l21",
    "prox_linf",
    "prox_nonneg_l1",
    "prox_nuclear",
]
