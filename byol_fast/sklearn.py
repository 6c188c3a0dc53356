"""A scikit-learn estimator over :class:`byol_fast.StreamingPCA`.

It needs scikit-learn: ``pip install 'byol_fast[sklearn]'``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from .curve import YieldCurve
from .nn import Bottleneck
from .pca import StreamingPCA

__all__ = ["BottleneckPCA"]

_Array = np.ndarray[Any, Any]
# What every method accepts as rows.
_ROWS = {"dtype": [np.float64, np.float32], "accept_sparse": "csr", "order": "C"}


class BottleneckPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Principal component analysis that learns from batches, and turns into a bottleneck layer.

    ``fit`` and ``partial_fit`` give exact components (``IncrementalPCA`` only approximates them), from dense rows or
    CSR matrices, which are centred without being made dense. In a grid search without a scorer, the score is the yield.

    Parameters:
        n_components: how many: an integer; a number in (0, 1), the yield to reach; or None for all there are,
            min(n_samples, n_features).

    Attributes:
        components_: principal axes, ``[n_components_, n_features]``.
        mean_: mean row, ``[n_features]``.
        explained_variance_, explained_variance_ratio_, singular_values_: of each component, ``[n_components_]``.
        n_components_: how many components there are.
        n_samples_seen_: rows seen so far.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
        curve_: the :class:`byol_fast.YieldCurve` of the rows seen.
    """

    def __init__(self, n_components: float | None = None) -> None:
        self.n_components = n_components

    def fit(self, X: Any, y: Any = None) -> BottleneckPCA:
        """Learn from the rows of X, ``[n_samples, n_features]``, and nothing before. ``y`` is ignored."""
        self._learn(X, reset=True)
        _ = self.n_components_
        return self

    def partial_fit(self, X: Any, y: Any = None) -> BottleneckPCA:
        """Learn from more rows; nothing is decomposed before it is asked for. ``y`` is ignored."""
        self._learn(X, reset=not hasattr(self, "_pca"))
        return self

    def _learn(self, X: Any, reset: bool) -> None:
        X = validate_data(self, X, reset=reset, **_ROWS)
        if reset:
            self._pca = StreamingPCA(self.n_features_in_)
        self._pca.partial_fit(X)
        self._dtype = X.dtype

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_pca")

    def _leading(self, name: str) -> _Array:
        """An attribute of each component, for those there are."""
        check_is_fitted(self)
        values: _Array = getattr(self._pca, name)[: self.n_components_].numpy()
        return values.astype(self._dtype)

    @property
    def n_components_(self) -> int:
        check_is_fitted(self)
        wanted: Any = self.n_components
        limit: int = min(self.n_samples_seen_, self.n_features_in_)
        if wanted is None:
            return limit
        if isinstance(wanted, int | np.integer) and 1 <= wanted <= limit:
            return int(wanted)
        if isinstance(wanted, float | np.floating) and 0 < wanted < 1:
            return min(self.curve_.rank_for(energy=float(wanted)), limit)
        raise ValueError(
            f"n_components: expected None, a number in (0, 1) or an integer from 1 to "
            f"min(n_samples, n_features) = {limit}, got {wanted!r}"
        )

    @property
    def n_samples_seen_(self) -> int:
        check_is_fitted(self)
        return self._pca.n_samples_seen_

    @property
    def curve_(self) -> YieldCurve:
        check_is_fitted(self)
        return self._pca.curve()

    @property
    def mean_(self) -> _Array:
        check_is_fitted(self)
        return self._pca.mean_.numpy().astype(self._dtype)

    @property
    def components_(self) -> _Array:
        check_is_fitted(self)
        return self._pca.components(self.n_components_).numpy().astype(self._dtype)

    @property
    def explained_variance_(self) -> _Array:
        return self._leading("explained_variance_")

    @property
    def explained_variance_ratio_(self) -> _Array:
        return self._leading("explained_variance_ratio_")

    @property
    def singular_values_(self) -> _Array:
        return self._leading("singular_values_")

    def transform(self, X: Any) -> _Array:
        """The code of each row: ``[n_samples, n_components_]``, in the precision of X."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, **_ROWS)
        return self._pca.transform(X, self.n_components_).numpy()

    def inverse_transform(self, X: Any) -> _Array:
        """The rows of these codes: ``[n_samples, n_features]``, in the precision of X."""
        check_is_fitted(self)
        X = check_array(X, dtype=[np.float64, np.float32])
        if X.shape[1] != self.n_components_:
            raise ValueError(f"X: expected {self.n_components_} columns, one for each component, got {X.shape[1]}")
        return self._pca.inverse_transform(torch.from_numpy(np.array(X))).numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Yield on the rows of X: 1 − ‖x − x̂‖² / ‖x − mean‖², with the mean learnt. ``y`` is ignored."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, **_ROWS)
        mean = self._pca.mean_.numpy()
        if issparse(X):
            total = np.square(X.data).sum() - 2 * (X @ mean).sum() + X.shape[0] * (mean @ mean)
        else:
            total = np.square(X - mean).sum()
        # The components are orthonormal, so the code has the energy that the reconstruction keeps.
        kept = np.square(self.transform(X), dtype=np.float64).sum()
        return float(kept / total) if total > 0 else 1.0

    def to_bottleneck(self, **options: Any) -> Bottleneck:
        """The layer that computes ``inverse_transform(transform(x))``: see :meth:`StreamingPCA.to_bottleneck`."""
        check_is_fitted(self)
        return self._pca.to_bottleneck(self.n_components_, **options)

    @property
    def _n_features_out(self) -> int:
        return int(self.n_components_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
