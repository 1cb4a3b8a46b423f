"""Principal component pursuit: a low-rank matrix and a sparse one out of their sum."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from slra._backends import Backend
from slra._backends.ambient import isolated
from slra._backends.standard import matrix_h
from slra._typing import RNG, Array
from slra._validate import (
    check_axis,
    check_callable,
    check_count,
    check_finite,
    check_known_weight,
    check_matrix,
    check_positive,
    check_rank,
    check_rng,
    is_kind,
    promote,
    resolve,
)
from slra.prox.nuclear import MIN_PARTIAL, is_harmless, partial_svd
from slra.svd import randomized_svd
from slra.svd._linear_map import brought_in_range, power_of_two, scaled_back
from slra.svd.truncated import thin_svd

__all__ = ["RobustPCAResult", "robust_pca"]

# The dual residual may be this many times the primal one: it is a number of order one, not of x's accuracy.
DUAL_SLACK = 10.0
# While the residual falls as for exact recovery the penalty grows, as published; the factor is that of Lin et al.
PENALTY_GROWTH = 1.5
# The residual has stalled when it is more than this part of what it was so many iterations ago; not before FIRST.
STALLED, LOOK_BACK, FIRST = 0.3, 10, 20
# From then on the penalty stays for so long, and is changed at most so often: ADMM converges with one that stays.
# Where the residuals are far apart it does not stay for so long.
PERIOD, SHORT_PERIOD, MAX_CHANGES = 50, 10, 12
# What a Gram matrix and its eigenvectors cost beside an SVD; where the leading triplets would cost more, they are not
# tried again for so many iterations.
GRAM_COST, PAUSE = 0.3, 10
# Differences that the extrapolation combines. On ten matrices 5 took up to 50% more iterations than 8, and 15 no
# fewer; two arrays of the size of x are kept for each.
MEMORY = 6
# An extrapolated point whose step is this many times the shortest so far is given up.
SAFEGUARD = 2.0


class RobustPCAResult(NamedTuple):
    """A matrix taken apart, ``x ~ low_rank + sparse``.

    Attributes
    ----------
    low_rank, sparse : array
        The two parts, in the shape of ``x``; ``sparse`` is zero where nothing was observed.
    n_iter : int
        Number of iterations made; for a batch an array with that of each matrix.
    residual : float
        What ``tol`` is compared with, of the parts returned: the larger of the relative primal residual and a tenth of
        the dual one. For a batch a real array.
    converged : bool
        Whether ``residual`` is at most ``tol``; for a batch a boolean array.
    history : array, shape (n_iter, ...)
        Residual after each iteration, real; that of a matrix of a batch stays as it is after its last one.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.ones((20, 20))
    >>> x[3, 4] = 9.0
    >>> result = slra.robust_pca(x)
    >>> result.converged, float(result.sparse[3, 4].round(3)), float(result.low_rank[3, 4].round(3))
    (True, 8.0, 1.0)
    >>> result.history.shape == (result.n_iter,)
    True
    """

    low_rank: Array
    sparse: Array
    n_iter: Any
    residual: Any
    converged: Any
    history: Array


@isolated
def robust_pca(
    x: Array,
    l1: float | None = None,
    *,
    mask: Array | None = None,
    noise: float = 0.0,
    rank: int | None = None,
    frame_axis: int | None = None,
    tol: float = 1e-7,
    max_iter: int = 2000,
    callback: Callable[[RobustPCAResult], Any] | None = None,
    rng: RNG = None,
) -> RobustPCAResult:
    r"""Split a matrix into a low-rank and a sparse part (principal component pursuit).

    Parameters
    ----------
    x : array, shape (..., m, n)
        Real or complex floating; half precision is computed in float32. A batch is so many problems, each with a
        penalty, a residual and an end of its own. Values must be there to be looked at: the number of iterations and
        the ranks depend on them, so traced and Dask arrays are refused.
    l1 : float or 0-d array, optional
        Weight of the sparse part; ``1 / sqrt(max(m, n))`` by default, over the root of the observed fraction.
    mask : boolean array, shape of x, optional
        True where ``x`` was observed; anything may stand elsewhere, NaN too.
    noise : float or 0-d array
        Frobenius norm of the dense noise: so much of each matrix may be left to neither part. 0 leaves nothing.
        For independent noise of standard deviation s, ``s * sqrt(m * n)``.
    rank : int, optional
        Bound on the rank of the low-rank part. The problem is then not convex, and what converged is a point where
        both steps stand still.
    frame_axis : int, optional
        For a video of any number of axes: the one that counts the frames. Each frame becomes a column of one matrix;
        the parts come back in the shape of ``x``.
    tol : float
        Relative residual to stop at; taken to be at least 30 times the spacing of numbers at 1 (3.6e-6 in float32).
    max_iter : int
        Largest number of iterations.
    callback : callable, optional
        Called after each iteration with a `RobustPCAResult`, as if it were the last; a true answer makes it the last.
    rng : int, numpy.random.Generator or None
        Where the starts of the partial SVDs are drawn from.

    Returns
    -------
    RobustPCAResult
        In the dtype and on the device of ``x``. ``converged`` is False where ``max_iter`` came first.

    Raises
    ------
    TypeError
        If ``x`` is not a floating array, ``mask`` not a boolean array of the same library, or an option of a wrong
        type.
    ValueError
        If ``x`` has fewer than two axes, is empty, has NaN or infinity where observed, or has values that cannot be
        looked at; if ``mask`` has another shape or is False everywhere in a matrix; if an option is out of range.

    Notes
    -----
    .. math:: \min_{L, S} \|L\|_* + \ell_1 \|S\|_1 \quad \text{subject to} \quad
        \|x - L - S\|_F \le \delta \text{ where observed}

    by ADMM: with ``P = x - L`` to the rounding of the residual, singular values of ``x - P + Y/mu`` shrink by ``1/mu``
    to give L; what the thresholds ``l1/mu`` take off ``x - L + Y/mu`` is the next ``Y/mu``, and the rest the next P,
    which is S without noise. After each iteration Y is in ``l1`` times the subdifferential of ``||S||_1``, and misses
    that of ``||L||_*`` by ``mu (P - P_old)``, the dual residual, here relative to ``||Y||_F``.

    The published penalty grows geometrically and stops on the primal residual alone; with dense noise it then stops
    short of a minimiser. Here it grows while the residual falls as for exact recovery. Once that stalls it follows the
    two residuals a few times, at long intervals, and the steps are extrapolated by Anderson's method, with a return to
    the last step where that lengthens them. Without ``rank`` the problem is convex: what converged is a solution, up
    to the residual.

    References
    ----------
    E. J. Candes, X. Li, Y. Ma, J. Wright, Robust principal component analysis?, Journal of the ACM 58 (2011), 11;
    Z. Lin, M. Chen, Y. Ma, The augmented Lagrange multiplier method for exact recovery of corrupted low-rank matrices,
    arXiv:1009.5055 (2010), Algorithm 5; with noise: Z. Zhou, X. Li, J. Wright, E. Candes, Y. Ma, Stable principal
    component pursuit, ISIT 2010; H. F. Walker, P. Ni, Anderson acceleration for fixed-point iterations, SIAM Journal on
    Numerical Analysis 49 (2011), 1715-1735.

    Examples
    --------
    >>> import numpy as np
    >>> import slra
    >>> x = np.outer(np.arange(1.0, 31.0), np.ones(20))
    >>> x[3, 4] += 100
    >>> result = slra.robust_pca(x, rng=0)
    >>> result.converged, round(float(result.sparse[3, 4]), 3)
    (True, 100.0)
    """
    backend = resolve(x=x, optional={"mask": mask})
    xp = backend.xp
    check_matrix(x, "x")
    if not backend.can_iterate(x):
        raise ValueError(
            "x must have values that can be looked at: robust_pca iterates until they say so, "
            "which neither a traced function nor a lazy array can follow"
        )
    promoted = promote(backend, x=x)
    (work,) = promoted.arrays
    _check_observed(mask, x, backend)
    if mask is not None:
        work = xp.where(mask, work, 0.0)
    check_finite(backend, work, "x")
    layout = _layout(x, frame_axis)
    work = layout.matrices(work, xp)
    mask = None if mask is None else layout.matrices(mask, xp)
    if rank is not None:
        smallest = min(work.shape[-2:])
        rank = check_rank(rank, smallest, limit_is="min of the two axes of one matrix of x")
    limits = xp.finfo(work.dtype)
    weights = _weights(l1, mask, work, limits, backend)
    tol = max(check_positive(tol, "tol"), 30 * float(limits.eps))
    delta = check_known_weight(backend, noise, "noise", limits=limits)
    generator = check_rng(rng)
    check_callable(callback, "callback", optional=True)
    if (limit := check_count(max_iter, "max_iter")) == 0:
        raise ValueError("max_iter must be 1 or more, got 0")
    work, exponent = brought_in_range(work, backend)
    allowed = delta * xp.ones_like(xp.abs(work[:, :1, :1]))
    if exponent is not None:
        allowed = power_of_two(allowed, exponent, backend)

    def as_result(
        low_rank: Array, sparse: Array, n_iter: np.ndarray[Any, Any], history: list[Any]
    ) -> RobustPCAResult:
        if mask is not None:
            sparse = xp.where(mask, sparse, 0.0)
        parts = [scaled_back(part, exponent, backend) for part in (low_rank, sparse)]
        L, S = (layout.original(part, xp) for part in promoted.cast_back(backend, *parts))
        residuals = np.asarray(history).reshape(len(history), *layout.batch)
        last = residuals[-1] if history else np.zeros(layout.batch)
        counts, done = n_iter.reshape(layout.batch), last <= tol
        real = backend.real_dtype(work.dtype)
        told = backend.from_numpy(residuals, work, real)
        if not layout.batch:
            return RobustPCAResult(L, S, int(counts), float(last), bool(done), told)
        device = backend.creation_device(work)
        n_iter, is_done = (xp.asarray(a, device=device) for a in (counts, done))
        return RobustPCAResult(L, S, n_iter, backend.from_numpy(last, work, real), is_done, told)

    return _pursue(
        work,
        mask,
        weights,
        backend.to_numpy(allowed)[:, 0, 0].astype(float),
        (rank, tol, limit),
        generator,
        backend,
        as_result,
        callback,
    )


class _Layout(NamedTuple):
    """How ``x`` becomes a batch of matrices, (B, m, n), and back: ``order`` of its axes, shapes before and after."""

    order: tuple[int, ...]
    permuted: tuple[int, ...]
    batch: tuple[int, ...]
    matrix: tuple[int, int]

    def matrices(self, x: Array, xp: Any) -> Array:
        return xp.reshape(xp.permute_dims(x, self.order), (-1, *self.matrix))

    def original(self, x: Array, xp: Any) -> Array:
        back = tuple(sorted(range(len(self.order)), key=self.order.__getitem__))
        return xp.permute_dims(xp.reshape(x, self.permuted), back)


def _layout(x: Array, frame_axis: int | None) -> _Layout:
    shape = tuple(x.shape)
    if frame_axis is None:
        return _Layout(tuple(range(x.ndim)), shape, shape[:-2], shape[-2:])
    (frames,) = check_axis(x, (frame_axis,), "frame_axis")
    order = (*(a for a in range(x.ndim) if a != frames), frames)
    n = shape[frames]
    return _Layout(order, tuple(shape[a] for a in order), (), (math.prod(shape) // n, n))


def _check_observed(mask: Array | None, x: Array, backend: Backend) -> None:
    if mask is None:
        return
    if not is_kind(backend.xp, mask.dtype, "bool"):
        raise TypeError(f"mask must be boolean, True where x was observed, got {mask.dtype}")
    if tuple(mask.shape) != tuple(x.shape):
        raise ValueError(
            f"mask must have the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}"
        )


def _weights(
    l1: float | None, mask: Array | None, x: Array, limits: Any, backend: Backend
) -> np.ndarray[Any, Any]:
    """Weight of the sparse part of each matrix."""
    observed = np.ones(x.shape[0])
    if mask is not None:
        counts = backend.to_numpy(backend.xp.count_nonzero(mask, axis=(-2, -1)))
        observed = counts / math.prod(x.shape[-2:])
        if not np.all(observed):
            raise ValueError("mask must be True somewhere in each matrix")
    if l1 is None:
        return np.asarray(1 / np.sqrt(observed * max(x.shape[-2:])))
    weight = check_known_weight(backend, l1, "l1", limits=limits, allow_zero=False)
    return np.full(x.shape[0], weight)


def _pursue(
    x: Array,
    mask: Array | None,
    l1: np.ndarray[Any, Any],
    noise: np.ndarray[Any, Any],
    limits: tuple[int | None, float, int],
    rng: np.random.Generator,
    backend: Backend,
    as_result: Callable[..., RobustPCAResult],
    callback: Callable[[RobustPCAResult], Any] | None,
) -> RobustPCAResult:
    """Step until each matrix has converged, those that have being left out of the rest."""
    xp, (rank, tol, max_iter) = backend.xp, limits
    peak = backend.to_numpy(xp.max(xp.abs(x), axis=(-2, -1))).astype(float)
    parts = [(xp.zeros_like(one), xp.zeros_like(one)) for one in (x[0, ...],)] * x.shape[0]
    n_iter, history = np.zeros(x.shape[0], int), [np.zeros(x.shape[0])]
    left = np.flatnonzero(peak)

    def result() -> RobustPCAResult:
        low_rank, sparse = (xp.stack([pair[i] for pair in parts]) for i in (0, 1))
        return as_result(low_rank, sparse, n_iter, history[1:])

    if not left.size:
        return result()
    if left.size < x.shape[0]:
        places = xp.asarray(left, device=backend.creation_device(x))
        x, mask = (a if a is None else xp.take(a, places, axis=0) for a in (x, mask))
    scale = backend.from_numpy(peak[left, None, None], x, backend.real_dtype(x.dtype))
    run = _Pursuit(x / scale, l1[left], mask, noise[left] / peak[left], rank, tol, rng, backend)
    while True:
        low_rank, sparse, residual = run.step()
        n_iter[left] += 1
        history.append(history[-1].copy())
        history[-1][left] = residual
        is_last = n_iter[left] == max_iter
        for j, i in enumerate(left):
            if callback is not None or is_last[j] or residual[j] <= tol:
                parts[i] = low_rank[j, ...] * float(peak[i]), sparse[j, ...] * float(peak[i])
        if callback is not None and callback(result()):
            break
        going = np.flatnonzero((residual > tol) & ~is_last)
        if not going.size:
            break
        if going.size < left.size:
            left = left[going]
            run.keep(going)
        run.advance()
    return result()


class _Pursuit:
    """A batch of problems, (B, m, n) with ``max|x| = 1``: what each has reached, its penalty and its memory.

    One step of ADMM is a map ``F(Z)`` of one array, because ``Z = P + C`` holds what is left of x, ``P``, and the
    multiplier over the penalty, ``C``, and tells them apart. What decides is kept on the host, one number a matrix.
    """

    def __init__(
        self,
        x: Array,
        l1: np.ndarray[Any, Any],
        mask: Array | None,
        noise: np.ndarray[Any, Any],
        rank: int | None,
        tol: float,
        rng: np.random.Generator,
        backend: Backend,
    ) -> None:
        xp = backend.xp
        self.backend, self.rng, self.rank, self.tol = backend, rng, rank, tol
        self.x, self.noise = x, noise
        # Where nothing was observed the sparse part costs nothing and takes up what is left over.
        ones = xp.ones_like(xp.abs(x[:, :1, :1]))
        ones = ones if mask is None else xp.where(mask, xp.ones_like(xp.abs(x)), 0.0)
        self.weight = ones * self._column(l1)
        self.norm = self._norms(x)
        largest = backend.to_numpy(randomized_svd(x, 1, rng=rng).S)[:, 0].astype(float)
        self.penalty = 1.25 / largest
        self.P = xp.zeros_like(x)
        self.C = x * self._column(1 / np.maximum(largest, 1 / l1) / self.penalty)
        n = x.shape[0]
        self.bases: list[Array | None] = [None] * n
        self.pause = np.zeros(n, int)
        self.threshold = 1 / self.penalty
        self.is_growing = np.ones(n, bool)
        self.since, self.n_changes = np.full(n, PERIOD), np.zeros(n, int)
        self.is_extrapolated, self.shortest = np.zeros(n, bool), np.full(n, np.inf)
        self.history: list[np.ndarray[Any, Any]] = []
        self.plain = x
        self._forget_all()

    def step(self) -> tuple[Array, Array, np.ndarray[Any, Any]]:
        """Low-rank part, sparse part and residual of each matrix after one more step."""
        self.low_rank = self._shrink(self.x - self.P + self.C)
        self.F = self.x - self.low_rank + self.C
        self.C_next = self._split(self.F)
        self.P_next = self.F - self.C_next
        sparse = self.P_next
        if np.any(self.noise > 0):
            # The rest of P is the part of the noise.
            sparse = self.backend.soft_threshold(self.F, self.weight * self._column(self.threshold))
        self.primal = self._norms(self.C_next - self.C) / self.norm
        size = self._norms(self.C_next)
        self.dual = self._norms(self.P_next - self.P) / np.where(size == 0, 1.0, size)
        residual = np.maximum(self.primal, self.dual / DUAL_SLACK)
        self.history.append(residual)
        return self.low_rank, sparse, residual

    def advance(self) -> None:
        """Choose the next point of each matrix: with another penalty, extrapolated, or as the step left it."""
        factor = self._penalty_factor()
        is_changed = self.is_growing | (factor != 1)
        move = self.F - (self.P + self.C)
        length = self._norms(move)
        is_rejected = self.is_extrapolated & ~is_changed & (length > SAFEGUARD * self.shortest)
        self._forget(is_changed | is_rejected)
        self.shortest = np.where(is_changed, np.inf, np.minimum(length, self.shortest))
        self.penalty = self.penalty * factor
        if np.all(is_changed):
            self.P, self.C = self.P_next, self.C_next / self._column(factor)
            self.is_extrapolated[:] = False
            return
        self._remember(move, ~(is_changed | is_rejected))
        point = self._where(is_rejected, self.plain, self._extrapolated(move))
        self.plain = self._where(is_rejected, self.plain, self.F)
        C = self._split(point)
        self.P = self._where(is_changed, self.P_next, point - C)
        self.C = self._where(is_changed, self.C_next / self._column(factor), C)

    def keep(self, index: np.ndarray[Any, Any]) -> None:
        """Go on with some of the matrices only."""
        xp = self.backend.xp
        places = xp.asarray(index, device=self.backend.creation_device(self.x))

        def take(a: Any) -> Any:
            if isinstance(a, list):
                return [take(one) for one in a]
            return a[index] if isinstance(a, np.ndarray) else xp.take(a, places, axis=0)

        self.bases = [self.bases[i] for i in index]
        names = ("x", "P", "C", "weight", "F", "C_next", "P_next", "plain", "last_F", "last_move")
        for name in (*names, "moves", "images", "history", "low_rank"):
            setattr(self, name, take(getattr(self, name)))
        for name in ("noise", "norm", "penalty", "threshold", "is_growing", "since", "n_changes"):
            setattr(self, name, getattr(self, name)[index])
        for name in ("pause", "is_extrapolated", "shortest", "has_last", "products", "is_alive"):
            setattr(self, name, getattr(self, name)[index])
        self.primal, self.dual = self.primal[index], self.dual[index]

    def _penalty_factor(self) -> np.ndarray[Any, Any]:
        """By how much each penalty changes.

        While a matrix looks recoverable, towards a primal residual a hundred times ahead of its share, as exact
        recovery wants it; afterwards seldom, towards equal shares, which dense noise wants.
        """
        residual = self.history[-1]
        if len(self.history) > max(FIRST, LOOK_BACK):
            self.is_growing = self.is_growing & (residual <= STALLED * self.history[-1 - LOOK_BACK])
        with np.errstate(divide="ignore"):
            lead = self.primal * DUAL_SLACK / self.dual
        low, high = np.where(self.is_growing, 0.01, 0.1), np.where(self.is_growing, 0.1, 1.0)
        # Rounding ends the fall of the dual residual sooner where the penalty is large.
        is_high = (lead < low) | (self.primal < self.tol / 4)
        direction = np.where(is_high, -1, np.where(lead > high, 1, 0))
        bound = np.where(is_high, low, high)
        aimed = np.clip(np.sqrt(np.clip(lead, 1e-6, 1e6) / bound), 0.25, 4.0)
        aimed = np.where(is_high, np.minimum(aimed, 1 / PENALTY_GROWTH), aimed)
        is_far = (self.since >= SHORT_PERIOD) & ((lead > 30 * high) | (lead < low / 30))
        is_due = ((self.since >= PERIOD) | is_far) & (direction != 0) & ~self.is_growing
        is_due &= self.n_changes < MAX_CHANGES
        self.since = np.where(is_due, 0, self.since + ~self.is_growing)
        self.n_changes = self.n_changes + is_due
        grown = PENALTY_GROWTH ** direction.astype(float)
        return np.where(self.is_growing, grown, np.where(is_due, aimed, 1.0))

    # Anderson's extrapolation (type II): the combination of the last steps that would be the shortest.

    def _forget_all(self) -> None:
        n = self.x.shape[0]
        self.moves: list[Array] = []
        self.images: list[Array] = []
        self.products = np.zeros((n, 0, 0))
        self.is_alive = np.zeros((n, 0), bool)
        self.has_last = np.zeros(n, bool)
        self.last_F, self.last_move = self.x, self.x

    def _forget(self, is_forgotten: np.ndarray[Any, Any]) -> None:
        self.is_alive[is_forgotten] = False
        self.has_last[is_forgotten] = False
        if not self.is_alive.any():
            self.moves, self.images = [], []
            self.products = self.products[:, :0, :0]
            self.is_alive = self.is_alive[:, :0]

    def _remember(self, move: Array, is_kept: np.ndarray[Any, Any]) -> None:
        if self.has_last.any():
            if len(self.moves) == MEMORY:
                del self.moves[0], self.images[0]
                self.products, self.is_alive = self.products[:, 1:, 1:], self.is_alive[:, 1:]
            self.moves.append(move - self.last_move)
            self.images.append(self.F - self.last_F)
            row = np.stack([self._inner(d, self.moves[-1]) for d in self.moves], axis=-1)
            k = len(self.moves)
            grown = np.zeros((len(row), k, k))
            grown[:, :-1, :-1] = self.products
            grown[:, -1, :] = grown[:, :, -1] = row
            self.products = grown
            self.is_alive = np.concatenate([self.is_alive, self.has_last[:, None]], axis=1)
        self.last_move, self.last_F, self.has_last = move, self.F, is_kept.copy()

    def _extrapolated(self, move: Array) -> Array:
        self.is_extrapolated = np.sum(self.is_alive, axis=1) >= 2
        if not self.is_extrapolated.any():
            return self.F
        is_used = self.is_alive & self.is_extrapolated[:, None]
        normal = np.where(is_used[:, :, None] & is_used[:, None, :], self.products, 0.0)
        right = np.stack([self._inner(d, move) for d in self.moves], axis=-1) * is_used
        size = np.trace(normal, axis1=1, axis2=2)[:, None, None]
        size = np.where(size > 0, size, 1.0)
        # Relative: what lies below is rounding of the products.
        normal = normal / size + 1e-10 * np.eye(normal.shape[-1])
        weights = np.linalg.solve(normal, (right[..., None] / size))[..., 0]
        point = self.F
        for image, weight in zip(self.images, weights.T, strict=True):
            point = point - self._column(weight) * image
        return point

    # The two proximal steps.

    def _shrink(self, x: Array) -> Array:
        """Shrink the singular values by one over the penalty."""
        xp, tau = self.backend.xp, 1 / self.penalty
        if min(x.shape[-2:]) < MIN_PARTIAL:
            return self._shrink_all(x, tau)
        return xp.stack([self._shrink_one(x[i, ...], i) for i in range(x.shape[0])])

    def _shrink_one(self, x: Array, i: int) -> Array:
        """By the leading triplets, from the last basis, where they are few."""
        backend, tau = self.backend, 1 / float(self.penalty[i])
        last = self.history[-1][i] if self.history else 1.0
        tol = float(max(min(1e-3, last / 100), self.tol / 100))
        found = None
        if self.pause[i] == 0 and is_harmless(x, backend):
            found = partial_svd(x, tau, self.bases[i], self.rng, tol, backend, GRAM_COST)
        if found is None:
            self.pause[i] = self.pause[i] - 1 if self.pause[i] else PAUSE
            return self._shrink_all(x[None, ...], self.penalty[i : i + 1] ** -1)[0, ...]
        S = backend.nonneg_threshold(found.S, tau)[: self.rank]
        kept = int(backend.xp.count_nonzero(S))
        self.bases[i] = found.Vh[:kept, :]
        return (found.U[:, :kept] * S[:kept]) @ found.Vh[:kept, :]

    def _shrink_all(self, x: Array, tau: np.ndarray[Any, Any]) -> Array:
        """By the eigenvectors of the smaller Gram matrix: ``x V diag(1 - tau / s) V^H`` over the s above tau."""
        backend, xp = self.backend, self.backend.xp
        if x.shape[-2] < x.shape[-1]:
            return matrix_h(self._shrink_all(matrix_h(x, xp), tau), xp)
        squares, V = backend.small_eigh(backend.gram(x))
        S = np.sqrt(np.maximum(backend.to_numpy(squares).astype(float), 0.0))
        eps = float(xp.finfo(squares.dtype).eps)
        # Values near tau come with an error of eps sigma_1^2 / tau.
        if np.any(S[:, -1] * eps > 0.01 * self.tol * tau):
            _, values, Vh = thin_svd(x, backend)
            S, V = (
                backend.to_numpy(values)[:, ::-1].astype(float),
                xp.flip(matrix_h(Vh, xp), axis=-1),
            )
        gain = np.maximum(1 - tau[:, None] / np.maximum(S, tau[:, None]), 0.0)
        if self.rank is not None:
            gain[:, : -self.rank] = 0.0
        kept = int(np.max(np.count_nonzero(gain, axis=-1)))
        gain, V = gain[:, gain.shape[-1] - kept :], V[..., V.shape[-1] - kept :]
        V = xp.astype(V, x.dtype)
        return (x @ V) @ matrix_h(V * xp.astype(self._to_xp(gain)[:, None, :], x.dtype), xp)

    def _split(self, Z: Array) -> Array:
        """Part of ``Z`` that is the multiplier over the penalty: what the l1 norm and the noise leave over."""
        self.threshold = 1 / self.penalty
        if np.any(self.noise > 0):
            return self._split_with_noise(Z)
        return Z - self.backend.soft_threshold(Z, self.weight * self._column(self.threshold))

    def _split_with_noise(self, Z: Array) -> Array:
        """Minimise ``l1 ||S||_1 + mu/2 ||Z - S - E||^2`` over S and ``||E|| <= noise``.

        ``S`` is a soft threshold of Z at ``l1 t``, with the t >= 1/mu for which what it takes off, less its part
        ``1/(mu t)``, has the norm of the noise. Both grow with t; clipped to the same entries, its square is
        ``a + b t^2``, which gives the next t.
        """
        backend, xp = self.backend, self.backend.xp
        low = 1 / self.penalty
        observed = xp.where(self.weight > 0, Z, 0.0)
        t, high, limit = low * 2, np.full_like(low, np.inf), self._norms(observed)
        is_inside = limit <= self.noise
        for _ in range(60):
            clipped = observed - backend.soft_threshold(observed, self.weight * self._column(t))
            is_clipped = xp.abs(observed) > self.weight * self._column(t)
            square = self._norms(clipped) ** 2
            b = self._norms(xp.where(is_clipped, self.weight, 0.0)) ** 2
            a = np.maximum(square - b * t * t, 0.0)
            excess = (1 - 1 / (self.penalty * t)) * np.sqrt(square) - self.noise
            low, high = np.where(excess <= 0, t, low), np.where(excess > 0, t, high)
            following = _root(a, b, 1 / self.penalty, self.noise, t)
            middle = np.where(np.isfinite(high), (low + high) / 2, 2 * low)
            following = np.where((following >= low) & (following <= high), following, middle)
            is_settled = np.abs(following - t) <= 1e-13 * t
            t = np.where(is_inside, t, following)
            if np.all(is_settled | is_inside):
                break
        self.threshold = np.where(is_inside, np.inf, t)
        clipped = observed - backend.soft_threshold(observed, self.weight * self._column(t))
        part = np.where(is_inside, 0.0, 1 / (self.penalty * t))
        return clipped * self._column(part)

    # Numbers of each matrix, on the host and beside the arrays.

    def _norms(self, a: Array) -> np.ndarray[Any, Any]:
        flat = self.backend.xp.linalg.vector_norm(a, axis=(-2, -1))
        return self.backend.to_numpy(flat).astype(float)

    def _inner(self, a: Array, b: Array) -> np.ndarray[Any, Any]:
        xp = self.backend.xp
        flat = [xp.reshape(c, (c.shape[0], -1)) for c in (a, b)]
        return np.real(self.backend.to_numpy(xp.linalg.vecdot(*flat))).astype(float)

    def _to_xp(self, numbers: np.ndarray[Any, Any]) -> Array:
        real = self.backend.real_dtype(self.x.dtype)
        largest = float(self.backend.xp.finfo(real).max)
        return self.backend.from_numpy(np.minimum(numbers, largest), self.x, real)

    def _column(self, numbers: np.ndarray[Any, Any]) -> Array:
        return self._to_xp(numbers[:, None, None])

    def _where(self, flags: np.ndarray[Any, Any], a: Array, b: Array) -> Array:
        if flags.all() or not flags.any():
            return a if flags.all() else b
        xp = self.backend.xp
        choice = xp.asarray(flags[:, None, None], device=self.backend.creation_device(self.x))
        return xp.where(choice, a, b)


def _root(a: Any, b: Any, least: Any, noise: Any, t: Any) -> Any:
    """Solve ``(1 - least/t)^2 (a + b t^2) = noise^2`` for t > least, by Newton's method on its root from above."""
    # What the caller does not use, of a matrix inside the ball, may overflow.
    with np.errstate(all="ignore"):
        for _ in range(50):
            size = np.sqrt(a + b * t * t)
            size = np.where(size == 0, 1.0, size)
            value = (1 - least / t) * size - noise
            slope = least / t / t * size + (1 - least / t) * b * t / size
            following = np.maximum(t - value / slope, (t + least) / 2)
            if np.all(np.abs(following - t) <= 1e-15 * t):
                break
            t = following
    return t
