"""StreamingPCA against scikit-learn and float64 linear algebra, on real and on hard data; the certificate."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from contract import assert_contract
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch.utils.data import DataLoader, TensorDataset

import byol_fast as bf

FLOAT64 = torch.float64


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().data)


def fitted(rows, batches=1, **options):
    pca = bf.StreamingPCA(rows.shape[1], **options)
    for batch in rows.tensor_split(batches):
        pca.partial_fit(batch)
    return pca


def scatter_of(rows):
    centered = rows.double() - rows.double().mean(0)
    return centered.T @ centered


# ------------------------------------------------------------------------------------------- scikit-learn's meanings


@pytest.mark.parametrize("rank", [5, 64])
def test_attributes_are_scikit_learns(digits, rank):
    ours, theirs = fitted(digits, 7, rank=rank), PCA(rank, svd_solver="full").fit(digits.numpy())
    for name in ("mean_", "explained_variance_", "explained_variance_ratio_"):
        np.testing.assert_allclose(
            getattr(ours, name).numpy(), getattr(theirs, name), rtol=1e-9, atol=1e-9, err_msg=name
        )
    # The covariance holds their squares: of a zero, it leaves the root of the largest one's rounding.
    zero = float(np.finfo(np.float64).eps ** 0.5 * theirs.singular_values_[0])
    np.testing.assert_allclose(ours.singular_values_.numpy(), theirs.singular_values_, rtol=1e-9, atol=zero)
    assert ours.n_samples_seen_ == theirs.n_samples_
    np.testing.assert_allclose(ours.covariance_.numpy(), np.cov(digits.numpy().T), rtol=1e-10, atol=1e-10)


def test_components_and_transforms_are_scikit_learns(digits):
    ours, theirs = fitted(digits, rank=10), PCA(10, svd_solver="full").fit(digits.numpy())
    signs = np.sign((ours.components().numpy() * theirs.components_).sum(1))
    np.testing.assert_allclose(ours.components().numpy(), theirs.components_ * signs[:, None], atol=1e-9)
    code = ours.transform(digits)
    np.testing.assert_allclose(code.numpy(), theirs.transform(digits.numpy()) * signs, atol=1e-9)
    expected = theirs.inverse_transform(theirs.transform(digits.numpy()))
    np.testing.assert_allclose(ours.inverse_transform(code).numpy(), expected, atol=1e-9)
    largest = ours.components().gather(1, ours.components().abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_every_rank_nests_in_the_next(digits):
    pca = fitted(digits)
    assert torch.equal(pca.components(3), pca.components()[:3])
    assert torch.equal(pca.transform(digits, 3), pca.transform(digits, 3))
    torch.testing.assert_close(pca.transform(digits, 3), pca.transform(digits)[:, :3])


def test_transform_keeps_the_precision_of_the_rows(digits):
    pca = fitted(digits, rank=4)
    assert pca.transform(digits.float()).dtype == torch.float32
    assert pca.inverse_transform(pca.transform(digits.float())).dtype == torch.float32
    sparse = pca.transform(scipy.sparse.csr_matrix(digits.numpy()))
    torch.testing.assert_close(sparse, pca.transform(digits))


# ------------------------------------------------------------------------------------------------- kinds of batches


@pytest.mark.parametrize("backend", [name for name in ("reference", "native") if bf.backends()[name].available])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("shape", [(3, 1), (20000, 3), (37, 23), (1500, 24), (2049, 25), (700, 49), (1100, 100)])
def test_the_scatter_keeps_the_contract_at_every_width(backend, dtype, shape):
    rows = torch.randn(shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(0)).add_(3).to(dtype)
    # Every other column of a wider matrix, so that the rows have to be laid out anew.
    strided = rows.repeat_interleave(2, dim=1)[:, ::2]
    with bf.use_backend(backend):
        for matrix in (rows, strided):
            covariance = fitted(matrix, 2).covariance_
            truth = scatter_of(rows) / (len(rows) - 1)
            assert_contract(covariance.to(dtype), torch.cov(rows.T).reshape(truth.shape), truth, f"{shape} {dtype}")


def test_float32_rows_are_as_exact_as_their_products(digits):
    rows = digits.float() / 7
    truth = scatter_of(rows) / (len(rows) - 1)
    error, eager = (float((c - truth).norm() / truth.norm()) for c in (fitted(rows).covariance_, torch.cov(rows.T)))
    assert error <= 2 * eager


@pytest.mark.parametrize("batches", [1, 2, 5, 300, 1797])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_the_cut_into_batches_does_not_change_a_bit(digits, dtype, batches):
    rows = torch.cat((digits, digits.flip(0), digits.cos(), digits.sin())).to(dtype)
    assert torch.equal(fitted(rows, batches).covariance_, fitted(rows).covariance_)


def test_asking_in_between_does_not_change_a_bit(digits):
    pca = bf.StreamingPCA(64)
    for batch in digits.tensor_split(10):
        pca.partial_fit(batch).explained_variance_.sum()
    assert torch.equal(pca.covariance_, fitted(digits).covariance_)


def test_rows_from_anywhere(digits, tmp_path):
    np.save(tmp_path / "rows.npy", digits.numpy())
    big_endian = digits.numpy().astype(">f8")
    dataset = TensorDataset(digits, torch.zeros(len(digits)))
    sources = {
        "numpy": digits.numpy(),
        "memory-mapped": np.load(tmp_path / "rows.npy", mmap_mode="r"),
        "fortran order": np.asfortranarray(digits.numpy()),
        "reversed twice": digits.numpy()[::-1].copy()[::-1],
        "foreign byte order": big_endian,
        "strided": torch.stack((digits, digits), dim=2)[:, :, 0],
        "loader": DataLoader(TensorDataset(digits), batch_size=100),
        "loader of pairs": DataLoader(dataset, batch_size=100),
        "dense in CSR": digits.to_sparse_csr(),
        "COO": digits.to_sparse_coo(),
    }
    truth = fitted(digits).covariance_
    for name, source in sources.items():
        assert torch.equal(bf.StreamingPCA(64).partial_fit(source).covariance_, truth), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_exact_in_theirs(digits, dtype):
    rows = digits.to(dtype)
    torch.testing.assert_close(fitted(rows).covariance_, fitted(digits).covariance_, rtol=1e-5, atol=1e-5)


def test_sparse_rows_are_never_made_dense(monkeypatch):
    generator = np.random.default_rng(0)
    rows = scipy.sparse.random(500, 80, density=0.02, format="csr", random_state=generator)
    truth = np.cov(rows.toarray().T)
    monkeypatch.setattr(bf.StreamingPCA, "_enqueue", None)
    pca = bf.StreamingPCA(80).partial_fit(rows[:200]).partial_fit(rows[200:])
    np.testing.assert_allclose(pca.covariance_.numpy(), truth, atol=1e-14)
    torch_rows = torch.from_numpy(rows.toarray()).to_sparse_csr()
    np.testing.assert_allclose(bf.StreamingPCA(80).partial_fit(torch_rows).covariance_.numpy(), truth, atol=1e-14)
    sketch = bf.StreamingPCA(80, rank=60, method="randomized", oversampling=20).partial_fit(rows)
    np.testing.assert_allclose(sketch.explained_variance_.numpy(), np.linalg.eigvalsh(truth)[::-1][:60], atol=1e-12)


def test_the_callers_rows_are_not_written(digits):
    rows, array = digits.clone(), digits.numpy().copy()
    bf.StreamingPCA(64).partial_fit(rows).partial_fit(array).transform(rows, 3)
    assert torch.equal(rows, digits)
    assert (array == digits.numpy()).all()


# -------------------------------------------------------------------------------------------------------- hard data


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_large_means_cost_no_digits(digits, dtype):
    """Means of a million standard deviations, drifting, against float64 on the same rounded rows."""
    rows = (digits[:, 10:14] / digits[:, 10:14].std() + torch.linspace(1e6, 1.1e6, 4)).to(dtype)
    pca, truth = fitted(rows, 3), scatter_of(rows)
    # Float32 rows hold these numbers in steps of 1/16; that is in the truth too.
    error = (pca.covariance_ * (len(rows) - 1) - truth).norm() / truth.norm()
    assert float(error) < (1e-6 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(pca.mean_, rows.double().mean(0), rtol=1e-13, atol=0)
    code = pca.transform(rows, 2)
    exact = (rows.double() - pca.mean_) @ pca.components(2).T
    torch.testing.assert_close(code.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_drift_between_batches_is_variance(digits):
    drifting = torch.cat([digits[i::10] + 100 * i for i in range(10)])
    torch.testing.assert_close(fitted(drifting, 10).covariance_, torch.cov(drifting.T), rtol=1e-10, atol=1e-8)


def test_ill_conditioned_rows_keep_small_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=FLOAT64))
    scales = torch.logspace(0, -6, 20, dtype=FLOAT64)
    rows = torch.randn(3000, 20, generator=generator, dtype=FLOAT64) * scales @ axes.T
    pca, truth = fitted(rows, 4), torch.linalg.svdvals(rows - rows.mean(0))
    torch.testing.assert_close(pca.singular_values_, truth, rtol=1e-3, atol=0)


def test_constant_and_duplicated_columns():
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.cat((rows, rows[:, :1], torch.full((500, 1), 1e7 / 3), torch.zeros(500, 1)), dim=1)
    pca = fitted(rows, 3)
    assert (pca.covariance_[4:] == 0).all()
    assert (pca.explained_variance_[3:] < 1e-6).all()
    assert (pca.explained_variance_ >= 0).all()
    identity = torch.eye(6, dtype=FLOAT64)
    torch.testing.assert_close(pca.components() @ pca.components().T, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("method", ["covariance", "randomized"])
def test_fewer_rows_than_the_rank(digits, method, count):
    pca = fitted(digits[:count], rank=8, method=method)
    assert (pca.explained_variance_[count - 1 :] == 0).all()
    assert (pca.explained_variance_[: count - 1] > 0).all()
    components = pca.components()
    torch.testing.assert_close(components @ components.T, torch.eye(8, dtype=FLOAT64), rtol=0, atol=1e-10)
    assert pca.to_bottleneck(dtype=FLOAT64).reconstruction_loss(digits[:count]) < 1e-9
    assert pca.curve().yield_at(8) == pytest.approx(1)


def test_empty_batches_change_nothing(digits):
    pca = bf.StreamingPCA(64).partial_fit(digits[:0]).partial_fit(digits).partial_fit(np.zeros((0, 64)))
    assert torch.equal(pca.covariance_, fitted(digits).covariance_)
    assert bf.StreamingPCA(64).partial_fit(digits[:0]).n_samples_seen_ == 0


@pytest.mark.parametrize("kind", ["tensor", "numpy", "csr"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_row_that_is_not_finite_is_named_and_left_out(digits, bad, kind):
    rows = digits.clone()
    rows[30, 3] = rows[20, 5] = bad
    batch = {"tensor": rows, "numpy": rows.numpy(), "csr": rows.to_sparse_csr()}[kind]
    pca = bf.StreamingPCA(64).partial_fit(digits)
    before = pca.covariance_
    with pytest.raises(ValueError, match=r"batch: expected finite numbers, got NaN or Inf in row 20 \(row 1817 of all"):
        pca.partial_fit(batch)
    assert torch.equal(pca.covariance_, before)


# Inside a block, among the rows that its shift is made of, and in the rows after the last full block.
@pytest.mark.parametrize("row", [20001, 16384, 40000])
@pytest.mark.parametrize("backend", [name for name in ("reference", "native") if bf.backends()[name].available])
def test_what_was_added_before_a_bad_row_of_a_large_batch_is_whole(backend, row):
    rows = torch.randn(41000, 8, generator=torch.Generator().manual_seed(0)).add_(5)
    spoiled = rows.clone()
    spoiled[row, 7] = spoiled[row + 5, 0] = float("nan")
    with bf.use_backend(backend):
        pca = bf.StreamingPCA(8)
        with pytest.raises(ValueError, match=rf"NaN or Inf in row {row} \(row {row} of all rows seen\)"):
            pca.partial_fit(spoiled)
        seen = pca.n_samples_seen_
        assert row - 16384 <= seen <= row
        truth = scatter_of(rows[:seen]) / (seen - 1)
        assert_contract(pca.covariance_.float(), torch.cov(rows[:seen].T), truth, "covariance")
        pca.partial_fit(rows[seen:])
        truth = scatter_of(rows) / (len(rows) - 1)
        assert_contract(pca.covariance_.float(), torch.cov(rows.T), truth, "covariance")


def test_rows_whose_sum_overflows_are_finite():
    assert fitted(torch.full((5, 3), 3e38)).n_samples_seen_ == 5


# ------------------------------------------------------------------------------------------------------ randomized


def test_two_randomized_passes_are_near_optimal(digits):
    exact = fitted(digits, rank=10)
    first = fitted(digits, 3, rank=10, method="randomized")
    second = first.next_pass().partial_fit(digits)
    losses = [float(pca.to_bottleneck(dtype=FLOAT64).reconstruction_loss(digits)) for pca in (exact, first, second)]
    assert losses[1] < 1.05 * losses[0]
    assert losses[2] < 1.002 * losses[0]
    for pca, loss in zip((first, second), losses[1:], strict=True):
        # The curve promises no more than the components keep.
        assert pca.curve().error_at(10) >= loss * (1 - 1e-12)
    torch.testing.assert_close(first.curve().errors[0], exact.curve().errors[0])
    assert first.curve().max_rank == 26


def test_randomized_handles_large_means_and_float32(digits):
    rows = (digits + 1e6).float()
    exact = rows.double() - rows.double().mean(0)
    ours, truth = (
        fitted(r, 3, rank=10, method="randomized").next_pass().partial_fit(r).explained_variance_ for r in (rows, exact)
    )
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=0)


def test_the_route_is_chosen_by_cost_and_explained():
    small = bf.StreamingPCA(784, rank=64).explain()
    assert (small.method, small.reason) == ("covariance", "784 features are few enough to be exact")
    large = bf.StreamingPCA(20000, rank=8).explain()
    assert large.method == "randomized"
    assert str(large) == (
        "randomized (the covariance would take 400,000,000 operations a row): 3,840,000 operations a row, "
        "7.3 MiB of sums"
    )
    assert bf.StreamingPCA(5000, rank=1200).explain().reason == "two randomized passes would take more operations"
    assert bf.StreamingPCA(30).explain().reason == "all ranks are wanted"
    assert bf.StreamingPCA(30, rank=2, method="randomized").explain().reason == "as asked for"


# ------------------------------------------------------------------------------------------- several, saved, copied


@pytest.mark.parametrize("method", ["covariance", "randomized"])
@pytest.mark.parametrize("cut", [0, 1, 700])
def test_merge_is_one_fit(digits, method, cut):
    whole = fitted(digits, rank=20, method=method)
    first, second = (fitted(part, rank=20, method=method) for part in (digits[:cut], digits[cut:] + 0))
    merged = first.merge(second)
    assert merged is first
    assert merged.n_samples_seen_ == 1797
    assert second.n_samples_seen_ == 1797 - cut
    torch.testing.assert_close(merged.mean_, whole.mean_, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.explained_variance_, whole.explained_variance_, rtol=1e-9, atol=1e-9)


def test_merge_keeps_adding(digits):
    pca = fitted(digits[:100]).merge(fitted(digits[100:200])).partial_fit(digits[200:])
    torch.testing.assert_close(pca.covariance_, fitted(digits).covariance_, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["covariance", "randomized"])
def test_a_saved_state_continues_bit_equal(digits, method, tmp_path):
    rows = torch.cat((digits, digits.cos(), digits.sin()))
    whole = fitted(rows, rank=9, method=method)
    torch.save(fitted(rows[:4500], rank=9, method=method).state_dict(), tmp_path / "state.pt")
    resumed = bf.StreamingPCA(64, rank=9, method=method)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    resumed.partial_fit(rows[4500:])
    assert torch.equal(resumed.explained_variance_, whole.explained_variance_)
    assert torch.equal(resumed.components(), whole.components())
    with pytest.raises(ValueError, match="state: expected the same"):
        bf.StreamingPCA(65).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_independent(digits, duplicate):
    pca = fitted(digits)
    other = duplicate(pca).partial_fit(digits.cos())
    assert other.n_samples_seen_ == 2 * 1797
    assert torch.equal(pca.covariance_, fitted(digits).covariance_)


def reduced(rank, folder, cuts, method):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    rows = torch.from_numpy(load_digits().data)
    pca = bf.StreamingPCA(64, rank=20, method=method).partial_fit(rows[cuts[rank] : cuts[rank + 1]]).all_reduce()
    torch.save((pca.n_samples_seen_, pca.mean_, pca.explained_variance_), folder / f"{rank}.pt")
    try:
        bf.StreamingPCA(64 + rank).all_reduce()
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["covariance", "randomized"])
@pytest.mark.parametrize("cuts", [(0, 1000, 1797), (0, 1797, 1797)])
def test_two_processes_are_one_fit(digits, tmp_path, cuts, method):
    torch.multiprocessing.spawn(reduced, (tmp_path, cuts, method), nprocs=2)
    whole = fitted(digits, rank=20, method=method)
    for rank in (0, 1):
        count, mean, variance = torch.load(tmp_path / f"{rank}.pt")
        assert count == 1797
        torch.testing.assert_close(mean, whole.mean_, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance, whole.explained_variance_, rtol=1e-9, atol=1e-9)
        assert (tmp_path / f"{rank}.txt").read_text().startswith("all_reduce: expected the same")


def test_one_process_needs_no_group(digits):
    pca = fitted(digits)
    assert torch.equal(pca.all_reduce().covariance_, fitted(digits).covariance_)


# ---------------------------------------------------------------------------------------- bottleneck and certificate


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 10, 64])
def test_to_bottleneck_is_the_optimum(digits, rank, bias, tied):
    pca = fitted(digits, 3)
    layer = pca.to_bottleneck(rank, bias=bias, tied=tied, dtype=FLOAT64)
    center = digits.mean(0) if bias else 0
    best = float(torch.linalg.svdvals(digits - center)[rank:].square().sum()) / digits.numel()
    assert float(layer.reconstruction_loss(digits)) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert pca.curve(centered=bias).error_at(rank) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert bf.certificate(layer, pca) == pytest.approx(1, abs=1e-9)
    if bias:
        torch.testing.assert_close(layer.encode(digits), pca.transform(digits, rank), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"tied": True}, {"residual": True}, {"residual": True, "tied": True, "bias": False}],
)
def test_the_certificate_is_the_quotient_of_the_losses(digits, options):
    torch.manual_seed(0)
    layer, pca = bf.Bottleneck(64, 6, **options), fitted(digits)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    achieved = float(layer.double().reconstruction_loss(digits))
    best = pca.curve(centered=options.get("bias", True)).error_at(6)
    assert bf.certificate(layer, pca) == pytest.approx(achieved / best, rel=1e-10)


def test_the_certificate_of_data_of_low_rank_is_1(digits):
    rows = digits[:5].float().repeat(20, 1)
    pca = fitted(rows)
    assert bf.certificate(pca.to_bottleneck(10), pca) == 1
    assert bf.certificate(pca.to_bottleneck(2), pca) == pytest.approx(1, abs=1e-5)
    assert bf.certificate(bf.Bottleneck(64, 10), pca) > 1000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p: bf.certificate(torch.nn.Linear(64, 3), p),
            TypeError,
            "bottleneck: expected a byol_fast.Bottleneck, got L",
        ),
        (lambda p: bf.certificate(bf.Bottleneck(64, 3), 1.0), TypeError, "pca: expected a StreamingPCA, got float"),
        (
            lambda p: bf.certificate(bf.Bottleneck(32, 3), p),
            ValueError,
            "bottleneck: expected in_features = out_features = n_features = 64, got 32 and 32",
        ),
        (
            lambda p: bf.certificate(bf.Bottleneck(64, 3, activation="relu"), p),
            ValueError,
            "certificate: expected a layer with activation identity, got relu",
        ),
        (
            lambda p: bf.certificate(bf.Bottleneck(64, 3), bf.StreamingPCA(64, rank=3, method="randomized")),
            ValueError,
            'pca: expected method "covariance", got "randomized"',
        ),
        (lambda p: p.components(65), ValueError, "rank: expected 1 ≤ rank ≤ n_features = 64, got 65"),
        (lambda p: p.components(0), ValueError, "rank: expected 1 ≤ rank ≤ n_features = 64, got 0"),
        (lambda p: p.transform(torch.zeros(3, 5)), ValueError, r"batch: expected shape .* = \[any, 64\], got \[3, 5\]"),
        (
            lambda p: p.partial_fit(torch.zeros(3, 5)),
            ValueError,
            r"batch: expected shape .* = \[any, 64\], got \[3, 5\]",
        ),
        (lambda p: p.partial_fit(torch.zeros(64)), ValueError, r"batch: expected two dimensions .* got shape \[64\]"),
        (lambda p: p.partial_fit([[1.0]]), TypeError, "batch: expected a tensor, a NumPy array .*, got list"),
        (
            lambda p: p.partial_fit(torch.zeros(1, 64, dtype=torch.complex64)),
            TypeError,
            "batch: expected real numbers, got",
        ),
        (lambda p: p.partial_fit(np.array([["a"] * 64])), TypeError, "batch: expected real numbers, got <U1"),
        (lambda p: p.merge(1), TypeError, "other: expected a StreamingPCA, got int"),
        (lambda p: p.merge(bf.StreamingPCA(65)), ValueError, "other: expected the same .* got"),
        (lambda p: p.next_pass(), ValueError, 'next_pass: expected method "randomized"'),
        (lambda p: bf.StreamingPCA(64).components(), RuntimeError, "no rows seen yet: call partial_fit first"),
        (lambda p: bf.StreamingPCA(0), ValueError, "n_features: expected an integer ≥ 1, got 0"),
        (lambda p: bf.StreamingPCA(4, rank=5), ValueError, "rank: expected 1 ≤ rank ≤ n_features = 4, got 5"),
        (lambda p: bf.StreamingPCA(4, method="fast"), ValueError, "method: expected one of auto, .*, got 'fast'"),
        (
            lambda p: bf.StreamingPCA(4, method="randomized"),
            ValueError,
            'rank: expected an integer for method "randomized"',
        ),
        (
            lambda p: bf.StreamingPCA(64, rank=3, method="randomized").partial_fit(torch.eye(64)).covariance_,
            ValueError,
            'covariance_: expected method "covariance", got "randomized"',
        ),
    ],
)
def test_bad_input_is_named(digits, call, error, message):
    with pytest.raises(error, match=message):
        call(fitted(digits))


def test_other_random_directions_do_not_merge(digits):
    first, second = (fitted(digits, rank=3, method="randomized", seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="other: expected the same"):
        first.merge(second)
