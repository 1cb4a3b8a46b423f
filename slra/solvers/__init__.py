"""First-order solvers for sums of functions that have gradients or proximal operators."""

from slra.solvers._loop import Progress, SolveResult
from slra.solvers.admm import admm
from slra.solvers.primal_dual import primal_dual
from slra.solvers.proximal_gradient import proximal_gradient

__all__ = ["Progress", "SolveResult", "admm", "primal_dual", "proximal_gradient"]
