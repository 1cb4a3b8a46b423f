"""Proximal operators."""

from slra.prox.l1 import prox_l1

__all__ = ["prox_l1"]
