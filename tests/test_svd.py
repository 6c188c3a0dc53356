"""truncated_svd against LAPACK in float64, on real and on hard matrices."""

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_digits

import byol_fast as bf
from byol_fast.svd import choose_method

METHODS = ("exact", "covariance", "randomized")


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().data)


def lost_energy(matrix, factors):
    """Squared error of the factors relative to the smallest that is possible, both in float64."""
    left, values, right = (factor.double() for factor in factors)
    tail = torch.linalg.svdvals(matrix.double())[len(values) :].square().sum()
    return float((matrix.double() - (left * values) @ right).square().sum() / tail)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_digits_reach_the_eckart_young_optimum(digits, method, dtype, transposed):
    matrix = digits.to(dtype).T if transposed else digits.to(dtype)
    factors = bf.truncated_svd(matrix, 10, method=method)
    assert [tuple(f.shape) for f in factors] == [(matrix.shape[0], 10), (10,), (10, matrix.shape[1])]
    assert {f.dtype for f in factors} == {dtype}
    allowed = 1.0005 if method == "randomized" else 1 + 1e-6
    assert lost_energy(matrix, factors) <= allowed


@pytest.mark.parametrize("method", ["exact", "covariance"])
def test_singular_values_and_signs_are_numpys(digits, method):
    left, values, right = bf.truncated_svd(digits, 20, method=method)
    expected = np.linalg.svd(digits.numpy(), compute_uv=False)[:20]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)
    assert (right.gather(1, right.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(left.T @ left, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(right @ right.T, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_factors_stay_orthonormal_beyond_the_numerical_rank(method):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 5, generator=generator) @ torch.randn(5, 40, generator=generator)
    left, values, right = bf.truncated_svd(matrix.double(), 9, method=method)
    torch.testing.assert_close(left.T @ left, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(right @ right.T, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-10)
    # What float32 rounding left above rank 5 is all there is.
    assert float(values[5]) < 1e-5 * float(values[0])


@pytest.mark.parametrize("method", METHODS)
def test_the_zero_matrix_has_zero_singular_values(method):
    left, values, right = bf.truncated_svd(torch.zeros(7, 4), 2, method=method)
    assert values.tolist() == [0, 0]
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()


def test_covariance_resolves_float32_data_as_well_as_lapack():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(300, 20, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(50, 20, generator=generator, dtype=torch.float64))
    matrix = ((left * torch.logspace(0, -6, 20, dtype=torch.float64)) @ right.T).float()
    truth = torch.linalg.svdvals(matrix.double())[:20]
    errors = {
        method: float((bf.truncated_svd(matrix, 20, method=method).S.double() - truth).abs().max())
        for method in ("exact", "covariance")
    }
    assert errors["covariance"] <= max(2 * errors["exact"], 2e-7)


def test_randomized_is_repeatable_and_seeded(digits):
    first, second, other = (bf.truncated_svd(digits, 5, method="randomized", seed=s) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.U, other.U)


def test_half_precision_is_computed_in_float32(digits):
    factors = bf.truncated_svd(digits.bfloat16(), 3)
    assert factors.U.dtype == torch.float32
    assert lost_energy(digits.bfloat16(), factors) <= 1.0005


def test_strided_input_is_not_written(digits):
    matrix = digits.float()[::2, ::3]
    copy = matrix.clone()
    for method in METHODS:
        bf.truncated_svd(matrix, 4, method=method)
    assert torch.equal(matrix, copy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4, 3), 0), ValueError, r"rank: expected 1 ≤ rank ≤ min\(m, n\) = 3, got 0"),
        ((torch.zeros(4, 3), 4), ValueError, r"rank: expected 1 ≤ rank ≤ min\(m, n\) = 3, got 4"),
        ((torch.zeros(4, 3), 1.5), TypeError, r"rank: expected an integer, got float"),
        ((torch.zeros(4, 3), 1, "fast"), ValueError, r"method: expected one of auto, exact, .*, got 'fast'"),
        ((torch.zeros(4), 1), ValueError, r"matrix: expected two dimensions \[rows, columns\], got shape \[4\]"),
        ((torch.zeros(0, 3), 1), ValueError, r"matrix: expected shape \[m, n\] with m, n ≥ 1, got \[0, 3\]"),
        (
            (torch.zeros(4, 3, dtype=torch.complex64), 1),
            TypeError,
            r"matrix: expected real numbers, got torch.complex64",
        ),
        (("matrix", 1), TypeError, r"matrix: expected .*, got str"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    matrix, rank, *method = arguments
    with pytest.raises(error, match=message):
        bf.truncated_svd(matrix, rank, **({"method": method[0]} if method else {}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_row_that_is_not_finite_is_named(bad):
    matrix = torch.zeros(6, 3)
    matrix[4, 1] = matrix[2, 2] = bad
    with pytest.raises(ValueError, match="matrix: expected finite numbers, got NaN or Inf in row 2"):
        bf.truncated_svd(matrix, 1)


# ------------------------------------------------------------------------------------------ sparse, and out of memory


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["scipy", "torch", "coo", "numpy", "memory-mapped"])
@pytest.mark.parametrize("method", METHODS)
def test_other_kinds_of_matrices_give_the_same(digits, tmp_path, monkeypatch, method, kind, transposed):
    monkeypatch.setattr("byol_fast.svd._BLOCK_BYTES", 20_000)
    matrix = digits.T.contiguous() if transposed else digits
    np.save(tmp_path / "matrix.npy", matrix.numpy())
    source = {
        "scipy": scipy.sparse.csr_matrix(matrix.numpy()),
        "torch": matrix.to_sparse_csr(),
        "coo": matrix.to_sparse_coo(),
        "numpy": matrix.numpy(),
        "memory-mapped": np.load(tmp_path / "matrix.npy", mmap_mode="r"),
    }[kind]
    ours, dense = bf.truncated_svd(source, 6, method=method), bf.truncated_svd(matrix, 6, method=method)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_that_of_the_product(digits, method):
    left, values, right = factors = bf.truncated_svd(digits, 12, method=method)
    assert factors.error == pytest.approx(float((digits - (left * values) @ right).norm() / digits.norm()), rel=1e-9)
    assert factors.method == method
    assert bf.truncated_svd(digits, 64).error < 1e-7
    assert bf.truncated_svd(torch.zeros(3, 2), 1).error == 0


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ((2000, 1500, 100, torch.float32), "randomized"),
        ((2000, 1500, 200, torch.float32), "covariance"),
        ((9000, 5000, 2000, torch.float64), "randomized"),
        ((2000, 100, 10, torch.float32), "covariance"),
        ((2000, 100, 10, torch.float64), "exact"),
        ((10**7, 100, 10, torch.float64), "covariance"),
        ((943, 1682, 90, torch.float32, True), "randomized"),
        ((943, 1682, 100, torch.float32, True), "covariance"),
    ],
)
def test_auto_chooses_by_size(arguments, method):
    assert choose_method(*arguments) == method
