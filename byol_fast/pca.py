"""Principal components of more rows than fit in memory, and what they say about a bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from .curve import YieldCurve
from .moments import Moments, Scatter, Sketch, Spectrum
from .nn import Bottleneck
from .rows import Matrix, RowMatrix, first_row_not_finite
from .svd import checked_rank, fixed_signs

__all__ = ["Route", "StreamingPCA", "certificate"]

# Rows that are shifted by the same point; fewer where rows are long, so that a block stays this small.
_BLOCK_ROWS = 16384
_BLOCK_BYTES = 1 << 26
# Up to here the eigenvectors of the covariance take seconds, and its 128 MiB are no burden.
_COVARIANCE_FEATURES = 4096
# Above this density, products of dense rows are faster than products of sparse ones.
_SPARSE_DENSITY = 0.05


@dataclass(frozen=True)
class Route:
    """How a :class:`StreamingPCA` works, what it costs, and why it was chosen."""

    method: str
    reason: str
    operations_per_row: int
    bytes: int

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.1f} MiB"
        return f"{self.method} ({self.reason}): {self.operations_per_row:,} operations a row, {size} of sums"


class StreamingPCA:
    """Principal component analysis in one pass over any number of rows.

    Rows are centred and multiplied in blocks in their own precision (float64 if they are; integers of up to 8 bits and
    half precision count as float32), and the blocks are added up in float64. The same rows give bit-equal results
    however they are cut into batches. Attributes and results are float64 and mean what they mean in
    :class:`sklearn.decomposition.PCA`; nothing is decomposed before it is asked for.

    Two routes lead there (:meth:`explain` says which is taken, and why):

    * ``"covariance"``: the covariance ``[D, D]``. Exact, all ranks at once.
    * ``"randomized"``: the covariance's image under ``rank + oversampling`` random directions, for large D. One pass
      gives a good approximation, a second one over the same rows (:meth:`next_pass`) a very good one. Its yields are
      lower bounds of what its components attain.

    Args:
        n_features: size D of a row.
        rank: components to compute, from 1 to D; the default of every method with a ``rank``. None means D. Where few
            of many are declared, they are found without the others, which then cost extra.
        method: ``"covariance"``, ``"randomized"`` (needs a rank), or ``"auto"``: randomized if a rank is given,
            D > 4096 and it takes fewer operations.
        oversampling: additional random directions.
        seed: of the random directions.
        device: where the sums are; batches may come from anywhere.

    Raises:
        TypeError: ``n_features`` or ``rank`` is no integer.
        ValueError: one of them is out of range, or ``method`` is unknown or lacks its rank.
    """

    def __init__(
        self,
        n_features: int,
        *,
        rank: int | None = None,
        method: str = "auto",
        oversampling: int = 16,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(n_features, int) or n_features < 1:
            raise ValueError(f"n_features: expected an integer ≥ 1, got {n_features!r}")
        self.n_features = n_features
        self.rank = None if rank is None else checked_rank(rank, n_features, "n_features")
        self.device = torch.device("cpu" if device is None else device)
        self._route = _route(n_features, self.rank, method, oversampling)
        if self._route.method == "covariance":
            self._moments: Moments = Scatter(n_features, self.device)
        else:
            width = _sketch_width(n_features, self.rank, oversampling)
            self._moments = Sketch.random(n_features, width, seed, self.device)
        self._block_rows = max(64, min(_BLOCK_ROWS, _BLOCK_BYTES // (8 * n_features)))
        self._pending = torch.empty(0, n_features, device=self.device)
        self._pending_rows = 0
        # What follows from the rows seen so far, once it has been asked for.
        self._settled_moments: Moments | None = None
        self._spectra: dict[bool, Spectrum] = {}
        self._leading_spectra: dict[bool, Spectrum | None] = {}

    def explain(self) -> Route:
        """Which route is taken, and why."""
        return self._route

    # --------------------------------------------------------------------------------------------------- data

    @torch.no_grad()
    def partial_fit(self, batch: Matrix | DataLoader[Any]) -> StreamingPCA:
        """Add rows.

        Args:
            batch: ``[rows, n_features]``, real numbers: a tensor, a NumPy array (memory-mapped or not), a CSR matrix
                (torch's or SciPy's). No rows are no change. Or a DataLoader of such batches; of tuples, the first item.

        Raises:
            TypeError: ``batch`` is something else.
            ValueError: its shape does not fit, or a row holds NaN or Inf; the message names the first. Of a large
                batch, rows some way before that row have been added then; ``n_samples_seen_`` says how many.
        """
        if isinstance(batch, DataLoader):
            for item in batch:
                self.partial_fit(item[0] if isinstance(item, list | tuple) else item)
            return self
        rows = RowMatrix.of(batch, "batch")
        if rows.shape[1] != self.n_features:
            raise ValueError(
                f"batch: expected shape [rows, n_features] = [any, {self.n_features}], got {list(rows.shape)}"
            )
        for start, block in rows.blocks(self._block_rows):
            self._forget_results()
            if rows.sparse and rows.density <= _SPARSE_DENSITY:
                self._check_finite(block, start)
                self._moments.add_sparse_(block.to(self.device))
            else:
                self._enqueue(block.to_dense() if rows.sparse else block, rows.dtype, start)
        return self

    def _check_finite(self, block: Tensor, start: int) -> None:
        """Name the first row of this block, which begins at row ``start`` of its batch, that is not finite."""
        bad = first_row_not_finite(block)
        if bad is not None:
            seen = self.n_samples_seen_ + bad
            raise ValueError(
                f"batch: expected finite numbers, got NaN or Inf in row {start + bad} (row {seen} of all rows seen)"
            )

    def _enqueue(self, block: Tensor, dtype: torch.dtype, start: int = 0) -> None:
        """Collect rows until a block is full, so that small batches cost no more than large ones."""
        if self._pending.dtype != dtype:
            self._start_anew(self._settled(), dtype)
        if self._pending.numel() == 0:
            self._pending = self._pending.new_empty(self._block_rows, self.n_features)
        if self._pending_rows == 0 and self._is_ready(block):
            added = self._moments.add_finite_(block, self._pending)
            block, start = block[added:], start + added
        self._check_finite(block, start)
        while len(block):
            part = block[: self._block_rows - self._pending_rows]
            self._pending[self._pending_rows : self._pending_rows + len(part)] = part
            self._pending_rows += len(part)
            block = block[len(part) :]
            if self._pending_rows == self._block_rows:
                self._moments.add_(self._pending, self._pending)
                self._pending_rows = 0

    def _is_ready(self, block: Tensor) -> bool:
        """Whether the block is full, and nothing is to be converted, moved or laid out anew: it need not be copied."""
        same = block.dtype == self._pending.dtype and block.device == self._pending.device
        return same and block.shape == self._pending.shape and block.is_contiguous()

    def _start_anew(self, moments: Moments, dtype: torch.dtype) -> None:
        """Go on from these moments, with nothing pending."""
        self._moments = moments
        self._pending = torch.empty(0, self.n_features, dtype=dtype, device=self.device)
        self._pending_rows = 0
        self._forget_results()

    def _forget_results(self) -> None:
        self._settled_moments = None
        self._spectra = {}
        self._leading_spectra = {}

    def _settled(self) -> Moments:
        """The moments of all rows; those pending stay pending."""
        if self._pending_rows == 0:
            return self._moments
        if self._settled_moments is None:
            rows = self._pending[: self._pending_rows]
            self._settled_moments = self._moments.copy()
            self._settled_moments.add_(rows, torch.empty_like(rows))
        return self._settled_moments

    @torch.no_grad()
    def merge(self, other: StreamingPCA) -> StreamingPCA:
        """Add the rows that another one has seen, which stays as it is.

        Raises:
            TypeError: ``other`` is no ``StreamingPCA``.
            ValueError: it has other features, another method, or other random directions.
        """
        if not isinstance(other, StreamingPCA):
            raise TypeError(f"other: expected a StreamingPCA, got {type(other).__name__}")
        self._check_same(other._identity(), "other")
        moments = self._settled().copy()
        moments.merge_(other._settled())
        self._start_anew(moments, self._pending.dtype)
        return self

    @torch.no_grad()
    def all_reduce(self, group: Any = None) -> StreamingPCA:
        """Add up the rows of all processes, in each of them: once, after the last batch.

        Processes may have seen any number of rows, none included. Without ``torch.distributed`` there is one process.

        Raises:
            ValueError: the processes have different features, methods or random directions.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        own = torch.tensor(self._identity(), dtype=torch.float64, device=self.device)
        both = torch.stack((own, -own))
        distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=group)
        self._check_same(tuple(both[0].tolist()), "all_reduce")
        self._check_same(tuple((-both[1]).tolist()), "all_reduce")
        moments = self._settled().copy()
        moments.all_reduce_(group)
        self._start_anew(moments, self._pending.dtype)
        return self

    def _identity(self) -> tuple[float, ...]:
        """What has to agree where sums are added up: the sizes, and the directions by a fingerprint."""
        test = self._moments.test if isinstance(self._moments, Sketch) else None
        fingerprint = 0.0 if test is None else round(float(test.abs().sum()), 6)
        return float(self.n_features), float(self._moments.image.shape[1]), fingerprint

    def _check_same(self, identity: tuple[float, ...], name: str) -> None:
        if identity != self._identity():
            raise ValueError(
                f"{name}: expected the same (n_features, width of the sums, random directions), "
                f"{self._identity()}, got {identity}"
            )

    @torch.no_grad()
    def next_pass(self) -> StreamingPCA:
        """An empty ``StreamingPCA`` for another pass over the same rows, in these components for random directions.

        It sharpens the randomized route as a power iteration does.

        Raises:
            ValueError: the covariance route is exact after one pass.
        """
        if not isinstance(self._moments, Sketch):
            raise ValueError('next_pass: expected method "randomized"; the covariance route is exact after one pass')
        other = StreamingPCA.__new__(StreamingPCA)
        other.__dict__.update(self.__dict__)
        other._start_anew(Sketch(self.spectrum().axes), self._pending.dtype)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Everything seen so far, in plain tensors and numbers."""
        state = {"identity": self._identity(), "pending": self._pending[: self._pending_rows].clone()}
        if isinstance(self._moments, Sketch):
            state["test"] = self._moments.test
        return {**state, **self._moments.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken, bit-equal.

        Raises:
            ValueError: it was taken of another kind of ``StreamingPCA``.
        """
        state = dict(state)
        identity, pending, test = (state.pop(key, None) for key in ("identity", "pending", "test"))
        if isinstance(self._moments, Sketch) and test is not None and test.shape == self._moments.test.shape:
            # The directions of a later pass are no longer those of the seed.
            self._moments = Sketch(test.to(self.device))
        self._check_same(tuple(identity), "state")
        moments = self._moments.empty()
        moments.load_state_(state)
        self._start_anew(moments, pending.dtype)
        self._enqueue(pending, pending.dtype)

    # ------------------------------------------------------------------------------------------------- results

    @property
    def resolution(self) -> float:
        """The share of the energy that the arithmetic cannot tell from zero: the rows' machine epsilon."""
        return self._settled().resolution

    def spectrum(self, centered: bool = True) -> Spectrum:
        """Eigenvalues and axes of the scatter ``Σ (x − mean)(x − mean)ᵀ`` (``centered=False``: of ``Σ x xᵀ``).

        Raises:
            RuntimeError: no rows have been seen.
        """
        if centered not in self._spectra:
            self._spectra[centered] = self._seen().spectrum(centered)
        return self._spectra[centered]

    def _leading(self, rank: SupportsIndex | None = None, centered: bool = True) -> Spectrum:
        """The first ``rank`` of the spectrum, without the others where ``self.rank`` told that they are not wanted."""
        rank, spectrum = self._rank(rank), None
        if self.rank is not None and rank <= self.rank:
            if centered not in self._leading_spectra:
                self._leading_spectra[centered] = self._seen().leading(self.rank, centered)
            spectrum = self._leading_spectra[centered]
        values, axes, total = self.spectrum(centered) if spectrum is None else spectrum
        return Spectrum(values[:rank], axes[:, :rank], total)

    def _seen(self) -> Moments:
        if self.n_samples_seen_ == 0:
            raise RuntimeError("no rows seen yet: call partial_fit first")
        return self._settled()

    def _rank(self, rank: SupportsIndex | None) -> int:
        limit = self._moments.image.shape[1]
        if rank is None:
            return limit if self.rank is None else self.rank
        return checked_rank(rank, limit, "n_features" if limit == self.n_features else "rank + oversampling")

    @property
    def n_samples_seen_(self) -> int:
        """Rows seen so far."""
        return self._moments.count + self._pending_rows

    @property
    def mean_(self) -> Tensor:
        """Mean row, ``[n_features]``."""
        return self._settled().mean

    @property
    def explained_variance_(self) -> Tensor:
        """Variance along each component, descending, with n − 1 degrees of freedom."""
        return self._leading().values / max(self.n_samples_seen_ - 1, 1)

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """Share of the total variance along each component."""
        values, _, total = self._leading()
        return values / (total or 1.0)

    @property
    def singular_values_(self) -> Tensor:
        """Singular values of the centred rows."""
        return self._leading().values.sqrt()

    @property
    def covariance_(self) -> Tensor:
        """Covariance, ``[n_features, n_features]``, with n − 1 degrees of freedom.

        Raises:
            ValueError: the randomized route does not have it.
        """
        moments = self._settled()
        if not isinstance(moments, Scatter):
            raise ValueError('covariance_: expected method "covariance", got "randomized"')
        return moments.matrix() / max(moments.count - 1, 1)

    def components(self, rank: SupportsIndex | None = None, *, centered: bool = True) -> Tensor:
        """Principal axes, ``[rank, n_features]``, orthonormal; in each, the largest entry is positive.

        ``centered=False`` gives those of ``Σ x xᵀ``, which a bottleneck without biases needs.
        """
        axes = self._leading(rank, centered).axes.T
        return axes * fixed_signs(axes)[:, None]

    def curve(self, *, centered: bool = True) -> YieldCurve:
        """Yield and error of the best bottleneck at every rank (``centered=False``: of those without biases)."""
        values, _, total = self.spectrum(centered)
        count = self.n_samples_seen_
        exact = len(values) == self.n_features
        return YieldCurve(values / count, self.n_features, None if exact else total / count)

    def transform(self, batch: Matrix, rank: SupportsIndex | None = None) -> Tensor:
        """The code of each row, ``[rows, rank]``, in the precision of the rows."""
        rows = RowMatrix.of(batch, "batch")
        if rows.shape[1] != self.n_features:
            raise ValueError(
                f"batch: expected shape [rows, n_features] = [any, {self.n_features}], got {list(rows.shape)}"
            )
        axes = self.components(rank).T
        # Subtracting the rounded mean first is exact where means are large; the rest follows in the code.
        shift = torch.zeros_like(self.mean_) if rows.sparse else self.mean_.to(rows.dtype).double()
        rest = (self.mean_ - shift) @ axes
        shift, axes, rest = (tensor.to(rows.dtype) for tensor in (shift, axes, rest))
        code = torch.empty(rows.shape[0], axes.shape[1], dtype=rows.dtype, device=self.device)
        for start, block in rows.blocks(self._block_rows):
            block = block.to(self.device, rows.dtype)
            code[start : start + block.shape[0]] = (block if rows.sparse else block - shift) @ axes - rest
        return code

    def inverse_transform(self, code: Tensor) -> Tensor:
        """The rows of these codes, ``[rows, n_features]``, in the precision of the codes."""
        axes = self.components(code.shape[-1])
        return code @ axes.to(code.dtype) + self.mean_.to(code.dtype)

    @torch.no_grad()
    def to_bottleneck(
        self,
        rank: SupportsIndex | None = None,
        *,
        bias: bool = True,
        tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Bottleneck:
        """The linear bottleneck with the smallest possible reconstruction loss on these rows, in principal order.

        Its encoder holds the components, its decoder their transpose; with biases, it encodes ``x − mean``.
        """
        axes = self.components(rank, centered=bias)
        layer = Bottleneck(self.n_features, len(axes), bias=bias, tied=tied, device=device, dtype=dtype)
        return layer.assign_(axes, axes.T, -axes @ self.mean_, self.mean_)


@torch.no_grad()
def certificate(bottleneck: Bottleneck, pca: StreamingPCA) -> float:
    """How far a linear bottleneck is from the optimum: its loss / the smallest possible loss at its rank; 1 is optimal.

    Both losses follow from the covariance, in float64 and without reading the rows again: with M = Wd We, c the output
    at 0 and μ the mean, ``E‖x − M x − c‖² = ‖(I − M) C^½‖² + ‖(I − M) μ − c‖²`` against the tail eigenvalues of C. A
    layer without biases is held against the best one without biases. Losses too small for the rows' precision to tell
    them from zero count as zero, and their quotient as 1.

    Args:
        bottleneck: layer with identity activation and ``out_features == in_features``.
        pca: of the rows, by the covariance route.

    Raises:
        TypeError: an argument is something else.
        ValueError: the sizes differ, the bottleneck is not linear, or ``pca`` has no covariance or no rows.
    """
    if not isinstance(bottleneck, Bottleneck):
        raise TypeError(f"bottleneck: expected a byol_fast.Bottleneck, got {type(bottleneck).__name__}")
    if not isinstance(pca, StreamingPCA):
        raise TypeError(f"pca: expected a StreamingPCA, got {type(pca).__name__}")
    if (bottleneck.in_features, bottleneck.out_features) != (pca.n_features, pca.n_features):
        raise ValueError(
            f"bottleneck: expected in_features = out_features = n_features = {pca.n_features}, "
            f"got {bottleneck.in_features} and {bottleneck.out_features}"
        )
    if pca.explain().method != "covariance":
        raise ValueError('pca: expected method "covariance", got "randomized"')
    biased = bottleneck.encoder.bias is not None
    curve = pca.curve(centered=biased)
    floor = pca.resolution * float(curve.errors[0])
    best = curve.error_at(min(bottleneck.rank, pca.n_features))
    achieved, best = max(_achieved_loss(bottleneck, pca), floor), max(best, floor)
    if best > 0:
        return achieved / best
    # All rows are the same, and what they hold is in the biases: only their own size tells what zero is.
    return 1.0 if achieved <= pca.resolution * float(pca.mean_.square().mean()) else float("inf")


def _achieved_loss(bottleneck: Bottleneck, pca: StreamingPCA) -> float:
    """Mean squared error per element over the rows that ``pca`` has seen; all-zero data has none."""
    encoder, encoder_bias, decoder, decoder_bias = (
        factor.to(pca.device) for factor in bottleneck.factors("certificate")
    )
    values, axes, _ = pca.spectrum()
    root = axes * (values / pca.n_samples_seen_).sqrt()
    mean = pca.mean_
    missing, offset = -decoder @ (encoder @ root), -decoder @ (encoder @ mean + encoder_bias) - decoder_bias
    if not bottleneck.residual:
        missing, offset = missing + root, offset + mean
    return float(missing.square().sum() + offset.square().sum()) / pca.n_features


def _route(n_features: int, rank: int | None, method: str, oversampling: int) -> Route:
    if method not in ("auto", "covariance", "randomized"):
        raise ValueError(f"method: expected one of auto, covariance, randomized, got {method!r}")
    if method == "randomized" and rank is None:
        raise ValueError('rank: expected an integer for method "randomized", got None')
    width = _sketch_width(n_features, rank, oversampling)
    covariance = (n_features * n_features, 8 * n_features * n_features)
    # Two passes of two products each.
    randomized = (8 * n_features * width, 16 * n_features * width)
    if method != "auto":
        reason = "as asked for"
    elif rank is None:
        method, reason = "covariance", "all ranks are wanted"
    elif n_features <= _COVARIANCE_FEATURES:
        method, reason = "covariance", f"{n_features} features are few enough to be exact"
    elif randomized[0] >= covariance[0]:
        method, reason = "covariance", "two randomized passes would take more operations"
    else:
        method, reason = "randomized", f"the covariance would take {covariance[0]:,} operations a row"
    return Route(method, reason, *(covariance if method == "covariance" else randomized))


def _sketch_width(n_features: int, rank: int | None, oversampling: int) -> int:
    return n_features if rank is None else min(n_features, rank + oversampling)
