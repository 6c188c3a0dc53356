"""The leading eigenpairs against the whole decomposition, on spectra of every shape."""

import contextlib

import pytest
import torch

import byol_fast as bf
from byol_fast.eigen import leading_eigenpairs

FEATURES = 700
INDEX = torch.arange(FEATURES, dtype=torch.float64)
# What is found, at ranks 4 and 48; what is not comes from the whole decomposition.
EASY = {
    "power": (1 + INDEX) ** -2,
    "geometric": 0.95**INDEX,
    "over 12 orders": 10 ** (-12 * INDEX / (FEATURES - 1)),
    "few large ones": torch.where(INDEX < 60, 60 - INDEX, 1e-3 * (1 - INDEX / FEATURES)),
    "pairs": (1 + INDEX.div(2, rounding_mode="floor")) ** -1.5,
}
HARD = {
    "equal ones": torch.where(INDEX < 100, 1.0, 1e-3),
    "all equal": torch.ones(FEATURES, dtype=torch.float64),
    "flat": 1 - 1e-3 * INDEX / FEATURES,
    "low rank": torch.where(INDEX < 50, 1 / (1 + INDEX), 0.0),
    "zero": torch.zeros(FEATURES, dtype=torch.float64),
}


def matrix_of(values):
    generator = torch.Generator().manual_seed(1)
    axes, _ = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64))
    matrix = (axes * values) @ axes.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("rank", [1, 4, 48])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("spectrum", EASY)
def test_the_leading_eigenpairs_are_found(spectrum, scale, rank):
    matrix = matrix_of(EASY[spectrum]) * scale
    found = leading_eigenpairs(matrix, rank)
    assert found is not None, "not found, where the whole decomposition takes longer"
    values, vectors = found
    exact = torch.linalg.eigvalsh(matrix).flip(0)[:rank]
    assert values.shape == (rank,)
    assert vectors.shape == (FEATURES, rank)
    assert float((values - exact).abs().max() / exact[0]) <= 1e-13
    assert float((matrix @ vectors - vectors * values).norm() / exact[0]) <= 1e-12
    assert float((vectors.T @ vectors - torch.eye(rank)).norm()) <= 1e-12


@pytest.mark.parametrize("rank", [1, 4, 48])
@pytest.mark.parametrize("spectrum", HARD)
def test_what_is_found_of_hard_spectra_is_right(spectrum, rank):
    """Most often nothing is; but never another eigenpair than the largest ones."""
    matrix = matrix_of(HARD[spectrum])
    found = leading_eigenpairs(matrix, rank)
    if found is not None:
        exact = torch.linalg.eigvalsh(matrix).flip(0)
        assert float((found[0] - exact[:rank]).abs().max() / exact[0]) <= 1e-11


def test_more_equal_eigenvalues_than_a_block_can_tell_are_not_missed():
    """From 8 random columns, the method sees a 9-fold eigenvalue 8 times; the proof notices that one is missing."""
    values = torch.cat([torch.ones(9, dtype=torch.float64), 0.5 * 0.9 ** INDEX[9:]])
    matrix = torch.diag(values)
    found = leading_eigenpairs(matrix, 10)
    assert found is None or float((found[0] - values[:10]).abs().max()) <= 1e-11


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_found(bad):
    matrix = matrix_of(EASY["power"])
    matrix[3, 5] = matrix[5, 3] = bad
    # Some builds of LAPACK notice first.
    with contextlib.suppress(torch.linalg.LinAlgError):
        assert leading_eigenpairs(matrix, 4) is None


def test_a_rank_that_is_not_small_is_left_to_the_whole_decomposition():
    assert leading_eigenpairs(matrix_of(EASY["power"]), 100) is None


# -------------------------------------------------------------------------------------- where they are used


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(3000, FEATURES, generator=generator, dtype=torch.float64) * (1 + INDEX) ** -1
    mixed = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator, dtype=torch.float64))[0]
    return codes @ mixed + 3


@pytest.mark.parametrize("centered", [True, False])
def test_a_declared_rank_changes_no_component(rows, centered):
    few = bf.StreamingPCA(FEATURES, rank=16).partial_fit(rows)
    every = bf.StreamingPCA(FEATURES).partial_fit(rows)
    assert float((few.components(centered=centered) - every.components(16, centered=centered)).abs().max()) <= 1e-9
    for name in ("explained_variance_", "explained_variance_ratio_", "singular_values_"):
        torch.testing.assert_close(getattr(few, name), getattr(every, name)[:16], rtol=1e-12, atol=0.0)
    assert torch.equal(few.components(40, centered=centered), every.components(40, centered=centered))
    assert torch.equal(few.curve(centered=centered).yields, every.curve(centered=centered).yields)


def test_what_was_asked_before_does_not_change_a_bit(rows):
    first = bf.StreamingPCA(FEATURES, rank=16).partial_fit(rows)
    second = bf.StreamingPCA(FEATURES, rank=16).partial_fit(rows)
    second.curve(), second.components(40)
    assert torch.equal(first.components(), second.components())
    assert torch.equal(first.components(7), first.components()[:7])
    assert torch.equal(first.explained_variance_, second.explained_variance_)


def test_a_declared_rank_spares_the_whole_decomposition(rows, monkeypatch):
    pca = bf.StreamingPCA(FEATURES, rank=16).partial_fit(rows)
    decompose, sizes = torch.linalg.eigh, []

    def counted(matrix, *args, **kwargs):
        sizes.append(len(matrix))
        return decompose(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    pca.components()
    assert sizes
    assert max(sizes) < FEATURES / 2
    pca.partial_fit(rows[:1])
    pca.components()
    assert len(sizes) == 2, "what was found before the last row is out of date"
