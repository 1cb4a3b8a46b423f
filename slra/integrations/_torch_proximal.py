"""A proximal step after that of any optimizer of PyTorch whose steps are known entry by entry.

Needs: torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slra.objective import L1
from slra.prox.l1 import prox_l1

__all__ = ["ProximalOptimizer"]

Group = dict[str, Any]


class ProximalOptimizer(torch.optim.Optimizer):
    r"""Minimise a loss plus ``l1 * ||p||_1``: the optimizer's step, then a soft threshold in its metric.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        SGD, Adam, AdamW, RMSprop or Adagrad; any other with ``step_size``. State and
        parameter groups are shared with it; a scheduler of learning rates may be given either of the two.
    l1 : float or 0-d tensor
        lambda, 0 or more, for the groups of parameters that have no ``"l1"`` of their own. May be set later.
    step_size : callable, optional
        Given a parameter group, a parameter and its state after the step, returns what the gradient was multiplied by
        in the long run: a number, or a tensor of the shape of the parameter.

    Raises
    ------
    TypeError
        If the steps of the optimizer are not known and ``step_size`` is not given.
    ValueError
        If l1 is negative or not finite.

    Notes
    -----
    A step of SGD, or one scaled entry by entry as Adam's, is :math:`x - S g` with a diagonal S. Its fixed points with a
    prox behind it are minimisers only where the prox is that of the same metric: a threshold of :math:`S_i \lambda`.
    With the threshold :math:`\lambda \eta` of the bare learning rate Adam's fixed points are those of another, much
    smaller lambda. Momentum m adds gradients up to 1 / (1 - m) times one of them, and so S is as many times larger.

    Give weight decay, if any, to the loss or to AdamW: the minimiser is then that with it.

    Examples
    --------
    >>> import torch
    >>> from slra.integrations.torch import ProximalOptimizer
    >>> x, target = torch.nn.Parameter(torch.zeros(2)), torch.tensor([3.0, 0.5])
    >>> optimizer = ProximalOptimizer(torch.optim.Adam([x], lr=0.1), l1=1.0)
    >>> for _ in range(400):
    ...     optimizer.zero_grad()
    ...     ((x - target) ** 2).sum().div(2).backward()
    ...     _ = optimizer.step()
    >>> [round(one, 3) for one in x.tolist()]
    [2.0, 0.0]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        l1: float | Tensor = 0.0,
        *,
        step_size: Callable[[Group, Tensor, Group], Any] | None = None,
    ) -> None:
        if step_size is None:
            step_size = next(
                (known for kind, known in _KNOWN.items() if type(optimizer) is kind), None
            )
        if step_size is None:
            known = ", ".join(kind.__name__ for kind in _KNOWN)
            raise TypeError(
                f"optimizer must be one of {known}, or step_size be given, got {type(optimizer).__name__}"
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.l1, self.step_size = optimizer, l1, step_size
        self._share()
        for group in self.param_groups:
            _threshold(torch.zeros(()), 1.0, group.get("l1", l1))

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        """Make the optimizer's step, then soft-threshold the parameters that it moved."""
        loss = self.optimizer.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                l1 = group.get("l1", self.l1)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        size = self.step_size(group, parameter, self.state[parameter])
                        parameter.copy_(_threshold(parameter, size, l1))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the optimizer."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state


def _threshold(x: Tensor, size: Any, l1: L1) -> Tensor:
    thresholds = torch.as_tensor(l1, dtype=x.dtype, device=x.device) * size
    if thresholds.numel() and not bool((thresholds >= 0).all() & torch.isfinite(thresholds).all()):
        raise ValueError(f"l1 must be finite and 0 or more, got {l1!r}")
    return prox_l1(x, thresholds)


def _sgd(group: Group, parameter: Tensor, state: Group) -> Any:
    momentum, kept = group["momentum"], 1 - group["dampening"]
    if not momentum:
        return float(group["lr"])
    gain = kept / (1 - momentum)
    return float(group["lr"]) * (1 + momentum * gain if group["nesterov"] else gain)


def _adam(group: Group, parameter: Tensor, state: Group) -> Any:
    square = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    unbiased = square / (1 - group["betas"][1] ** float(state["step"]))
    return group["lr"] / (unbiased.sqrt() + group["eps"])


def _rmsprop(group: Group, parameter: Tensor, state: Group) -> Any:
    square = state["square_avg"]
    if group["centered"]:
        square = square - state["grad_avg"] ** 2
    return group["lr"] / ((square.sqrt() + group["eps"]) * (1 - group["momentum"]))


def _adagrad(group: Group, parameter: Tensor, state: Group) -> Any:
    lr = group["lr"] / (1 + (float(state["step"]) - 1) * group["lr_decay"])
    return lr / (state["sum"].sqrt() + group["eps"])


_KNOWN: dict[type, Callable[[Group, Tensor, Group], Any]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}
