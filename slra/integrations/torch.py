"""A low-rank, l1-penalised attention layer for PyTorch, in the place of ``torch.nn.MultiheadAttention``.

Needs: torch.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slra._backends.ambient import isolated
from slra._validate import (
    check_choice,
    check_count,
    check_l1,
    check_positive,
    check_rank,
    resolve,
)
from slra.attn.fit import METHODS, Ranks
from slra.attn.projections import Projections, fit_projections
from slra.integrations._layer import (
    L1,
    Approximation,
    attend,
    check_form,
    mask_of_fit,
    what_is_seen,
)
from slra.integrations._torch_proximal import ProximalOptimizer

__all__ = ["LowRankAttention", "ProximalOptimizer", "Sparsity"]

# Buffers of each projection: a map down to r dimensions, one up, and their product.
_FACTORS = [(f"{x}_down", f"{x}_up", f"{x}_map") for x in "qkv"]
_MAPS = [product for _, _, product in _FACTORS]


class Sparsity(NamedTuple):
    """Fractions of entries that are exactly zero.

    Attributes
    ----------
    q, k, v : float
        Of Q^, K^ and V^, over batch, heads, tokens that are not hidden, and features.

    Examples
    --------
    >>> import torch
    >>> from slra.integrations.torch import LowRankAttention
    >>> layer = LowRankAttention(16, 2, batch_first=True, l1=1e6, l1_form="prox").eval()
    >>> x = torch.randn(3, 10, 16)
    >>> _ = layer(x, x, x, need_weights=False)
    >>> layer.sparsity()
    Sparsity(q=1.0, k=1.0, v=1.0)
    """

    q: float
    k: float
    v: float


class LowRankAttention(nn.MultiheadAttention):
    r"""Multi-head attention on low-rank queries, keys and values, with an l1 penalty on them or a soft threshold.

    Takes the place of `torch.nn.MultiheadAttention`: the same arguments, parameters (its ``state_dict`` loads) and
    results. At full rank and ``l1=0`` it computes the same.

    Parameters
    ----------
    embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype
        As in `torch.nn.MultiheadAttention`.
    dropout : float
        0: dropping entries of the matrix of weights would need that matrix, which is never held. Use dropout on the
        output.
    add_bias_kv, add_zero_attn : bool
        False: an extra key is not part of the low-rank matrices.
    rank : int, (int, int) or None
        Rank of Q^, K^ and V^ in each head, or that of Q^ and K^ and that of V^. None is full rank; with ``rtol``,
        no cap.
    rtol : float, optional
        Choose the ranks of each head at each fit, the smallest within this relative error of the head's output on the
        data of the fit. Eager only.
    method : {"svd", "scores", "output"}
        How subspaces are fitted, see `slra.fit_attention`: "svd" to the right singular vectors of Q, K and V.
    basis_per : {"layer", "sequence"}
        What has a basis of its own. "layer": one for the layer, fitted to training batches and kept in buffers, as
        running statistics are. "sequence": each sequence gets its own at each call. It has seen the whole sequence, so
        ``is_causal`` is refused; what a causal ``attn_mask`` hides reaches the output through it all the same.
    refit_every : int
        "layer" only: in training mode fit anew after so many calls; 0 leaves it to `fit_basis`. The first call in
        training mode fits before it attends, later ones after: a batch is attended to with the basis of earlier ones.
    l1 : float or (float, float, float)
        lambda_Q, lambda_K and lambda_V; also 0-d tensors. May be set later, so that a schedule can: it is kept in a
        buffer in double precision, which is no part of the state, and no compiled graph freezes it.
    l1_form : {"penalty", "prox"}
        "penalty": add `penalty` to the loss. "prox": soft-threshold Q^, K^ and V^ by ``l1``, in the units of their
        entries, before attention, which then runs in all dimensions; a loss that adds `penalty` as well counts the
        term twice, and drives all three to 0.

    Attributes
    ----------
    ranks : tensor, shape (num_heads, 2)
        Ranks of Q^ and K^, and of V^, in each head at the last fit; 0 before the first. "layer" only.

    Raises
    ------
    ValueError
        If an option is out of range, or ``dropout``, ``add_bias_kv`` or ``add_zero_attn`` is asked for.

    Notes
    -----
    Q^, K^ and V^ are projections of the heads' queries, keys and values, n by D: with "svd"
    :math:`\hat Q = Q V_Q V_Q^T`. With the other methods keys and values are centred (the shift of the values is put
    back for the output), and the projections of Q and K are oblique. Without a threshold attention runs in r
    dimensions. Gradients treat the subspaces as constant.

    A query that attends to nothing gets 0 (and the bias of the output projection), not NaN.

    Compile with ``refit_every=0`` or in eval mode: a fit is not part of a compiled forward. Do the same for activation
    checkpointing, which would compute a call again after the fit that followed it (refused otherwise), and
    `torch.nn.DataParallel`, whose replicas lose what they fit.

    The basis is in the buffers alone. Where these are averaged (`torch.optim.swa_utils.AveragedModel` with
    ``use_buffers``), the projections are averaged, and factored anew at the next call or change of mode outside of a
    compiled graph; inside one, and under ``vmap``, a basis that is not there or not factored anew makes everything NaN.

    Loading parameters without a basis, such as those of `torch.nn.MultiheadAttention`, drops the basis, which was
    fitted to others.

    What a mask hides takes no part in fits, `penalty` and `sparsity`: keys and values that no query sees, queries that
    see nothing, and in self-attention (``query is key``) the queries of tokens that no query of any head sees, which
    are padding. An added -1e4 or less hides. "output" still looks at as many rows, with 0 in their place.

    Examples
    --------
    >>> import torch
    >>> from slra.integrations.torch import LowRankAttention
    >>> layer = LowRankAttention(16, 2, batch_first=True, rank=4, l1=1e-3)
    >>> x = torch.randn(3, 10, 16)
    >>> out, _ = layer(x, x, x, need_weights=False)
    >>> loss = out.square().mean() + layer.penalty()
    >>> loss.backward()
    >>> layer.ranks.tolist()
    [[4, 4], [4, 4]]
    """

    _weights: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        rank: int | tuple[int, int] | None = None,
        rtol: float | None = None,
        method: str = "svd",
        basis_per: Literal["layer", "sequence"] = "layer",
        refit_every: int = 1,
        l1: L1 = 0.0,
        l1_form: Literal["penalty", "prox"] = "penalty",
    ) -> None:
        if dropout != 0:
            raise ValueError(
                f"dropout must be 0, got {dropout!r}: dropping attention weights needs the matrix of weights, which "
                "is never held; use torch.nn.Dropout on the output"
            )
        if add_bias_kv or add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn must be False: no key is added here")
        check_choice(method, tuple(METHODS), "method")
        check_choice(basis_per, ("layer", "sequence"), "basis_per")
        check_form(l1_form)
        if rtol is not None:
            check_positive(rtol, "rtol")
        super().__init__(
            embed_dim,
            num_heads,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        # nn.TransformerEncoderLayer asks for this before it runs a fused kernel instead of calling us.
        self._qkv_same_embed_dim = False
        self._rank, self.rtol, self.method, self.basis_per = rank, rtol, method, basis_per
        self.refit_every = check_count(refit_every, "refit_every")
        # A number that was an attribute would be part of a compiled graph.
        weights = _weights_of_l1(l1, self.out_proj.weight.device)
        self.register_buffer("_weights", weights, persistent=False)
        self.l1_form = l1_form
        self._calls = self._unread = 0
        self._last: Approximation | None = None
        widest = self._widest
        if self._keeps_basis:
            self._register_basis(*widest)

    @property
    def rank(self) -> int | tuple[int, int] | None:
        """Rank, or pair of ranks; setting another drops the basis."""
        return self._rank

    @rank.setter
    def rank(self, rank: int | tuple[int, int] | None) -> None:
        before, self._rank = self._rank, rank
        try:
            widest = self._widest
        except (TypeError, ValueError):
            self._rank = before
            raise
        if rank == before:
            return
        for name in (*Projections._fields, *_MAPS):
            self._buffers.pop(name, None)
        if self._keeps_basis:
            self._register_basis(*widest)

    def _reset_parameters(self) -> None:
        """As the class above, which is told that the widths differ."""
        told = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = told

    @property
    def l1(self) -> float | tuple[float, float, float]:
        """lambda_Q, lambda_K and lambda_V; one number where they are equal."""
        l_q, l_k, l_v = self._weights.tolist()
        return l_q if l_q == l_k == l_v else (l_q, l_k, l_v)

    @l1.setter
    def l1(self, l1: L1) -> None:
        # Not in place: a backward pass may still need those of the last call.
        self._weights = _weights_of_l1(l1, self._weights.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and convert as any module, but for the numbers of l1: they keep their precision, and their values."""
        before = self._weights
        super()._apply(fn, recurse)
        if self._weights.device.type != "meta":
            self._weights = before.to(self._weights.device)
        else:
            self._weights = before
        return self

    @property
    def _is_low_rank(self) -> bool:
        return self.rank is not None or self.rtol is not None

    @property
    def _keeps_basis(self) -> bool:
        return self._is_low_rank and self.basis_per == "layer"

    @property
    def _widest(self) -> tuple[int, int]:
        """Largest ranks of Q^ and K^, and of V^."""
        pair = self.rank if isinstance(self.rank, Sequence) else (self.rank, self.rank)
        if len(pair) != 2:
            raise TypeError(f"rank must be an int or a pair (rank_qk, rank_v), got {self.rank!r}")
        width, limit_is = self.head_dim, "embed_dim / num_heads"
        r, r_v = (
            width if one is None else check_rank(one, width, limit_is=limit_is) for one in pair
        )
        return r, r_v

    def _register_basis(self, r: int, r_v: int) -> None:
        """Make buffers of the shapes that every fit will have."""
        like = {"device": self.out_proj.weight.device, "dtype": self.out_proj.weight.dtype}
        heads, width = self.num_heads, self.head_dim
        shapes = Projections(
            (width, r),
            (r, width),
            (width, r),
            (r, width),
            (width, r_v),
            (r_v, width),
            (1, width),
            (1, width),
        )
        for name, shape in shapes._asdict().items():
            self.register_buffer(name, torch.zeros((heads, *shape), **like))
        # Factors cannot be averaged, as their signs and order are arbitrary; their products can.
        for name in _MAPS:
            self.register_buffer(name, torch.zeros((heads, width, width), **like))

    @property
    def ranks(self) -> Tensor:
        """Ranks of Q^ and K^, and of V^, in each head, from the buffers."""
        if not self._keeps_basis:
            raise AttributeError('ranks are those of basis_per="layer", with a rank or rtol')
        maps = self.k_map, self.v_map
        if self.rtol is None:
            counts = [
                one.detach().flatten(1).any(1) * rank
                for one, rank in zip(maps, self._widest, strict=True)
            ]
        else:
            # The trace of a projection is its rank.
            counts = [
                one.detach().double().diagonal(dim1=-2, dim2=-1).sum(-1).round().clamp(0, rank)
                for one, rank in zip(maps, self._widest, strict=True)
            ]
        return torch.stack(counts, dim=-1).to(torch.int64)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        return_penalty: bool = False,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """Attend; arguments and results as in `torch.nn.MultiheadAttention`.

        Parameters
        ----------
        query, key, value : tensor
            (L, N, E), (S, N, kdim) and (S, N, vdim); N first with ``batch_first``; or without N.
        key_padding_mask : tensor, optional, shape (N, S) or (S,)
            Boolean: True hides a key. Floating: added to the scores.
        need_weights : bool
            Whether to return the weights of the approximate attention: that takes memory quadratic in the length.
        attn_mask : tensor, optional, shape (L, S) or (N * num_heads, L, S)
            Boolean: True hides. Floating: added to the scores.
        average_attn_weights : bool
            Whether weights are averaged over heads.
        is_causal : bool
            Whether a query attends only to keys that are not after it, besides what ``attn_mask`` hides.
        return_penalty : bool
            Whether to return what `penalty` would, of this call: under reentrant checkpointing, ``vmap`` and where the
            layer is called several times, there is no other way to it.

        Returns
        -------
        output : tensor
            (L, N, E), or as ``query`` is laid out.
        weights : tensor or None
            (N, L, S), or (N, num_heads, L, S) where they are not averaged.
        penalty : tensor, 0-d
            With ``return_penalty`` only.
        """
        if self.training and self.refit_every and self._keeps_basis:
            _refuse_recomputation()
        is_batched, is_self = query.ndim == 3, query is key
        query, key, value = (self._batch_first(x) for x in (query, key, value))
        q, k, v = self._heads(query, key, value)
        mask = _mask(key_padding_mask, attn_mask, q, k)
        seen = what_is_seen(mask, is_self=is_self)
        fit_mask = mask
        if self.basis_per == "sequence" or (self.training and self.refit_every):
            fit_mask = mask_of_fit(mask, seen)
        is_empty = 0 in (*q.shape, *k.shape)
        fitted = (q, k, v, fit_mask, is_causal)
        projections, ranks = (None, None) if is_empty else self._projections(*fitted)
        out, self._last = attend(
            Approximation(projections, q, k, v, seen),
            ranks,
            l1=self._weights.unbind(),
            l1_form=self.l1_form,
            mask=mask,
            is_causal=is_causal,
        )
        self._warn_of_zeros()
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if self.training and self.refit_every and self._keeps_basis and not is_empty:
            self._count_call(q, k, v, fit_mask, is_causal)
        weights = _weights(self._last, mask, is_causal) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            out, weights = out[0], None if weights is None else weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if return_penalty:
            return out, weights, self._last.penalty(self._weights.unbind())
        self._count_unread(out)
        return out, weights

    def _warn_of_zeros(self) -> None:
        """Warn where a threshold leaves nothing to train."""
        last = self._last
        if not self.training or self.l1_form != "prox" or last is None:
            return
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if _in_backward() or _is_wrapped(last.q):
            return
        for name, hat, l1 in zip("QKV", last[1:4], self._weights.tolist(), strict=True):
            if l1 > 0 and hat.numel() and not bool(hat.any()):
                warnings.warn(
                    f"l1 is so large that all of {name}^ is 0, and the gradient with it: no step brings it back; "
                    f"lower it, got {l1:.2g}",
                    stacklevel=3,
                )

    def _count_unread(self, out: Tensor) -> None:
        """Count calls whose penalty is not read, up to the backward pass that ends a step."""
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or not out.requires_grad
            or _in_backward()
            or _is_wrapped(out)
        ):
            return
        self._unread += 1
        layer = weakref.ref(self)

        def end_of_step(_: Tensor) -> None:
            made = layer()
            if made is not None:
                made._unread = 0

        out.register_hook(end_of_step)

    def penalty(self) -> Tensor:
        """Return the l1 term of the last call: to be added to the loss in the form "penalty".

        Returns
        -------
        tensor
            0-d: lambda_Q ||Q^||_1 + lambda_K ||K^||_1 + lambda_V ||V^||_1, the norms summed over heads, tokens that are
            not hidden, and features, and averaged over the batch. It carries a gradient. In the form "prox", where the
            threshold takes its place, it is that of what came out of the threshold: to be reported, not added to the
            loss.

        Raises
        ------
        RuntimeError
            If there was no call, or copying or pickling dropped it; if it was made inside ``vmap`` and this is not;
            where gradients are recorded, if they were not in that call of a layer in training (as under reentrant
            checkpointing), or if there was another call since the last backward pass, whose term this would not
            have. Ask these calls for it (``return_penalty``). Inside a compiled graph calls are not counted.
        """
        last = self._last_call()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self._unread > 1:
                raise RuntimeError(
                    f"penalty must be read after each call, got {self._unread} calls since it was, and it is that of "
                    "the last one alone: sum what they return with return_penalty=True"
                )
            # Inside a transform nothing says whether there is a derivative.
            is_trained = self.training and not _is_wrapped(last.q)
            is_trained = is_trained and any(x.requires_grad for x in self.parameters())
            if is_trained and not (
                last.q.requires_grad or last.k.requires_grad or last.v.requires_grad
            ):
                raise RuntimeError(
                    "penalty must be read under torch.no_grad() where the call recorded no gradient, as under "
                    "reentrant checkpointing: it would have none; take what the call returns with "
                    "return_penalty=True"
                )
            self._unread = 0
        return last.penalty(self._weights.unbind())

    def sparsity(self) -> Sparsity:
        """Return the fractions of exact zeros in Q^, K^ and V^ of the last call.

        Returns
        -------
        Sparsity

        Raises
        ------
        RuntimeError
            As for `penalty`.
        """
        return Sparsity(*self._last_call().zeros())

    def approximations(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q^, K^ and V^ of the last call, (N, num_heads, length, head_dim), with their gradients.

        Returns
        -------
        tuple of tensors
            As attention met them; the shift of the values not added.

        Raises
        ------
        RuntimeError
            As for `penalty`.
        """
        return self._last_call().arrays()

    def _last_call(self) -> Approximation:
        if self._last is None:
            raise RuntimeError("call the layer first: there are no queries, keys and values yet")
        if not torch.compiler.is_compiling() and _has_escaped(self._last.q):
            raise RuntimeError(
                "the layer was last called inside a transform such as torch.func.vmap, which what it keeps of a call "
                "cannot leave: return it from there, the penalty by return_penalty=True"
            )
        return self._last

    def to_mha(self) -> nn.MultiheadAttention:
        """Return exact attention with copies of the parameters: what is trained here may go on without this package.

        Returns
        -------
        torch.nn.MultiheadAttention
            Of the same widths, device, dtype, layout and mode.
        """
        weight = self.out_proj.weight
        made = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            bias=self.in_proj_bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        made.load_state_dict(dict(self.named_parameters()))
        return made.train(self.training)

    def fit_basis(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> None:
        """Fit the basis of the layer to a batch, as a call in training mode does.

        Parameters
        ----------
        query, key, value, key_padding_mask, attn_mask, is_causal
            As for a call.

        Raises
        ------
        ValueError
            If the layer keeps no basis, or `slra.fit_attention` would refuse the rank or the data.
        """
        if not self._keeps_basis:
            raise ValueError('fit_basis needs basis_per="layer", and a rank or rtol')
        is_self = query is key
        with torch.no_grad():
            q, k, v = self._heads(*(self._batch_first(x) for x in (query, key, value)))
        mask = _mask(key_padding_mask, attn_mask, q, k)
        mask = mask_of_fit(mask, what_is_seen(mask, is_self=is_self))
        self._fit(q, k, v, mask, is_causal)

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Project (N, L, E) to the heads' queries, keys and values, (N, H, L, D)."""
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = map(functional.linear, (query, key, value), weights, biases)
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]

    def _projections(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Projections | None, Ranks | None]:
        """Subspaces for this call, and their ranks; None for full rank."""
        if not self._is_low_rank:
            return None, None
        if self.basis_per == "sequence":
            if is_causal:
                raise ValueError(
                    'is_causal must be False with basis_per="sequence", which is fitted to the whole sequence: later '
                    'tokens would change earlier outputs; use basis_per="layer"'
                )
            return self._fitted(q, k, v, mask, is_causal)
        if self._can_look:
            self._prepare(q, k, v, mask, is_causal)
            if not bool((self.ranks > 0).all()):
                return (
                    None,
                    None,
                )  # nothing to fit to: infinity goes through, so that a scaler skips the step
            return self._kept(), tuple((qk, v) for qk, v in self.ranks.tolist())
        if self.training and self.refit_every:
            self._prepare_outside(q, k, v, mask, is_causal)
        # Nothing can be raised here: without a basis, or with one that was averaged, all is NaN.
        is_right = torch.stack([self._is_whole(*names) for names in _FACTORS]).all()
        kept = self._kept()
        mark = torch.where(is_right & (self.ranks > 0).all(), 1.0, torch.nan).to(kept.mu.dtype)
        ups = {name: getattr(kept, name) * mark for name in ("q_up", "k_up", "v_up")}
        return kept._replace(**ups, mu=kept.mu * mark), (self._widest,) * self.num_heads

    @property
    def _can_look(self) -> bool:
        """Whether the values of the buffers can be looked at."""
        return not torch.jit.is_tracing() and resolve(x=self.v_map).is_eager(self.v_map)

    def _prepare(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> None:
        """See to it that there is a basis, or raise."""
        if bool((self.ranks > 0).all()):
            self._factor_averages()
        elif self.training and self.refit_every:
            if _can_fit(q, k, v, mask):
                self._fit(q, k, v, mask, is_causal)
        else:
            raise RuntimeError(
                "the layer has no basis yet: call it in training mode, call fit_basis, or load a state with one"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepare_outside(self, *given: Any) -> None:
        """Fit outside of a compiled graph."""
        if self._can_look:
            self._prepare(*given)

    def _kept(self) -> Projections:
        return Projections(*(getattr(self, name) for name in Projections._fields))

    @isolated
    def _is_whole(self, down: str, up: str, product: str) -> Tensor:
        """Say whether two factors are those of a projection; the average of several pairs of them is not."""
        given = getattr(self, down), getattr(self, up)
        eps = torch.finfo(given[0].dtype).eps
        down_map, up_map = (_wide(x) for x in given)
        rank = self.ranks[:, int(product == "v_map")]
        ones = torch.arange(up_map.shape[-2], device=rank.device) < rank[:, None]
        error = (up_map @ down_map - torch.diag_embed(ones.to(up_map.dtype))).abs()
        # Rounding as they were stored, and of the product.
        most = 4 * eps + 64 * up_map.shape[-1] ** 0.5 * torch.finfo(up_map.dtype).eps
        return (error <= most * (up_map.abs() @ down_map.abs()).max()).all()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    @isolated
    def _factor_averages(self) -> None:
        """Factor the projections anew where the factors were averaged."""
        for down, up, product in _FACTORS:
            if bool(self._is_whole(down, up, product)):
                continue
            rank = self.ranks[:, int(product == "v_map")]
            width = getattr(self, down).shape[-1]
            left, _, right = torch.linalg.svd(_wide(getattr(self, product)))
            keep = (torch.arange(width, device=rank.device) < rank[:, None])[:, None]
            left, right = left[..., :width], right[..., :width, :]
            # The projection with these rows and columns; it is oblique where they span different spaces.
            core = (right @ left).masked_fill(~(keep & keep.mT), 0)
            core = core + torch.diag_embed((~keep[:, 0]).to(core.dtype))
            left = torch.linalg.solve(core, left, left=False).masked_fill(~keep, 0)
            setattr(self, down, left.to(getattr(self, down).dtype))
            setattr(self, up, right.masked_fill(~keep.mT, 0).to(getattr(self, up).dtype))

    def train(self, mode: bool = True) -> "LowRankAttention":
        """Set the mode; projections that were averaged are factored here, too, for compiled calls that follow."""
        super().train(mode)
        if self._keeps_basis and self._can_look and bool((self.ranks > 0).all()):
            self._factor_averages()
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count_call(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> None:
        """Fit anew for later batches, where it is time; a count in a graph would make a graph for each number."""
        self._calls += 1
        if self._calls % self.refit_every == 0 and _can_fit(q, k, v, mask):
            self._fit(q, k, v, mask, is_causal)

    def _fitted(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
    ) -> tuple[Projections, Ranks]:
        return fit_projections(
            q,
            k,
            v,
            self.rank,
            rtol=self.rtol,
            method=self.method,
            pool_batch=self.basis_per == "layer",
            mask=mask,
            is_causal=is_causal,
            causal_align="top_left",
        )

    @isolated
    def _fit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> None:
        """Replace the buffers; not in place, as a backward pass may still need those of the last call."""
        projections, _ = self._fitted(q, k, v, mask, is_causal)
        for name, fitted in projections._asdict().items():
            buffer = torch.zeros_like(getattr(self, name))
            # Ranks chosen by tolerance are padded with zeros to the largest there may be.
            buffer[..., : fitted.shape[-2], : fitted.shape[-1]] = fitted
            setattr(self, name, buffer)
        for down, up, product in _FACTORS:
            fitted = getattr(projections, down) @ getattr(projections, up)
            setattr(self, product, fitted.to(getattr(self, product).dtype))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        """Load the parameters, and the basis if there is one: `torch.nn.MultiheadAttention` has none."""
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if not self._keeps_basis:
            return
        names = [prefix + name for name in (*Projections._fields, *_MAPS)]
        if not any(name in state_dict for name in names):
            missing[:] = [name for name in missing if name not in names]
            if not any(name.startswith(prefix) for name in state_dict):
                return
            # Other parameters make other queries and keys than those that the basis was fitted to.
            for name in (*Projections._fields, *_MAPS):
                setattr(self, name, torch.zeros_like(getattr(self, name)))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last call: tensors of a graph can be neither copied nor pickled."""
        return {**self.__dict__, "_last": None, "_unread": 0}

    def extra_repr(self) -> str:
        """Say how the layer was made."""
        names = ("embed_dim", "num_heads", "rank", "rtol", "method", "basis_per", "refit_every")
        shown = [f"{name}={getattr(self, name)!r}" for name in (*names, "l1", "l1_form")]
        return ", ".join(shown)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _weights_of_l1(l1: L1, device: Any) -> Tensor:
    """Return the three numbers as a tensor, on the CPU where the layer has no data yet."""
    given = l1 if isinstance(l1, (tuple, list)) else (l1,) * 3
    if any(isinstance(one, Tensor) and one.requires_grad for one in given):
        raise ValueError(
            "l1 must not require a gradient: set it to l1.detach(), or weight the norms of approximations() by it"
        )
    numbers = check_l1(
        [one.item() if isinstance(one, Tensor) and one.ndim == 0 else one for one in given]
    )
    device = torch.device("cpu" if device is None else device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(numbers, dtype=dtype, device="cpu" if device.type == "meta" else device)


def _can_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether a batch in training can be fitted to: no loss scale has made it infinite.

    What a mask hides may be anything.
    """
    # A sum is one pass, and finite only of finite numbers.
    if all(bool(torch.isfinite(x.sum())) for x in (q, k, v)):
        return True
    queries, keys = what_is_seen(mask, is_self=False)
    is_finite = [
        torch.isfinite(x).all(-1) if seen is None else torch.isfinite(x).all(-1) | ~seen
        for x, seen in ((q, queries), (k, keys), (v, keys))
    ]
    return all(bool(x.all()) for x in is_finite)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _is_wrapped(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _has_escaped(x: Tensor) -> bool:
    """Whether a tensor belongs to a transform that has ended."""
    functorch = torch._C._functorch
    if not _is_wrapped(x):
        return False
    current = functorch.maybe_current_level()
    return current is None or functorch.maybe_get_level(x) not in range(1, current + 1)


def _refuse_recomputation() -> None:
    """Raise inside a backward pass: by now the basis is one that was fitted after the call that is computed again."""
    if _in_backward():
        raise RuntimeError(
            "refit_every must be 0 under activation checkpointing, which computes a call again in the backward pass, "
            "after the fit that followed it: fit with fit_basis between steps"
        )


def _mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Join both masks as slra has them: boolean, True attends; or floating, added."""
    masks = []
    n_batch, n_heads, n_queries = q.shape[:3]
    n_keys = k.shape[-2]
    if key_padding_mask is not None:
        without_batch = [(n_keys,)] if n_batch == 1 else []
        _check_mask(key_padding_mask, "key_padding_mask", [(n_batch, n_keys), *without_batch])
        masks.append(key_padding_mask.reshape(-1, 1, 1, k.shape[-2]))
    if attn_mask is not None:
        one = (n_queries, n_keys)
        _check_mask(attn_mask, "attn_mask", [one, (n_batch * n_heads, *one)])
        shape = (
            (-1, *q.shape[1:3], k.shape[-2]) if attn_mask.ndim == 3 else (1, 1, *attn_mask.shape)
        )
        masks.append(attn_mask.reshape(shape))
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    masks = [_additive(mask, q.dtype) for mask in masks]
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]


def _check_mask(mask: Tensor, name: str, right: Sequence[tuple[int, ...]]) -> None:
    """Raise unless a mask has a shape and a dtype that `torch.nn.MultiheadAttention` takes."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean or floating, got {mask.dtype}")
    if tuple(mask.shape) not in right:
        shapes = " or ".join(map(str, right))
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(mask.shape)}")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _weights(given: Approximation, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Return the matrix of weights, (N, H, L, S); rows that attend to nothing are 0."""
    q, k, _ = given.arrays()
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    empty = torch.isneginf(scores).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
