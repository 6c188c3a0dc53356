"""The estimator keeps scikit-learn's contract, and gives scikit-learn's numbers."""

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from byol_fast.sklearn import BottleneckPCA


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


# The array API check belongs to estimators that accept other libraries' arrays; scikit-learn skips it by itself.
@parametrize_with_checks([BottleneckPCA(), BottleneckPCA(1), BottleneckPCA(0.9)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("n_components", [None, 7, 0.9])
def test_attributes_are_those_of_pca(digits, n_components):
    rows, _ = digits
    ours, theirs = BottleneckPCA(n_components).fit(rows), PCA(n_components, svd_solver="full").fit(rows)
    assert ours.n_components_ == theirs.n_components_
    for name in ("mean_", "explained_variance_", "explained_variance_ratio_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-9, err_msg=name)
    # The covariance holds their squares: of a zero, it leaves the root of the largest one's rounding.
    zero = np.finfo(np.float64).eps ** 0.5 * theirs.singular_values_[0]
    np.testing.assert_allclose(ours.singular_values_, theirs.singular_values_, rtol=1e-9, atol=zero)
    np.testing.assert_allclose(np.abs(ours.transform(rows)[:, :5]), np.abs(theirs.transform(rows)[:, :5]), atol=1e-8)
    rebuilt = ours.inverse_transform(ours.transform(rows))
    np.testing.assert_allclose(rebuilt, theirs.inverse_transform(theirs.transform(rows)), atol=1e-8)
    assert ours.curve_.yield_at(ours.n_components_) == pytest.approx(theirs.explained_variance_ratio_.sum())


def test_partial_fit_is_fit(digits):
    rows, _ = digits
    batches = BottleneckPCA(7)
    for batch in np.array_split(rows, 9):
        batches.partial_fit(batch)
    whole = BottleneckPCA(7).fit(rows)
    assert batches.n_samples_seen_ == whole.n_samples_seen_ == len(rows)
    np.testing.assert_array_equal(batches.components_, whole.components_)
    assert BottleneckPCA(3).fit(rows).fit(rows[:100]).n_samples_seen_ == 100


def test_sparse_rows_give_the_same(digits):
    rows, _ = digits
    sparse, dense = BottleneckPCA(7).fit(scipy.sparse.csr_matrix(rows)), BottleneckPCA(7).fit(rows)
    np.testing.assert_allclose(sparse.components_, dense.components_, atol=1e-9)
    np.testing.assert_allclose(sparse.transform(scipy.sparse.csr_matrix(rows)), dense.transform(rows), atol=1e-8)
    assert sparse.score(scipy.sparse.csr_matrix(rows)) == pytest.approx(dense.score(rows), abs=1e-12)


def test_float32_stays_float32(digits):
    rows = digits[0].astype(np.float32)
    pca = BottleneckPCA(3).fit(rows)
    code = pca.transform(rows)
    assert {pca.components_.dtype, pca.mean_.dtype, code.dtype, pca.inverse_transform(code).dtype} == {rows.dtype}


def test_score_is_the_yield(digits):
    rows, _ = digits
    pca = BottleneckPCA(7).fit(rows[:1000])
    unseen = rows[1000:]
    lost = np.square(unseen - pca.inverse_transform(pca.transform(unseen))).sum()
    assert pca.score(unseen) == pytest.approx(1 - lost / np.square(unseen - pca.mean_).sum(), abs=1e-12)
    assert pca.score(rows[:1000]) == pytest.approx(pca.curve_.yield_at(7), abs=1e-12)


def test_pipeline_and_grid_search(digits):
    rows, labels = digits
    pipeline = make_pipeline(StandardScaler(), BottleneckPCA(), LogisticRegression(max_iter=300))
    search = GridSearchCV(pipeline, {"bottleneckpca__n_components": [2, 20]}, cv=3).fit(rows, labels)
    assert search.best_params_ == {"bottleneckpca__n_components": 20}
    assert search.best_score_ > 0.85
    names = search.best_estimator_[:-1].get_feature_names_out()
    assert list(names[:2]) == ["bottleneckpca0", "bottleneckpca1"]
    alone = GridSearchCV(BottleneckPCA(), {"n_components": [2, 20]}, cv=3).fit(rows)
    assert alone.best_params_ == {"n_components": 20}


def test_to_bottleneck_computes_the_same(digits):
    rows, _ = digits
    pca = BottleneckPCA(7).fit(rows)
    layer = pca.to_bottleneck(dtype=torch.float64)
    output = layer(torch.from_numpy(rows)).detach().numpy()
    np.testing.assert_allclose(output, pca.inverse_transform(pca.transform(rows)), atol=1e-9)


@pytest.mark.parametrize("n_components", [0, 65, 1.5, -0.1, "mle"])
def test_bad_numbers_of_components_are_said(digits, n_components):
    with pytest.raises(ValueError, match=r"n_components: expected None, .* = 64, got"):
        BottleneckPCA(n_components).fit(digits[0])


def test_attributes_need_rows(digits):
    with pytest.raises(NotFittedError):
        _ = BottleneckPCA().components_
    with pytest.raises(ValueError, match="X: expected 7 columns, one for each component, got 5"):
        BottleneckPCA(7).fit(digits[0]).inverse_transform(np.zeros((2, 5)))
