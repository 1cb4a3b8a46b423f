"""First-order solvers for a sum of two functions, one of which has a proximal operator."""

from slra.solvers._loop import Progress, SolveResult
from slra.solvers.admm import admm
from slra.solvers.proximal_gradient import proximal_gradient

__all__ = ["Progress", "SolveResult", "admm", "proximal_gradient"]
